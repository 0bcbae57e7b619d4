"""Kill runs anywhere, run them again, and compare every byte with an uninterrupted run's.

    python -m benchmarks.kills --points 200 --processes 1,2,3 --json benchmarks/results/kills.json

Each command is killed (SIGKILL) before every step that commits something by name, after the last of them, and at
random: at a random time, and before or after a random one of its operations. Some of the runs that carry on are
killed, too. With several processes, which share the work as under SLURM, a random choice of them is killed, and all
start again. Processes are forked from one that has imported the program; ``--alone`` points start an interpreter of
their own. For Linux.
"""

from __future__ import annotations

import argparse
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
# The whole job is killed; or what is left of it has time to notice, or to do all the work.
_GRACES = (0.0, 0.5, 5.0)


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
    grace: float = 0.2

    def __str__(self) -> str:
        where = (
            f"{'after' if self.fault.after else 'before'} {self.fault.at}" if self.fault else f"{self.seconds:.3f} s"
        )
        return where if self.ranks == (0,) else f"{where}, ranks {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Result:
    """What came of one point.

    Attributes:
        points: where the run was killed, and the runs that carried on, in turn.
        kills: how many of them struck before the run was through.
        failure: what was wrong in the end; None if every byte is that of an uninterrupted run.
    """

    points: tuple[Point, ...]
    kills: int
    failure: str | None


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run: its files, its operations in order, and how long it took."""

    files: dict[str, bytes]
    operations: list[str]
    seconds: float


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
        """An uninterrupted run. Raises RuntimeError if it fails."""
        with self._output() as root:
            start = time.perf_counter()
            ended = self._run(root)
            for process in ended:
                if process.code:
                    raise RuntimeError(f"{self._command}: exit {process.code}\n{process.err}")
            return Reference(files_of(root), ended[0].operations, time.perf_counter() - start)

    def attempt(self, points: Sequence[Point], reference: Reference) -> Result:
        """Kill a run at the first point, the run that carries on at the second, and let the last one end."""
        kills = 0
        with self._output() as root:
            for point in points:
                ended = self._run(root, point)
                codes = [process.code for process in ended]
                kills += KILLED in codes
                if any(code not in (0, KILLED, *([1] if KILLED in codes else [])) for code in codes):
                    return Result(tuple(points), kills, f"exit {codes}: {_said(ended)}")
            ended = self._run(root)
            if any(process.code for process in ended):
                failure: str | None = f"exit {[process.code for process in ended]}: {_said(ended)}"
            else:
                failure = _difference(files_of(root), reference.files)
        return Result(tuple(points), kills, failure)

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


def steps(reference: Reference, processes: int) -> list[Point]:
    """Before every operation that is no plain write, and after the last one, whichever process does it."""
    named = [Fault("SIGKILL", name) for name in reference.operations if ": write" not in name]
    last = Fault("SIGKILL", reference.operations[-1], after=True)
    return [Point(fault, None, tuple(range(processes))) for fault in (*named, last)]


def random_points(reference: Reference, processes: int, generator: random.Random) -> Iterator[list[Point]]:
    """Endless: each a chain of one point or more, half of them at times and half at operations."""
    while True:
        chain: list[Point] = []
        while not chain or (len(chain) < _LONGEST_CHAIN and generator.random() < _CHAINED):
            ranks = tuple(sorted(generator.sample(range(processes), generator.randint(1, processes))))
            grace = generator.choice(_GRACES)
            if generator.random() < 0.5:
                chain.append(Point(None, generator.uniform(0, reference.seconds), ranks, grace))
            else:
                at = generator.randint(1, len(reference.operations))
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
    return " | ".join(process.err.strip()[-500:] for process in ended)


def campaign(
    harness: Harness,
    one: Reference,
    points: int,
    processes: int,
    generator: random.Random,
    *,
    by_name: bool = True,
) -> dict[str, Any]:
    """Kill at every named step and at random points; figures of both, and every failure.

    Args:
        harness: of the command in so many ``processes``.
        one: the uninterrupted run in one process, whose files all runs have to leave.
        points: random ones that strike before the run is through.
        processes: how many.
        generator: of the points.
        by_name: at named steps, too.
    """
    reference = replace(one, seconds=harness.reference().seconds)
    start = time.perf_counter()
    named = [harness.attempt([point], reference) for point in (steps(reference, processes) if by_name else [])]
    chains = random_points(reference, processes, generator)
    drawn: list[Result] = []
    while sum(result.kills > 0 for result in drawn) < points:
        drawn.append(harness.attempt(next(chains), reference))
    return {
        "operations": len(reference.operations),
        "steps": _figures(named),
        "random": _figures(drawn),
        "failures": [f"{'; '.join(map(str, done.points))}: {done.failure}" for done in named + drawn if done.failure],
        "seconds": time.perf_counter() - start,
    }


def _figures(results: Sequence[Result]) -> dict[str, int]:
    return {
        "points": len(results),
        "equal": sum(result.failure is None for result in results),
        "kills": sum(result.kills for result in results),
        "chains": sum(len(result.points) > 1 for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--points", type=int, default=200, help="random ones that strike, shared out among commands and processes"
    )
    parser.add_argument("--processes", default="1", metavar="N,N")
    parser.add_argument("--command", choices=[*COMMANDS, "all"], default="all")
    parser.add_argument("--alone", type=int, default=2, help="points of each command in an interpreter of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    commands = COMMANDS if options.command == "all" else (options.command,)
    counts = [int(count) for count in options.processes.split(",")]
    # convert is one process, whatever is asked for.
    cases = [(command, count) for count in counts for command in commands if count == 1 or command != "convert"]
    generator = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        source = write_source(folder / "source")
        with Server(source) as server:
            inputs = make_inputs(server, source, folder)
            for number, (command, count) in enumerate(cases):
                points = options.points // len(cases) + (number < options.points % len(cases))
                harness = Harness(server.run, inputs, command, count, folder)
                one = Harness(server.run, inputs, command, 1, folder).reference()
                rows.append({"command": command, "processes": count, "start": "forked"})
                rows[-1] |= campaign(harness, one, points, count, generator)
                print(_line(rows[-1]), *rows[-1]["failures"], sep="\n", flush=True)
                if options.alone and count == 1:
                    alone = Harness(lambda run, grace: [run_alone(run)], inputs, command, count, folder)
                    rows.append({"command": command, "processes": count, "start": "its own interpreter"})
                    rows[-1] |= campaign(alone, one, options.alone, count, generator, by_name=False)
                    print(_line(rows[-1]), *rows[-1]["failures"], sep="\n", flush=True)
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


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['command']}, {row['processes']} x {row['start']}: "
        f"{row['steps']['equal']} of {row['steps']['points']} named steps, "
        f"{row['random']['equal']} of {row['random']['points']} random points equal, "
        f"{row['steps']['kills'] + row['random']['kills']} kills in {row['seconds']:.0f} s"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["command", "processes", "start", "operations", "named steps equal", "random points equal", "kills"]
    return markdown_table(
        header,
        [
            [
                row["command"],
                str(row["processes"]),
                row["start"],
                str(row["operations"]),
                f"{row['steps']['equal']} of {row['steps']['points']}",
                f"{row['random']['equal']} of {row['random']['points']}",
                str(row["steps"]["kills"] + row["random"]["kills"]),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
