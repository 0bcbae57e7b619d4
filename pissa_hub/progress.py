"""How far a long job is: who is told, and the bar on the terminal."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Protocol

from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm

from pissa_hub.ranks import is_heard


class Progress(Protocol):
    """Who is told how far a long job is."""

    def expect(self, nbytes: int) -> None:
        """More bytes to come."""

    def working_on(self, weight: str) -> None:
        """The weight in hand."""

    def advance(self, nbytes: int) -> None:
        """Bytes that are done."""

    def note(self, text: str) -> None:
        """Something that whoever waits should know."""


class Silent:
    """Progress that nobody watches."""

    def expect(self, nbytes: int) -> None: ...

    def working_on(self, weight: str) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def note(self, text: str) -> None: ...


class Bar:
    """A bar of bytes, with the weight in hand; silent off a terminal, with the Hub's bars off, and but for rank 0."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._bar: tqdm[None] = tqdm(
            total=0,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=are_progress_bars_disabled() or not sys.stderr.isatty() or not is_heard(),
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}",
        )

    def expect(self, nbytes: int) -> None:
        """More bytes to come."""
        with self._lock:
            self._bar.total += nbytes
            self._bar.refresh()

    def working_on(self, weight: str) -> None:
        with self._lock:
            self._bar.set_postfix_str(weight, refresh=False)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._bar.update(nbytes)

    def note(self, text: str) -> None:
        with self._lock:
            self._bar.write(f"note: {text}", file=sys.stderr)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
