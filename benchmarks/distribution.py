"""What sharing out the work costs: simulated workers take many shards from one store, as ``pipeline.shared`` does.

python -m benchmarks.distribution                 64 workers, 10,000 shards that take no time, and some that do
python -m benchmarks.distribution --workers 8
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.results import machine, markdown_table, save, versions
from pissa_hub.pipeline.shared import Shared
from pissa_hub.pipeline.store import host_store, reach_store
from pissa_hub.progress import Silent
from pissa_hub.ranks import Rank

_JOB = "0" * 64
_LOCAL = "127.0.0.1"
_THREADS = 9


def simulate(workers: int, shards: int, seconds: float) -> dict[str, Any]:
    """One job: workers, each with its own connection, that do nothing with a shard but let its time pass.

    Returns:
        ``wall``: seconds from the moment at which all may begin until rank 0 knows that all is done; ``ideal``: what
        the shards alone would take; ``cpu``: seconds of all processes; ``done``: fewest and most shards of a worker.
    """
    context = multiprocessing.get_context("spawn")
    store, results = host_store(), context.SimpleQueue()
    processes = [
        context.Process(target=_work, args=(ranks, workers, store.port, shards, seconds, results))
        for ranks in _crews(workers)
    ]
    for process in processes:
        process.start()
    with _shared(store, 0, workers, store.port) as shared:
        shared.open({})
        while shared.count("here", 0) < workers - 1:
            time.sleep(0.05)
        before = time.process_time()
        shared.count("begun", 1)
        started = time.perf_counter()
        counts = [_take(shared, shards, seconds)]
        wall, cpu = time.perf_counter() - started, time.process_time() - before
    for found, used in (results.get() for _ in processes):
        counts += found
        cpu += used
    for process in processes:
        process.join()
    if sum(counts) != shards:
        raise RuntimeError(f"{sum(counts)} shards were done instead of {shards}")
    return {
        "workers": workers,
        "shards": shards,
        "seconds_per_shard": seconds,
        "wall": wall,
        "ideal": -(-shards // workers) * seconds,
        "cpu": cpu,
        "done": [min(counts), max(counts)],
    }


def _crews(workers: int) -> list[range]:
    """Ranks but 0, by process: threads of a few, because 64 interpreters would be measured instead."""
    return [range(first, min(first + _THREADS, workers)) for first in range(1, workers, _THREADS)]


def _shared(store: Any, rank: int, workers: int, port: int) -> Shared:
    return Shared(store, Rank(rank, workers, _LOCAL, port, has_agent=False), _JOB, Silent())


def _work(ranks: range, workers: int, port: int, shards: int, seconds: float, results: Any) -> None:
    stores = [reach_store(Rank(rank, workers, _LOCAL, port, has_agent=False), wait=60.0) for rank in ranks]
    schedules = [_shared(store, rank, workers, port) for store, rank in zip(stores, ranks, strict=True)]
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(lambda shared: _live(shared, shards, seconds), schedules))
    results.put(([done for done, _ in found], max(used for _, used in found)))


def _live(shared: Shared, shards: int, seconds: float) -> tuple[int, float]:
    """A worker's shards, and seconds that its whole process has used since work began."""
    with shared:
        shared.join()
        shared.count("here", 1)
        while not shared.count("begun", 0):
            time.sleep(0.05)
        before = time.process_time()
        done = _take(shared, shards, seconds)
        used = time.process_time() - before
        shared.wait_for_end()
    return done, used


def _take(shared: Shared, shards: int, seconds: float) -> int:
    done = 0
    for unit in shared.units(shards, {}):
        if seconds:
            time.sleep(seconds)
        shared.done(unit)
        done += 1
    return done


def _summary(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        overhead = (row["wall"] - row["ideal"]) * row["workers"] / row["shards"]
        rows.append(
            [
                f"{row['workers']} workers, {row['shards']:,} shards",
                f"{row['seconds_per_shard']:g} s",
                f"{row['wall']:.2f} s",
                f"{row['wall'] / row['ideal'] - 1:.1%}" if row["ideal"] else "-",
                f"{overhead * 1e3:.1f} ms",
                f"{row['cpu'] / row['shards'] * 1e6:.0f} us",
                f"{row['done'][0]} to {row['done'][1]}",
            ]
        )
    header = ("job", "a shard", "whole job", "over ideal", "waiting per shard", "CPU per shard", "shards per worker")
    return f"{result['machine']}\n\n{markdown_table(header, rows)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.5, help="that a shard takes in the second job")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for seconds in (0.0, options.seconds):
        print(f"{options.workers} workers, {seconds:g} s a shard ...", file=sys.stderr)
        rows.append(simulate(options.workers, options.shards, seconds))
    result = {"machine": machine(), "versions": versions("pissa_hub", "torch"), "rows": rows}
    print(_summary(result))
    if options.json:
        save(options.json, result, _summary(result))


if __name__ == "__main__":
    main()
