"""What goes wrong on the way up to the Hub, each in one line with its remedy; ``faults`` has the way down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pissa_hub.errors import HubError
from pissa_hub.hub.transport import TransportError, hide_signatures, status_of, without_secrets

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_AGAIN = "run the same command again: what was uploaded is not uploaded twice"


class MovedError(HubError):
    """Somebody else changed the branch meanwhile; nothing was committed."""


@contextmanager
def upload_faults(repo_id: str) -> Iterator[None]:
    """Turn what the client raises while a repository is written into :class:`HubError`."""
    hide_signatures()
    try:
        yield
    except (TransportError, OSError, RuntimeError, ValueError) as error:
        raise _explained(repo_id, error) from None


def _explained(repo_id: str, error: BaseException) -> HubError:
    cause: BaseException | None = error
    while cause is not None:  # the client wraps what happened to an upload
        root = cause
        if isinstance(cause, HfHubHTTPError):
            return _refused(repo_id, cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return HubError("HF_HUB_OFFLINE forbids to publish", "unset it")
        if isinstance(cause, LocalTokenNotFoundError):
            return HubError("there is no Hub token", LOG_IN)
        if isinstance(cause, HFValidationError):
            return HubError(f"{repo_id} is no name that the Hub allows", "give USER/NAME of letters, digits, . - and _")
        if isinstance(cause, TransportError | ConnectionError | TimeoutError):
            return HubError(f"the Hub cannot be reached ({type(cause).__name__})", f"check the network, then {_AGAIN}")
        cause = cause.__cause__
    return HubError(f"{repo_id} could not be published ({type(root).__name__}: {_said(str(root))})", _AGAIN)


def _refused(repo_id: str, error: HfHubHTTPError) -> HubError:
    status = status_of(error)
    said = _said(error.server_message or "")
    because = f" ({said})" if said else ""
    if status == 401:
        return HubError(f"the Hub does not accept the token{because}", LOG_IN)
    if status == 403:
        return HubError(
            f"the token has no right to write to {repo_id}{because}", f"choose a name of yours, or {LOG_IN}"
        )
    if status == 404:
        return HubError(f"{repo_id}, or what was asked of it, is not there{because}", "check the name and the branch")
    if status == 409:
        return HubError(f"{repo_id} is taken by something that this token cannot see", "choose another name")
    if status == 412:
        return MovedError(f"somebody else changed {repo_id} meanwhile, and nothing was committed", _AGAIN)
    if status == 429:
        return HubError("the Hub asks for fewer requests", f"wait some minutes, then {_AGAIN}")
    return HubError(f"the Hub answers {repo_id} with status {status}{because}", _AGAIN)


def _said(message: str) -> str:
    """One line of what a server said, without queries of addresses and tokens."""
    return without_secrets(" ".join(message.split()))[:200]
