"""Waiting ends in time, though not for those who were asleep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pissa_hub.pipeline import patience
from pissa_hub.pipeline.patience import Patience, comes_true


class Clock:
    """``time`` as this test wants it."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def test_it_runs_out_while_somebody_looks(clock: Clock) -> None:
    waiting = Patience(10.0)
    for _ in range(99):
        clock.sleep(0.1)
        assert not waiting.ran_out()
    clock.sleep(0.2)
    assert waiting.ran_out()


def test_time_asleep_counts_a_quarter_at_most(clock: Clock) -> None:
    waiting, looks = Patience(10.0), 0
    while not waiting.ran_out():
        clock.sleep(1000.0)
        looks += 1
    assert looks == 4


def test_what_comes_true_is_not_waited_for_any_longer(clock: Clock) -> None:
    assert comes_true(lambda: clock.now > 103.0, 10.0)
    assert clock.now < 104.0


def test_what_never_comes_true_is_given_up(clock: Clock) -> None:
    assert not comes_true(lambda: False, 10.0)
    assert 110.0 <= clock.now < 111.0
