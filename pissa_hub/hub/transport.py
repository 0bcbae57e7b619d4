"""Requests to the Hub, whichever way the bytes go: what may pass by itself, and what may be said of a failure."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

# httpx in some releases of the client, httpx2 in others.
TransportError: type[Exception] = next(kind for kind in HfHubHTTPError.__bases__ if not issubclass(kind, OSError))

# Seconds between attempts, unless the Hub asks for more.
_PAUSES = (1.0, 2.0, 4.0)
_LONGEST_PAUSE = 60.0
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_SECRET = re.compile(r"\?\S+|\bhf_\w+")

T = TypeVar("T")


def persistently(call: Callable[[], T], wait: Callable[[float], object] = time.sleep) -> T:
    """The result of a call to the Hub, repeated while it fails for a reason that may pass.

    Args:
        call: raises what the client raises.
        wait: lets so many seconds pass; true if nobody waits for the result any more.
    """
    for pause in _PAUSES:
        try:
            return call()
        except (TransportError, LocalEntryNotFoundError) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            if not _may_pass(cause) or wait(max(pause, _asked_pause(cause))):
                raise
    return call()


def status_of(error: BaseException | None) -> int | None:
    """HTTP's status, if the Hub answered."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def without_secrets(text: str) -> str:
    """Text without tokens and the queries of addresses, which may be signatures."""
    return _SECRET.sub("", text)


def hide_signatures() -> None:
    """Keep them out of the client's own warnings, too."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(known, _WithoutSecrets) for known in handler.filters):
            handler.addFilter(_WithoutSecrets())


class _WithoutSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


def _may_pass(error: BaseException | None) -> bool:
    status = status_of(error)
    return status in _PASSING if status is not None else isinstance(error, TransportError)


def _asked_pause(error: BaseException | None) -> float:
    """Seconds of Retry-After."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else 0.0
