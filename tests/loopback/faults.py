"""Faults on demand: what a loopback Hub does wrong, for which requests and how often."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """What happens to a request whose path matches.

    Args:
        path: a regex, searched in the percent-decoded path; on the CDN a path ends with the file's in its repository.
        status: an error status, "cut" for a connection that ends after ``after_bytes`` of the answer's body (of the
            request's, for POST and PUT), "corrupt" for an answer whose first byte is wrong, None for a right answer.
        after_bytes: bytes that still pass before a cut.
        retry_after: seconds, sent as Retry-After.
        seconds: waited before the answer.
        action: called before the answer.
        method, origin: only such requests; None for any. A cut or a corruption waits for a body that is long enough.
    """

    path: str
    status: int | Literal["cut", "corrupt"] | None
    after_bytes: int = 0
    retry_after: int | None = None
    seconds: float = 0
    action: Callable[[], object] | None = None
    method: str | None = None
    origin: str | None = None

    @property
    def spoils_body(self) -> bool:
        return isinstance(self.status, str)

    def concerns(self, origin: str, method: str, path: str) -> bool:
        return (
            self.origin in (None, origin) and self.method in (None, method) and re.search(self.path, path) is not None
        )


class Faults:
    """The faults still to come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[Fault] = []

    def add(self, fault: Fault, times: int) -> None:
        with self._lock:
            self._left += [fault] * times

    def take(self, origin: str, method: str, path: str) -> Fault | None:
        """The next fault of a whole answer that concerns a request, which is then used up."""
        return self._take(lambda fault: not fault.spoils_body and fault.concerns(origin, method, path))

    def take_body(self, origin: str, method: str, path: str, length: int) -> Fault | None:
        """The next cut or corruption of a body of so many bytes, which is then used up."""
        return self._take(
            lambda fault: fault.spoils_body and fault.concerns(origin, method, path) and length > fault.after_bytes
        )

    def _take(self, chosen: Callable[[Fault], bool]) -> Fault | None:
        with self._lock:
            for position, fault in enumerate(self._left):
                if chosen(fault):
                    return self._left.pop(position)
        return None

    def clear(self) -> None:
        with self._lock:
            self._left.clear()
