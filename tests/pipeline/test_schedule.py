"""Work shared out through a store: every unit once, none lost, whoever dies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from threading import Barrier, Event, Thread
from typing import Any

import pytest

from pissa_hub.errors import MatrixError, PeerError, PissaHubError
from pissa_hub.pipeline import shared
from pissa_hub.pipeline.schedule import Alone
from pissa_hub.pipeline.shared import Shared
from pissa_hub.pipeline.store import host_store
from pissa_hub.progress import Silent
from pissa_hub.ranks import Rank

NOTHING: Mapping[int, Sequence[int]] = {}


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(shared, "GRACE_SECONDS", 1.5)
    monkeypatch.setattr(shared, "JOIN_SECONDS", 60.0)
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)


class Notes(Silent):
    """Progress of which only the notes count."""

    def __init__(self, notes: list[str]) -> None:
        self.note = notes.append  # type: ignore[method-assign]  # the list takes them as they come


class Crew:
    """Processes, as threads of this one.

    Attributes:
        done: how often each unit was done.
        units_of: those that each rank was given.
        errors: what stopped a rank.
        notes: that rank 0 has shown.
        inherited: units that rank 0 knows to have been taken over.
    """

    def __init__(self, size: int, has_agent: bool = False) -> None:
        self.store = host_store()
        self.size = size
        self.has_agent = has_agent
        self.begin_anew()

    def begin_anew(self) -> None:
        """As if all processes were started once more."""
        self.done: Counter[int] = Counter()
        self.units_of: dict[int, list[int]] = {rank: [] for rank in range(self.size)}
        self.errors: dict[int, BaseException] = {}
        self.notes: list[str] = []
        self.inherited: list[int] = []
        self._here, self._faulty_first = Barrier(self.size), Event()

    def shared(self, rank: int, progress: Any = None) -> Shared:
        place = Rank(rank, self.size, "127.0.0.1", self.store.port, has_agent=self.has_agent)
        return Shared(self.store, place, "job", progress or Silent())

    def together(
        self,
        count: int,
        needs: Mapping[int, Sequence[int]] = NOTHING,
        *,
        faulty: int | None = None,
        fault: Callable[[Shared], None] | None = None,
        at: int = 0,
    ) -> None:
        """All ranks at once, none before all are there.

        Args:
            count, needs: see ``pipeline.schedule.Schedule.units``.
            faulty: the rank that has work alone until ``fault`` has happened.
            fault: to be done with the unit in hand that comes after ``at`` others.
            at: see ``fault``.
        """
        if fault is None:
            self._faulty_first.set()
        threads = [
            Thread(target=self._live, args=(rank, count, needs, fault if rank == faulty else None, at))
            for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert self._faulty_first.is_set(), "what was to be tested did not happen"

    def alone(self, rank: int, count: int) -> None:
        """Rank 0 without the others."""
        self._here = Barrier(1)
        self._faulty_first.set()
        self._live(rank, count, NOTHING, None, 0)

    def _live(
        self,
        rank: int,
        count: int,
        needs: Mapping[int, Sequence[int]],
        fault: Callable[[Shared], None] | None,
        at: int,
    ) -> None:
        try:
            with self.shared(rank, Notes(self.notes)) as process:
                if rank == 0:
                    process.open({"threads": 1})
                else:
                    assert process.join() == {"threads": 1}
                self._here.wait(60)
                if fault is None:
                    assert self._faulty_first.wait(60)
                for unit in process.units(count, needs):
                    self.units_of[rank].append(unit)
                    if fault is not None and len(self.units_of[rank]) > at:
                        self._faulty_first.set()
                        fault(process)
                        fault = None
                    assert all(self.done[need] for need in needs.get(unit, ()))
                    if process.has(unit):
                        self.done[unit] += 1
                        process.done(unit)
                    process.check()
                if rank:
                    process.wait_for_end()
                else:
                    self.inherited = process.inherited()
        except SystemExit:
            pass
        except BaseException as error:  # looked at by the test
            self.errors[rank] = error


def die(process: Shared) -> None:
    """No sign of life any more."""
    process._left.set()
    process._pulse.join()
    raise SystemExit


def fail(process: Shared) -> None:
    raise MatrixError("a weight holds NaN", "repair it")


def take_long(process: Shared) -> None:
    """Longer than a dead process is waited for."""
    time.sleep(2 * shared.GRACE_SECONDS)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_unit_is_done_once(size: int) -> None:
    crew = Crew(size)
    crew.together(100)
    assert crew.done == Counter(range(100))
    assert not crew.errors
    assert all(units == sorted(units) for units in crew.units_of.values()), "the largest come first"


def test_units_wait_for_what_they_need() -> None:
    crew = Crew(3)
    crew.together(22, {20: [3, 4, 19], 21: [0, 20]})
    assert crew.done == Counter(range(22))
    assert not crew.errors


@pytest.mark.parametrize("at", [0, 1, 5])
def test_units_of_the_dead_go_to_the_living(at: int) -> None:
    crew = Crew(3)
    crew.together(30, faulty=1, fault=die, at=at)
    assert len(crew.units_of[1]) == at + 1
    assert crew.done == Counter(range(30))
    assert not crew.errors


def test_the_living_are_not_taken_for_dead() -> None:
    """Nor is a unit begun twice that takes longer than a dead process is waited for."""
    crew = Crew(3)
    crew.together(4, faulty=2, fault=take_long)
    assert crew.units_of[2] == [0]
    assert sorted(unit for units in crew.units_of.values() for unit in units) == [0, 1, 2, 3]
    assert crew.done == Counter(range(4))


def test_whoever_slept_too_long_finds_the_unit_taken() -> None:
    crew = Crew(2)

    def sleep(process: Shared) -> None:
        (unit,) = crew.units_of[1]
        process._left.set()
        process._pulse.join()
        process._left.clear()
        while process.has(unit):
            time.sleep(0.01)
        process._pulse = Thread(target=process._beat, daemon=True)
        process._pulse.start()

    crew.together(10, faulty=1, fault=sleep)
    (unit,) = set(crew.units_of[0]) & set(crew.units_of[1])
    assert unit == crew.units_of[1][0]
    assert crew.done == Counter(range(10))
    assert not crew.errors


@pytest.mark.parametrize("error", [RuntimeError("uncorrectable ECC error"), KeyboardInterrupt()])
def test_what_stops_one_worker_does_not_stop_the_others(error: BaseException) -> None:
    """Its device, or somebody who wants its machine: it leaves, and is not waited for."""

    def stop(process: Shared) -> None:
        raise error

    crew = Crew(3)
    crew.together(30, faulty=2, fault=stop, at=1)
    assert crew.done == Counter(range(30))
    assert crew.errors == {2: error}
    told = ["rank 2 stopped (RuntimeError: uncorrectable ECC error); the others do its work"]
    assert crew.notes == (told if isinstance(error, RuntimeError) else [])


def test_notes_of_all_are_shown_by_rank_0() -> None:
    def tell(process: Shared) -> None:
        process.progress.note("one, with a comma")
        process.progress.note("two")

    crew = Crew(2)
    crew.together(10, faulty=1, fault=tell)
    assert crew.notes == ["one, with a comma", "two"]


def test_units_that_were_taken_over_are_known() -> None:
    crew = Crew(3)
    crew.together(30, faulty=1, fault=die, at=2)
    assert crew.inherited == crew.units_of[1][2:]


def test_a_worker_of_an_earlier_round_stops() -> None:
    """torchrun has started everybody anew but for it."""
    crew = Crew(2, has_agent=True)

    def begin_anew(process: Shared) -> None:
        with suppress(PissaHubError), crew.shared(0):
            while process._failure is None:
                time.sleep(0.01)

    crew.together(10, faulty=1, fault=begin_anew)
    assert "another rank 0 has begun; leave it to that one" in str(crew.errors[1])


@pytest.mark.parametrize("faulty", [0, 2])
def test_an_error_stops_everybody(faulty: int) -> None:
    crew = Crew(3)
    crew.together(10_000, faulty=faulty, fault=fail, at=3)
    assert sorted(crew.errors) == [0, 1, 2]
    assert all(isinstance(error, MatrixError) for error in crew.errors.values())
    assert {str(error) for error in crew.errors.values()} == {"a weight holds NaN; repair it"}
    assert len(crew.done) < 10_000


def test_death_of_rank_0_is_noticed() -> None:
    crew = Crew(3)
    crew.together(40, faulty=0, fault=die, at=4)
    assert sorted(crew.errors) == [1, 2]
    assert crew.done == Counter(range(40))
    assert all("rank 0 has died; run the same command again" in str(error) for error in crew.errors.values())


def test_rank_0_alone_does_everything() -> None:
    """The others may come late, or not at all."""
    crew = Crew(4)
    crew.alone(0, 10)
    assert crew.done == Counter(range(10))
    assert not crew.errors


def test_who_comes_late_finds_all_finished() -> None:
    crew = Crew(2)
    crew.alone(0, 10)
    with crew.shared(1) as late:
        assert late.join() is None


def test_processes_that_are_started_anew_find_each_other() -> None:
    """As after a change of members under torchrun: its store still has all that those of before wrote."""
    crew = Crew(2, has_agent=True)
    crew.together(40, faulty=0, fault=die, at=5)
    assert sorted(crew.errors) == [1]
    crew.begin_anew()
    crew.together(6)
    assert crew.done == Counter(range(6))
    assert not crew.errors


def test_who_is_started_anew_before_rank_0_waits_for_it() -> None:
    """What it finds meanwhile is the failure of the rank 0 before."""
    crew = Crew(2, has_agent=True)
    with suppress(PissaHubError), crew.shared(0):
        raise PissaHubError("no room", "make some")

    def join() -> Mapping[str, Any] | None:
        with crew.shared(1) as other:
            return other.join()

    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join)
        with pytest.raises(TimeoutError):
            joining.result(2 * shared.GRACE_SECONDS)
        with crew.shared(0) as leader:
            leader.open({"threads": 1})
            assert joining.result(60) == {"threads": 1}


def test_nobody_waits_for_ever_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "JOIN_SECONDS", 0.2)
    message = "rank 0 has not begun; give every rank the same command"
    with pytest.raises(PeerError, match=message), Crew(2).shared(1) as other:
        other.join()


def test_rank_0_that_cannot_begin_says_why_everywhere() -> None:
    crew = Crew(2)

    def lead() -> None:
        with suppress(PissaHubError), crew.shared(0):
            time.sleep(0.2)
            raise PissaHubError("no room", "make some")

    thread = Thread(target=lead)
    thread.start()
    with pytest.raises(PissaHubError, match="no room; make some"), crew.shared(1) as other:
        other.join()
    thread.join()


def test_a_buried_process_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "GRACE_SECONDS", 3600.0)
    crew = Crew(2)
    with crew.shared(0) as leader:
        leader.open({"threads": 1})
        helper = crew.shared(1)
        helper.__enter__()
        helper.join()
        taken = next(helper.units(3, NOTHING))
        helper._left.set()
        rank, process, _ = helper._name.split(".")
        leader.bury(int(rank), int(process))
        for unit in leader.units(3, NOTHING):
            crew.done[unit] += 1
            leader.done(unit)
    assert crew.done[taken] == 1
    assert len(crew.done) == 3


def test_rank_0_shows_the_bytes_of_all() -> None:
    class Count(Silent):
        expected = done = 0

        def expect(self, nbytes: int) -> None:
            self.expected += nbytes

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

    crew, count = Crew(2), Count()
    with crew.shared(0, count) as leader:
        leader.progress.expect(10)
        leader.open({})
        with crew.shared(1) as other:
            other.join()
            other.progress.advance(4)
            leader.progress.advance(3)
            other.progress.advance(2)
            while count.done < 9:
                time.sleep(0.01)
            other.progress.advance(40)  # done twice, by one that died
            while count.done < 10:
                time.sleep(0.01)
            leader._store.set("ended", "1")
    assert count.done == count.expected == 10


def test_alone_goes_in_order_and_waits_for_pieces() -> None:
    alone = Alone(Silent())
    units = alone.units(4, {3: [1, 2]})
    assert [next(units) for _ in range(3)] == [0, 1, 2]
    alone.done(1)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(next, units)
        with pytest.raises(TimeoutError):
            last.result(0.05)
        alone.done(2)
        assert last.result(60) == 3


def test_closing_ends_the_wait_for_pieces() -> None:
    alone = Alone(Silent())
    thread = Thread(target=lambda: list(alone.units(2, {1: [0]})))
    thread.start()
    alone.close()
    thread.join(10)
    assert not thread.is_alive()
