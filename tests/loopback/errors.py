"""Refusals of a loopback Hub, in the form the client reads them."""

from __future__ import annotations


class HubError(Exception):
    """An answer with an error status.

    Args:
        status: of HTTP.
        message: sent as X-Error-Message and in the body.
        code: sent as X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound or GatedRepo.
        headers: sent besides.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
