"""Work shared out through a store: every unit once, none lost, whoever dies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
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
    monkeypatch.setattr(shared, "JOIN_SECONDS", 20.0)
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(shared, "_calls", Calls())


class Calls(Counter[str]):
    """Every process counts its own calls; here all are threads of one."""

    def __setitem__(self, job: str, calls: int) -> None:
        super().__setitem__(job, 1)


class Crew:
    """Processes, as threads of this one."""

    def __init__(self, size: int) -> None:
        self.store = host_store()
        self.size = size
        self.done: Counter[int] = Counter()
        self.errors: dict[int, BaseException] = {}

    def shared(self, rank: int, progress: Any = None) -> Shared:
        place = Rank(rank, self.size, 0, "127.0.0.1", self.store.port, hosts_store=rank == 0)
        return Shared(self.store, place, "job", progress or Silent())

    def work(self, rank: int, count: int, needs: Mapping[int, Sequence[int]] = NOTHING, **faults: Any) -> None:
        """The life of one process; ``dies_at`` and ``fails_at`` a number of units."""
        try:
            with self.shared(rank) as process:
                if rank == 0:
                    process.open({"threads": 1})
                elif (opening := process.join()) is None:
                    return  # all was done before
                else:
                    assert opening == {"threads": 1}
                units = process.units(count, needs)
                for number, unit in enumerate(units):
                    if number == faults.get("dies_at"):
                        process._left.set()  # no sign of life any more
                        process._pulse.join()
                        raise SystemExit
                    if number == faults.get("fails_at"):
                        raise MatrixError("a weight holds NaN", "repair it")
                    assert all(self.done[need] for need in needs.get(unit, ()))
                    time.sleep(faults.get("pause", 0.001))
                    self.done[unit] += 1
                    process.done(unit)
                    process.check()
                if rank:
                    process.wait_for_end()
        except SystemExit:
            pass
        except BaseException as error:
            self.errors[rank] = error


def together(crew: Crew, count: int, needs: Mapping[int, Sequence[int]] = NOTHING, **faults: Mapping[str, Any]) -> None:
    """All ranks at once; ``faults`` by ``rank_N``."""
    threads = [
        Thread(target=crew.work, args=(rank, count, needs), kwargs=faults.get(f"rank_{rank}", {}))
        for rank in range(crew.size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_unit_is_done_once(size: int) -> None:
    crew = Crew(size)
    together(crew, 100)
    assert crew.done == Counter(range(100))
    assert not crew.errors


def test_units_wait_for_what_they_need() -> None:
    crew = Crew(3)
    together(crew, 22, {20: [3, 4, 19], 21: [0, 20]})
    assert crew.done == Counter(range(22))
    assert not crew.errors


@pytest.mark.parametrize("at", [0, 1, 5])
def test_units_of_the_dead_go_to_the_living(at: int) -> None:
    crew = Crew(3)
    together(crew, 30, rank_1={"dies_at": at})
    assert set(crew.done) == set(range(30))
    assert max(crew.done.values()) == 1
    assert not crew.errors


def test_the_living_are_not_taken_for_dead() -> None:
    """Nor is a unit begun twice that takes longer than a dead process is waited for."""
    crew = Crew(3)
    together(crew, 4, rank_2={"pause": 3.0})
    assert crew.done == Counter(range(4))


def test_an_error_stops_everybody() -> None:
    crew = Crew(3)
    together(crew, 1000, rank_2={"fails_at": 3})
    assert len(crew.errors) == 3
    assert all(isinstance(error, MatrixError) for error in crew.errors.values())
    assert {str(error) for error in crew.errors.values()} == {"a weight holds NaN; repair it"}
    assert len(crew.done) < 1000


def test_an_error_of_rank_0_stops_everybody() -> None:
    crew = Crew(3)
    together(crew, 1000, rank_0={"fails_at": 3})
    assert sorted(crew.errors) == [0, 1, 2]


def test_death_of_rank_0_is_noticed() -> None:
    crew = Crew(3)
    slowly = {"pause": 0.05}
    together(crew, 40, rank_0={"dies_at": 4, **slowly}, rank_1=slowly, rank_2=slowly)
    assert sorted(crew.errors) == [1, 2]
    assert set(crew.done) == set(range(40))
    assert all("rank 0 has died; run the same command again" in str(error) for error in crew.errors.values())


def test_rank_0_alone_does_everything() -> None:
    """The others may come late, or not at all."""
    crew = Crew(4)
    crew.work(0, 10)
    assert crew.done == Counter(range(10))
    assert not crew.errors


def test_who_comes_late_finds_all_finished() -> None:
    crew = Crew(2)
    crew.work(0, 10)
    with crew.shared(1) as late:
        assert late.join() is None


def test_processes_that_are_started_anew_find_each_other() -> None:
    """As after a change of members under torchrun: its store still has all that those of before wrote."""
    crew = Crew(2)
    together(crew, 40, rank_0={"dies_at": 5, "pause": 0.05}, rank_1={"dies_at": 3, "pause": 0.05})
    assert crew.done
    crew.done.clear()
    crew.errors.clear()
    together(crew, 6)
    assert crew.done == Counter(range(6))
    assert not crew.errors


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
    alone, seen = Alone(Silent()), []

    def work() -> None:
        for unit in alone.units(4, {3: [1, 2]}):
            seen.append(unit)

    thread = Thread(target=work)
    thread.start()
    alone.done(1)
    time.sleep(0.05)
    assert seen == [0, 1, 2]
    alone.done(2)
    thread.join(10)
    assert seen == [0, 1, 2, 3]


def test_closing_ends_the_wait_for_pieces() -> None:
    alone = Alone(Silent())
    thread = Thread(target=lambda: list(alone.units(2, {1: [0]})))
    thread.start()
    alone.close()
    thread.join(10)
    assert not thread.is_alive()
