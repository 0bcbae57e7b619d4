"""The command line in processes that start in milliseconds: forked from one that has imported all of it.

``python -m tests.faults.server SOURCE`` takes requests as lines of JSON on its input and answers on its output;
:class:`Server` is the other end. With a :class:`Run` as JSON for SOURCE it is that one run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .operations import Fault, Recorder, Spoiler, watched

ROOT = Path(__file__).resolve().parents[2]
_WAIT_SECONDS = 0.002


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
    """How it ended: exit code or negative signal, what it said, the operations that it began, how long it took."""

    code: int
    out: str
    err: str
    operations: list[str]
    reads: list[str]
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
        return Ended(process.returncode, out, err, **_logged(log), seconds=time.perf_counter() - start)


def _logged(log: Path) -> dict[str, list[str]]:
    """Operations and reads, as far as a run noted them."""
    lines = log.read_text().splitlines() if log.exists() else []
    names: dict[str, list[str]] = {"operations": [], "reads": []}
    for line in lines:
        kind, _, name = line.partition(" ")
        names[kind].append(name)
    return names


def _run_here(run: Run, log: Path) -> NoReturn:
    """The command line in this process, spoiled as asked for."""
    from pissa_hub.cli import main

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


def _fork(run: Run, folder: Path) -> int:
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
        _run_here(run, folder / "log")
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
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
        start = time.perf_counter()
        alive = {_fork(run, folder): number for number, (run, folder) in enumerate(zip(runs, folders, strict=True))}
        due = {process: start + (runs[number].kill_after or 1e9) for process, number in alive.items()}
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
                ended[alive.pop(process)] = code, time.perf_counter() - start
                if code < 0:
                    due = {other: min(at, time.perf_counter() + request["grace"]) for other, at in due.items()}
            time.sleep(_WAIT_SECONDS)
        return [
            asdict(
                Ended(
                    ended[number][0],
                    (folder / "out").read_text(),
                    (folder / "err").read_text(),
                    **_logged(folder / "log"),
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
    import pissa_hub.adapter.convert
    import pissa_hub.adapter.merge
    import pissa_hub.adapter.restore
    import pissa_hub.report  # noqa: F401
    from pissa_hub.pipeline.decompose import plan_decomposition
    from pissa_hub.pipeline.settings import Settings

    plan_decomposition(Path(sys.argv[1]), Settings())
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)
    os._exit(0)  # without the seconds that it takes to forget all that was imported


if __name__ == "__main__":
    main()
