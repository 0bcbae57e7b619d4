"""Kill runs anywhere, run them again, and compare every byte with an uninterrupted run's.

    python -m benchmarks.kills --points 200 --processes 1,2,3 --json benchmarks/results/kills.json

Each process of each command is killed (SIGKILL) before every step of its own that is no plain write, after the last of
them, and at random: at a random time, and before or after a random one of its operations. Some of the runs that carry
on are killed, too. Several processes share the work as under SLURM. Large shards are cut into pieces, the work is dealt
out in turn, so that all are at work and a step is the same process's in every run; when one is killed before a step of
its own, the others do its work, unless it was rank 0, and at random points a random choice of them is killed. Then all
start again. Processes are forked from one that has imported the program; ``--alone`` points start an interpreter of
their own. For Linux.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.results import machine, markdown_table, save, versions
from tests.faults.inputs import COMMANDS, Inputs, files_of, make_inputs, write_source
from tests.faults.operations import Fault
from tests.faults.server import Ended, Run, Server, run_alone

KILLED = -9
# Of the runs that carry on, how many are killed, too; and how often at most.
_CHAINED = 0.3
_LONGEST_CHAIN = 4
# Seconds in which what is left of a job is through, whether it does all the work or fails; if not, it hangs.
_AMPLE = 60.0
# The whole job is killed; or what is left of it has time to notice, or to do all the work.
_GRACES = (0.0, 0.5, _AMPLE)
_PIECE = re.compile(r"\.pissa/(?P<shard>.+)\.\d{3}\.piece")


@dataclass(frozen=True)
class Point:
    """Where a run is killed.

    Attributes:
        fault: at an operation; or None.
        seconds: after so many of them; or None.
        ranks: the processes that it happens to.
        grace: seconds that the others have from then on, before they are killed, too.
    """

    fault: Fault | None
    seconds: float | None = None
    ranks: tuple[int, ...] = (0,)
    grace: float = _AMPLE

    def __str__(self) -> str:
        where = (
            f"{'after' if self.fault.after else 'before'} {self.fault.at}" if self.fault else f"{self.seconds:.3f} s"
        )
        return where if self.ranks == (0,) else f"{where}, ranks {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Kill:
    """A process that was killed: its rank, and the last operation that it had begun."""

    rank: int
    operation: str


@dataclass(frozen=True)
class Result:
    """What came of one point.

    Attributes:
        points: where the run was killed, and the runs that carried on, in turn.
        kills: those that struck before the process was through.
        failure: what was wrong; None if every byte is that of an uninterrupted run.
    """

    points: tuple[Point, ...]
    kills: tuple[Kill, ...]
    failure: str | None


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        files: that it leaves.
        operations: of each process, in order.
        begun: seconds until all were at work.
        seconds: until all were through.
    """

    files: dict[str, bytes]
    operations: list[list[str]]
    begun: float
    seconds: float

    def part(self, operation: str) -> str:
        """What it belongs to: "pieces" of a shard, their "joins", or "whole" shards and all else."""
        is_of_piece = _PIECE.search(operation) and not operation.endswith(": remove")
        return "pieces" if is_of_piece else "joins" if any(shard in operation for shard in self._cut) else "whole"

    @cached_property
    def _cut(self) -> set[str]:
        """Names of the shards that were cut into pieces."""
        return {found["shard"] for names in self.operations for name in names if (found := _PIECE.search(name))}


class Harness:
    """One command in one number of processes.

    Args:
        start: starts processes and waits for them.
        inputs: of the command.
        command: its name.
        processes: that share the work.
        folder: for outputs.
    """

    def __init__(
        self, start: Callable[..., list[Ended]], inputs: Inputs, command: str, processes: int, folder: Path
    ) -> None:
        self._start = start
        self._inputs = inputs
        self._command = command
        self._processes = processes
        self._folder = folder

    def reference(self) -> Reference:
        """An uninterrupted run. Raises RuntimeError if it fails, or if not all processes were at work."""
        with self._output() as root:
            ended = self._run(root)
            for process in ended:
                if process.code:
                    raise RuntimeError(f"{self._command}: exit {process.code}\n{process.err}")
                if not process.operations:
                    raise RuntimeError(f"{self._command}: one of {self._processes} processes had nothing to do")
            seconds = max(process.seconds for process in ended)
            begun = max(process.begun for process in ended)
            return Reference(files_of(root), [process.operations for process in ended], begun, seconds)

    def attempt(self, points: Sequence[Point], reference: Reference) -> Result:
        """Kill a run at the first point, the run that carries on at the second, and let the last one end."""
        kills: list[Kill] = []
        with self._output() as root:
            for point in points:
                ended = self._run(root, point)
                kills += [
                    Kill(rank, ended[rank].operations[-1] if ended[rank].operations else "nothing")
                    for rank in point.ranks
                    if ended[rank].code == KILLED
                ]
                if not _is_in_order(point, [process.code for process in ended]):
                    return Result(tuple(points), tuple(kills), _said(ended))
            ended = self._run(root)
            if any(process.code for process in ended):
                failure: str | None = _said(ended)
            else:
                failure = _difference(files_of(root), reference.files)
        return Result(tuple(points), tuple(kills), failure)

    def strike(self, point: Point, reference: Reference) -> Result:
        """Kill a run at a named step, which it has to come to, and let another one end."""
        result = self.attempt([point], reference)
        if result.failure is None and [(kill.rank, kill.operation) for kill in result.kills] != [
            (rank, point.fault and point.fault.at) for rank in point.ranks
        ]:
            return replace(result, failure=f"not killed there, but {result.kills}")
        return result

    def _run(self, root: Path, point: Point | None = None) -> list[Ended]:
        arguments = self._inputs.arguments(self._command, root / "out")
        runs = [Run(arguments, str(root), environment=each) for each in _environments(self._processes)]
        for rank in point.ranks if point else ():
            fault = point.fault if point and point.fault else Fault()
            runs[rank] = replace(runs[rank], fault=fault, kill_after=point.seconds if point else None)
        return self._start(*runs, grace=point.grace if point else 0.0)

    @contextmanager
    def _output(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            yield Path(folder)


def steps(reference: Reference) -> list[Point]:
    """Of each process, before every operation of its own that is no plain write, and after the last one."""
    points = []
    for rank, operations in enumerate(reference.operations):
        faults = [Fault("SIGKILL", name) for name in operations if ": write" not in name]
        faults.append(Fault("SIGKILL", operations[-1], after=True))
        points += [Point(fault, None, (rank,)) for fault in faults]
    return points


def random_points(reference: Reference, generator: random.Random) -> Iterator[list[Point]]:
    """Endless: each a chain of one point or more, half of them at times when all are at work and half at operations."""
    processes = len(reference.operations)
    while True:
        chain: list[Point] = []
        while not chain or (len(chain) < _LONGEST_CHAIN and generator.random() < _CHAINED):
            ranks = tuple(sorted(generator.sample(range(processes), generator.randint(1, processes))))
            grace = generator.choice(_GRACES)
            if generator.random() < 0.5:
                chain.append(Point(None, generator.uniform(reference.begun, reference.seconds), ranks, grace))
            else:
                at = generator.randint(1, min(len(reference.operations[rank]) for rank in ranks))
                chain.append(Point(Fault("SIGKILL", at, after=generator.random() < 0.5), None, ranks, grace))
        yield chain


def _environments(processes: int) -> list[dict[str, str]]:
    """What SLURM and torchrun tell each process; nothing where there is one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str | None:
    if found == expected:
        return None
    left, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    other = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    return f"left over: {left}, missing: {missing}, different: {other}"


def _said(ended: Sequence[Ended]) -> str:
    said = " | ".join(process.err.strip()[-500:] for process in ended)
    return f"exit {[process.code for process in ended]}: {said}"


def _is_in_order(point: Point, codes: Sequence[int]) -> bool:
    """Whether all did their work that could: without rank 0 the others fail, and for as long as they have they live."""
    allowed = {0} | ({1} if len(codes) > 1 and codes[0] == KILLED else set())
    was_cut_short = KILLED in codes and point.grace < _AMPLE
    return all(
        code in allowed or (code == KILLED and (rank in point.ranks or was_cut_short))
        for rank, code in enumerate(codes)
    )


def campaign(harness: Harness, one: Reference, points: int, generator: random.Random, every: int) -> dict[str, Any]:
    """Kill at every named step and at random points; figures of both, and every failure.

    Args:
        harness: of the command.
        one: the uninterrupted run in one process, whose files all runs have to leave.
        points: random ones that strike before the run is through.
        generator: of the points.
        every: how many named steps there are to each that is taken; 0 for none.
    """
    reference = harness.reference()
    if different := _difference(reference.files, one.files):
        raise RuntimeError(f"{len(reference.operations)} processes do not leave the bytes of one: {different}")
    start = time.perf_counter()
    named = [harness.strike(point, reference) for point in (steps(reference)[::every] if every else [])]
    chains = random_points(reference, generator)
    drawn: list[Result] = []
    while sum(bool(result.kills) for result in drawn) < points:
        drawn.append(harness.attempt(next(chains), reference))
    return {
        "operations": [len(operations) for operations in reference.operations],
        "steps": _figures(named, reference),
        "random": _figures(drawn, reference),
        "failures": [f"{'; '.join(map(str, done.points))}: {done.failure}" for done in named + drawn if done.failure],
        "seconds": time.perf_counter() - start,
    }


def _figures(results: Sequence[Result], reference: Reference) -> dict[str, Any]:
    kills = [kill for result in results for kill in result.kills]
    parts = Counter(reference.part(kill.operation) for kill in kills)
    return {
        "points": len(results),
        "struck": sum(bool(result.kills) for result in results),
        "equal": sum(result.failure is None for result in results),
        "chains": sum(len(result.points) > 1 for result in results),
        "kills": len(kills),
        "of rank": [sum(kill.rank == rank for kill in kills) for rank in range(len(reference.operations))],
        "in pieces": parts["pieces"],
        "in joins": parts["joins"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--points", type=int, default=200, help="random ones that strike, shared out among commands and processes"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th of the named steps")
    parser.add_argument("--processes", default="1", metavar="N,N")
    parser.add_argument("--command", choices=[*COMMANDS, "all"], default="all")
    parser.add_argument("--alone", type=int, default=2, help="points of each command in an interpreter of its own")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time; much of theirs is waiting for the dead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    commands = COMMANDS if options.command == "all" else (options.command,)
    counts = [int(count) for count in options.processes.split(",")]
    # convert is one process, whatever is asked for.
    cases = [(command, count) for count in counts for command in commands if count == 1 or command != "convert"]
    shares = [options.points // len(cases) + (number < options.points % len(cases)) for number in range(len(cases))]
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        source = write_source(folder / "source")
        with Server(source) as server:
            inputs = make_inputs(server, source, folder)

        def rows_of(case: tuple[str, int], points: int) -> list[dict[str, Any]]:
            with Server(source) as server:
                return _rows(server, inputs, folder, *case, points, options)

        with ThreadPoolExecutor(options.jobs) as pool:
            rows = [row for rows in pool.map(rows_of, cases, shares) for row in rows]
    finally:
        shutil.rmtree(folder)
    if options.json:
        result = {
            "machine": machine(),
            "versions": versions("torch", "transformers", "safetensors", "numpy"),
            "seed": options.seed,
            "rows": rows,
        }
        save(options.json, result, _table(rows))
    sys.exit(any(row["failures"] for row in rows))


def _rows(
    server: Server, inputs: Inputs, folder: Path, command: str, processes: int, points: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A command in so many processes, forked; one process also in an interpreter of its own."""
    one = Harness(server.run, inputs, command, 1, folder).reference()
    ways: list[tuple[str, Callable[..., list[Ended]], int, int]] = [("forked", server.run, points, options.every)]
    if options.alone and processes == 1:
        ways.append(("its own interpreter", lambda run, grace: [run_alone(run)], options.alone, 0))
    rows: list[dict[str, Any]] = []
    for name, start, share, every in ways:
        harness = Harness(start, inputs, command, processes, folder)
        generator = random.Random(f"{options.seed} {command} {processes} {name}")
        row = {"command": command, "processes": processes, "start": name}
        rows.append(row | campaign(harness, one, share, generator, every))
        print(_line(rows[-1]), *rows[-1]["failures"], sep="\n", flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['command']}, {row['processes']} x {row['start']}: "
        f"{row['steps']['struck']} of {row['steps']['points']} named steps and "
        f"{row['random']['struck']} of {row['random']['points']} random points struck, "
        f"{row['steps']['equal']} and {row['random']['equal']} equal, kills: {_sums(row)}, {row['seconds']:.0f} s"
    )


def _sums(row: dict[str, Any]) -> str:
    """Kills in all, and of what."""
    both = row["steps"], row["random"]
    ranks = map(sum, zip(*(figures["of rank"] for figures in both), strict=True))
    kills, pieces, joins = (sum(figures[key] for figures in both) for key in ("kills", "in pieces", "in joins"))
    if row["processes"] == 1:
        return str(kills)
    return f"{kills} (by rank {', '.join(map(str, ranks))}; {pieces} in pieces, {joins} in joins)"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["command", "processes", "start", "operations", "named steps", "random points", "kills"]
    return markdown_table(
        header,
        [
            [
                row["command"],
                str(row["processes"]),
                row["start"],
                " + ".join(map(str, row["operations"])),
                *(
                    f"{figures['points']}, {figures['struck']} struck, {figures['equal']} equal"
                    if figures["points"]
                    else "-"
                    for figures in (row["steps"], row["random"])
                ),
                _sums(row),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
