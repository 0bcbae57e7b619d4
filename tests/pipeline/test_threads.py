"""Stages on threads of their own: values in order, errors where the values are, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from pissa_hub.pipeline.threads import Prefetch, Sink, Team

PATIENCE = 20.0


class BrokenError(Exception):
    """Raised by the other side."""


def in_time(action: Callable[[], Any]) -> Any:
    """What the action returns or raises; fails if it takes longer than patience allows."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    # In small steps: a pause of the whole machine is one step.
    for _ in range(int(PATIENCE / 0.1)):
        thread.join(0.1)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return results[0]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    ours = {thread for thread in threading.enumerate() if thread.name.startswith(("reader", "writer", "worker"))}
    for thread in ours - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), thread.name


def endless(closed: list[str]) -> Generator[int, None, None]:
    try:
        number = 0
        while True:
            yield number
            number += 1
    finally:
        closed.append(threading.current_thread().name)


def failing(after: int) -> Generator[int, None, None]:
    yield from range(after)
    raise BrokenError("reader")


@pytest.mark.parametrize("size", [1, 3, 256])
def test_prefetch_yields_everything_in_order(size: int) -> None:
    prefetch = Prefetch((number for number in range(50)), size)
    assert in_time(lambda: list(prefetch)) == list(range(50))
    in_time(prefetch.close)


def test_prefetch_runs_ahead_no_further_than_its_size() -> None:
    made: list[int] = []
    enough = threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(100):
            made.append(number)
            if number == 4:
                enough.set()
            yield number

    prefetch = Prefetch(items(), 4)
    assert enough.wait(PATIENCE)
    assert len(made) <= 6
    assert in_time(lambda: list(prefetch)) == list(range(100))
    in_time(prefetch.close)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_prefetch_raises_the_error_after_the_values_before_it(after: int) -> None:
    prefetch = Prefetch(failing(after), 2)
    seen: list[int] = []
    with pytest.raises(BrokenError, match="reader"):
        in_time(lambda: seen.extend(prefetch))
    assert seen == list(range(after))
    in_time(prefetch.close)


def test_prefetch_closed_early_closes_the_generator_on_its_own_thread() -> None:
    closed: list[str] = []
    prefetch = Prefetch(endless(closed), 2)
    assert next(iter(prefetch)) == 0
    in_time(prefetch.close)
    assert closed == ["reader"]


def test_prefetch_nobody_listens_to_ends_without_a_word() -> None:
    """Its error finds a full queue and then no consumer at all."""
    prefetch = Prefetch(failing(1), 1)
    in_time(prefetch.close)


def test_prefetch_can_be_closed_twice() -> None:
    prefetch = Prefetch(endless([]), 2)
    in_time(prefetch.close)
    in_time(prefetch.close)


def test_sink_consumes_in_order_and_waits_in_the_end() -> None:
    seen: list[int] = []
    sink: Sink[int] = Sink(seen.append, 2)
    for number in range(50):
        in_time(lambda number=number: sink.put(number))
    in_time(sink.finish)
    assert seen == list(range(50))


@pytest.mark.parametrize("bad", [0, 3])
def test_sink_raises_what_consuming_raised(bad: int) -> None:
    seen: list[int] = []

    def consume(number: int) -> None:
        if number == bad:
            raise BrokenError("writer")
        seen.append(number)

    sink: Sink[int] = Sink(consume, 1)

    def put_all() -> None:
        for number in range(1000):
            sink.put(number)
        sink.finish()

    with pytest.raises(BrokenError, match="writer"):
        in_time(put_all)
    assert seen == list(range(bad))
    with pytest.raises(BrokenError, match="writer"):
        in_time(sink.finish)
    with pytest.raises(BrokenError, match="writer"):
        in_time(sink.close)


def test_sink_closed_early_drops_what_waits() -> None:
    started, go = threading.Event(), threading.Event()
    seen: list[int] = []

    def consume(number: int) -> None:
        started.set()
        assert go.wait(PATIENCE)
        seen.append(number)

    sink: Sink[int] = Sink(consume, 10)
    for number in range(5):
        sink.put(number)
    assert started.wait(PATIENCE)
    closing = threading.Thread(target=sink.close)
    closing.start()
    # close() has told the sink to stop once puts are refused.
    with pytest.raises(RuntimeError, match="closed sink"):
        in_time(lambda: put_until_refused(sink, go))
    closing.join(PATIENCE)
    assert seen == [0]


def put_until_refused(sink: Sink[int], go: threading.Event) -> None:
    while not sink._channel.stopped.is_set():
        pass
    go.set()
    sink.put(9)


def test_sink_refuses_after_close() -> None:
    sink: Sink[int] = Sink(lambda number: None, 1)
    in_time(sink.close)
    with pytest.raises(RuntimeError, match="closed sink"):
        in_time(lambda: sink.put(1))


def test_team_gives_every_job_equipment_of_its_own() -> None:
    in_use: set[int] = set()
    lock, together = threading.Lock(), threading.Barrier(2, timeout=PATIENCE)
    made: list[list[int]] = []

    def equip() -> list[int]:
        made.append([len(made)])
        return made[-1]

    def job(equipment: list[int]) -> int:
        with lock:
            assert id(equipment) not in in_use
            in_use.add(id(equipment))
        together.wait()
        with lock:
            in_use.remove(id(equipment))
        return equipment[0]

    with Team(2, equip) as team:
        futures = [team.submit(job) for _ in range(6)]
        found = {future.result(PATIENCE) for future in futures}
    assert found == {0, 1}
    assert len(made) == 2


def test_team_shares_out_the_threads_and_gives_them_back(two_threads: None) -> None:
    before = torch.get_num_threads()
    assert before == 2
    with Team(2, lambda: None) as team:
        assert team.submit(lambda _: torch.get_num_threads()).result(PATIENCE) == 1
    assert torch.get_num_threads() == before


def test_team_passes_errors_on_and_works_on() -> None:
    def broken(_: None) -> None:
        raise BrokenError("worker")

    with Team(1, lambda: None) as team:
        with pytest.raises(BrokenError, match="worker"):
            team.submit(broken).result(PATIENCE)
        assert team.submit(lambda _: 7).result(PATIENCE) == 7


def test_team_left_early_drops_what_waits() -> None:
    started, go = threading.Event(), threading.Event()
    done: list[int] = []

    def job(_: None) -> None:
        started.set()
        assert go.wait(PATIENCE)
        done.append(1)

    def leave() -> None:
        with suppress(BrokenError), Team(1, lambda: None) as team:
            for _ in range(5):
                team.submit(job)
            assert started.wait(PATIENCE)
            threading.Timer(0.1, go.set).start()
            raise BrokenError

    in_time(leave)
    assert done == [1]
