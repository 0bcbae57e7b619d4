"""Waiting that does not count the time for which this process, or its machine, was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable


class Patience:
    """Seconds that run out while somebody looks.

    Between two looks a quarter of them passes at most: whoever was suspended and wakes up does not hold all others for
    dead that were suspended with it.
    """

    def __init__(self, seconds: float) -> None:
        self._left, self._most = seconds, seconds / 4
        self._looked = time.monotonic()

    def ran_out(self) -> bool:
        now = time.monotonic()
        self._left -= min(now - self._looked, self._most)
        self._looked = now
        return self._left <= 0


def comes_true(is_so: Callable[[], bool], seconds: float) -> bool:
    """Whether something is so, or comes to be in time."""
    patience = Patience(seconds)
    while not is_so():
        if patience.ran_out():
            return False
        time.sleep(seconds / 100)
    return True
