"""The command line in processes that start in milliseconds: forked from one that has imported all of it.

``python -m tests.faults.server SOURCE`` takes requests as lines of JSON on its input and answers on its output;
:class:`Server` is the other end. With a :class:`Run` as JSON for SOURCE it is that one run.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .operations import Fault, Recorder, Spoiler, watched

ROOT = Path(__file__).resolve().parents[2]
_WAIT_SECONDS = 0.002
# Whatever has not ended by then hangs, and is killed.
_LONGEST_SECONDS = 300.0
# Of processes that share work: small shards are cut, and the dead are not waited for long.
_MIN_PIECE_BYTES = 24_000
_HEARTBEAT_SECONDS = 0.02
_GRACE_SECONDS = 2.0
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Run:
    """One process to start.

    Attributes:
        arguments: of the command line.
        root: folder in and below which operations count.
        fault: what goes wrong.
        environment: variables to set.
        kill_after: seconds until it is killed.
        inputs: folders of which the reads count, too.
        record: file for all that is done, as a ``Recorder`` writes it; instead of a fault.
        clock: seconds by which this process is ahead of the time.
    """

    arguments: tuple[str, ...]
    root: str
    fault: Fault = field(default_factory=Fault)
    environment: Mapping[str, str] = field(default_factory=dict)
    kill_after: float | None = None
    inputs: tuple[str, ...] = ()
    record: str | None = None
    clock: float = 0.0


@dataclass(frozen=True)
class Ended:
    """How it ended.

    Attributes:
        code: exit code or negative signal.
        out, err: what it said.
        operations, reads: that it began.
        begun: seconds until the first operation.
        seconds: that it took.
    """

    code: int
    out: str
    err: str
    operations: list[str]
    reads: list[str]
    begun: float
    seconds: float


class Server:
    """The forking process; for one thread, closed by leaving ``with``.

    Args:
        source: checkpoint to plan once, so that what planning imports is there.
        environment: variables to set.
    """

    def __init__(self, source: Path, **environment: str) -> None:
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", str(source)],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *runs: Run, grace: float = 60.0) -> list[Ended]:
        """Start processes at once, and wait for all; ``grace`` seconds after one was killed the others are, too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"runs": [asdict(run) for run in runs], "grace": grace}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server is gone, exit {self._process.wait()}")
        return [Ended(**ended) for ended in json.loads(answer)]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def run_alone(run: Run) -> Ended:
    """One run in a process of its own, from the interpreter's start."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", json.dumps({"run": asdict(run), "log": str(log)})],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **run.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=run.kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        return Ended(process.returncode, out, err, **_logged(log, start), seconds=time.perf_counter() - start)


def _logged(log: Path, start: float) -> dict[str, Any]:
    """Operations and reads, as far as a run that began at ``start`` noted them."""
    lines = [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []
    names = {key: [name for kind, _, name in lines if kind == key] for key in ("operations", "reads")}
    times = [float(at) for kind, at, _ in lines if kind == "operations"]
    return {**names, "begun": min(times, default=start) - start}


class Turns:
    """Units of work are dealt out in turn to processes that were forked from this one, until one of them ends.

    All are at work then, and each does the same in every run. For fewer than 254 units each.

    Args:
        processes: how many.
    """

    _GONE = 255

    def __init__(self, processes: int) -> None:
        # A byte of each, in memory that all see: 0 before it has come, and then one more than it has taken.
        self._taken = mmap.mmap(-1, processes)
        self._processes = processes

    def leave(self, rank: int) -> None:
        """A process takes no more, or has ended."""
        self._taken[rank] = self._GONE

    def deal(self, rank: int) -> None:
        """Let this process have its share once all have come, and no more."""
        from pissa_hub.pipeline.shared import Shared

        units = Shared.units

        def in_turn(shared: Shared, count: int, needs: Mapping[int, Sequence[int]]) -> Iterator[int]:
            offered = units(shared, count, needs)
            self._taken[rank] = 1
            try:
                while True:
                    while not self._may_take(rank, shared, count - len(needs)):
                        time.sleep(_WAIT_SECONDS)
                    if (unit := next(offered, None)) is None:
                        return
                    self._taken[rank] += 1
                    yield unit
            finally:
                self.leave(rank)

        setattr(Shared, "units", in_turn)  # noqa: B010  # mypy guards the class's own method

    def _may_take(self, rank: int, shared: Any, at_once: int) -> bool:
        """Whether it is this one's turn; what is made of other units is not dealt out before all of these are done."""
        taken = list(self._taken[: self._processes])
        if not min(taken) or taken.index(min(taken)) != rank:
            return False
        dealt = sum(taken) - self._processes
        return dealt < at_once or self._GONE in taken or len(set(shared._store.names("done"))) >= at_once


def _run_here(run: Run, log: Path, turns: Turns | None = None) -> NoReturn:
    """The command line in this process, spoiled as asked for; with others if it is to take turns."""
    from pissa_hub.cli import main
    from pissa_hub.pipeline import pieces, shared

    if turns is not None:
        pieces.MIN_PIECE_BYTES = _MIN_PIECE_BYTES
        shared.HEARTBEAT_SECONDS, shared.GRACE_SECONDS = _HEARTBEAT_SECONDS, _GRACE_SECONDS
        shared.JOIN_SECONDS = _JOIN_SECONDS
        turns.deal(int(run.environment["RANK"]))
    # A kill leaves alone what is on its way to the disk.
    os.fsync = lambda fd: None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    now = time.time
    time.time = lambda: now() + run.clock
    folders = [Path(run.root), *map(Path, run.inputs)]
    with log.open("w", buffering=1) as lines, Path(run.record or os.devnull).open("w") as record:
        spoiler, recorder = Spoiler(Path(run.root), run.fault, lines), Recorder(record)
        with watched(folders, spoiler.before, recorder.after if run.record else spoiler.after):
            main(run.arguments)


def _fork(run: Run, folder: Path, turns: Turns | None) -> int:
    """Start a run; returns its process, the first of a group."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        os.environ.update(run.environment)
        for descriptor, name in ((0, os.devnull), (1, folder / "out"), (2, folder / "err")):
            opened = os.open(name, os.O_RDWR)
            os.dup2(opened, descriptor)
            os.close(opened)
        _run_here(run, folder / "log", turns)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:  # printed, and told by the exit code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    runs = [_run_of(table) for table in request["runs"]]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(number)) for number in range(len(runs))]
        for folder in folders:
            folder.mkdir()
            for name in ("out", "err"):
                (folder / name).touch()
        turns = Turns(len(runs)) if "RANK" in runs[0].environment else None
        start = time.perf_counter()
        alive = {
            _fork(run, folder, turns): number for number, (run, folder) in enumerate(zip(runs, folders, strict=True))
        }
        due = {process: start + (runs[number].kill_after or _LONGEST_SECONDS) for process, number in alive.items()}
        ended: dict[int, tuple[int, float]] = {}
        while alive:
            for process in list(alive):
                if time.perf_counter() > due[process]:
                    _kill(process)
                    due[process] = float("inf")
                if not _has_ended(process):
                    continue
                _kill(process)  # with what it started, while its number is still its own
                status = os.waitpid(process, 0)[1]
                code = os.waitstatus_to_exitcode(status)
                number = alive.pop(process)
                ended[number] = code, time.perf_counter() - start
                if turns is not None:
                    turns.leave(number)
                if code < 0:
                    due = {other: min(at, time.perf_counter() + request["grace"]) for other, at in due.items()}
            time.sleep(_WAIT_SECONDS)
        return [
            asdict(
                Ended(
                    ended[number][0],
                    (folder / "out").read_text(),
                    (folder / "err").read_text(),
                    **_logged(folder / "log", start),
                    seconds=ended[number][1],
                )
            )
            for number, folder in enumerate(folders)
        ]


def _has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(process: int) -> None:
    """A run with all that it started."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def _run_of(table: Mapping[str, Any]) -> Run:
    return Run(**{**table, "arguments": tuple(table["arguments"]), "fault": Fault(**table["fault"])})


def main() -> None:
    if sys.argv[1].startswith("{"):
        table = json.loads(sys.argv[1])
        _run_here(_run_of(table["run"]), Path(table["log"]))
    import torch.distributed  # noqa: F401  # its import would count as the run's own

    import pissa_hub.adapter.convert
    import pissa_hub.adapter.merge
    import pissa_hub.adapter.restore
    import pissa_hub.report  # noqa: F401  # imported once for all that are forked
    from pissa_hub.pipeline.decompose import plan_decomposition
    from pissa_hub.pipeline.settings import Settings

    plan_decomposition(Path(sys.argv[1]), Settings())
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
    os._exit(0)  # without the seconds that it takes to forget all that was imported


if __name__ == "__main__":
    main()
