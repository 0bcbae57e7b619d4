"""What every parser owes whatever bytes it gets: it returns, or raises a PissaHubError that says why in one line."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from pissa_hub.errors import PissaHubError

MAX_CHARS = 2002
"""Of a message: a fact, a semicolon and a remedy."""
MAX_SECONDS = 5.0
"""Of this process's time on a processor, so that a busy machine does not look like a hang."""

ACCEPTED, REFUSED = "accepted", "refused"

Parser = Callable[[bytes], None]


@dataclass(frozen=True)
class Finding:
    """A broken contract.

    Attributes:
        what: how and where; the same for all inputs that break it in one place.
        detail: a traceback.
    """

    what: str
    detail: str


class RefusedError(Exception):
    """Raised for what a parser turns down without an error of its own."""


class Hang(BaseException):
    """Not an Exception: a parser that is lenient with those must not swallow it."""


def judge(parse: Parser, data: bytes) -> str | Finding:
    """What a parser does with its input: accept it, refuse it, or break the contract.

    Args:
        parse: the parser.
        data: its input.
    """
    try:
        with warnings.catch_warnings(), _limited():
            warnings.simplefilter("error")
            parse(data)
    except PissaHubError as error:
        message = str(error)
        if not message.isprintable():
            return _finding("a message of several lines or control characters", error)
        if len(message) > MAX_CHARS:
            return _finding("a long message", error)
        return REFUSED if error.fact and error.remedy else _finding("a message without a fact", error)
    except RefusedError:
        return REFUSED
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what only torch or a signal raises
        return _finding(type(error).__name__, error)
    return ACCEPTED


def _finding(fault: str, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "pissa_hub" in frame.filename] or list(frames)
    where = inner[-1]
    detail = "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-8))
    return Finding(f"{fault} in {where.name} ({where.filename.rpartition('pissa_hub/')[2]})", detail[-4000:])


@contextmanager
def _limited() -> Iterator[None]:
    """Raise Hang in a parser that takes longer than any honest input does; only where there are such timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Hang(f"more than {MAX_SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
