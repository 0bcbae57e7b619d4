"""Who does what: the units of a job, for the process that has them all; see ``shared`` for one of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from threading import Condition
from typing import Protocol

from pissa_hub.progress import Progress


class Schedule(Protocol):
    """Hands out units, which are numbered in the order in which they are best begun."""

    @property
    def rank(self) -> int:
        """Of this process; 0 leads."""

    @property
    def progress(self) -> Progress:
        """Who is to be told of this process's part."""

    def units(self, count: int, needs: Mapping[int, Sequence[int]]) -> Iterator[int]:
        """The units that this process is to do, until all are done or :meth:`close` is called.

        Args:
            count: of all units.
            needs: the last units -> those that have to be done before.
        """

    def has(self, unit: int) -> bool:
        """Whether a unit is still this process's, which was not taken for dead meanwhile."""

    def done(self, unit: int) -> None:
        """A unit's receipt is on the disk."""

    def stop(self, error: BaseException) -> None:
        """Tell everybody of an error; rank 0 waits until nobody else works any more."""

    def count(self, what: str, number: int) -> int:
        """Add to what all processes count together; the sum so far."""

    def close(self) -> None:
        """End :meth:`units`, from any thread."""


class Alone:
    """The only process does everything, in order.

    Args:
        progress: told of it.
    """

    rank = 0

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._counts: Counter[str] = Counter()
        self._done: set[int] = set()
        self._changed = Condition()
        self._closed = False

    def units(self, count: int, needs: Mapping[int, Sequence[int]]) -> Iterator[int]:
        for unit in range(count):
            with self._changed:
                while not (self._closed or self._done.issuperset(needs.get(unit, ()))):
                    self._changed.wait()
            if self._closed:
                return
            yield unit

    def has(self, unit: int) -> bool:
        return True

    def done(self, unit: int) -> None:
        with self._changed:
            self._done.add(unit)
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """There is nobody else."""

    def count(self, what: str, number: int) -> int:
        self._counts[what] += number
        return self._counts[what]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
