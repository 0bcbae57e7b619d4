"""Several processes on one job: the bytes of one, whoever dies, and one voice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import decompose, merge, restore
from pissa_hub.errors import PlanError
from pissa_hub.pipeline import pieces, share
from pissa_hub.pipeline.shared import Shared

from ..conftest import SHARDED, Factory
from ..helpers import MANIFEST, ROOT, files_of
from ..interrupted import receipts_in, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

# The command line in a process that may be slow, and then waits for the others to come before it begins; or that kills
# itself, if its rank is the one that is meant. It does not wait long for the dead.
_PROGRAM = """
import os, signal, sys, time
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command line has it
from pissa_hub import cli
from pissa_hub.pipeline import pieces, shared

shared.GRACE_SECONDS = 3.0
shared.JOIN_SECONDS = 60.0
pieces.MIN_PIECE_BYTES = int(os.environ.get("PIECE", 1 << 24))
rank, first = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
fsync, calls = os.fsync, 0
def faulty(descriptor):
    global calls
    calls += 1
    if first and rank == os.environ.get("KILL_RANK") and calls == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("SLOW"):
        time.sleep(float(os.environ["SLOW"]))
    fsync(descriptor)
os.fsync = faulty

units = shared.Shared.units
def together(process, *arguments):
    while len(process._store.names("joined")) < process.processes - 1:
        time.sleep(0.01)
    yield from units(process, *arguments)
if os.environ.get("SLOW"):
    shared.Shared.units = together

if os.environ.get("TELL"):
    reach = shared.reach_store
    def reaching(*arguments):
        print("reaching", file=sys.stderr, flush=True)
        return reach(*arguments)
    shared.reach_store = reaching
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As torchrun gives each process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint(shard_size=SHARDED)


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> dict[str, bytes]:
    """All files of a run by one process."""
    output = tmp_path_factory.mktemp("reference") / "out"
    decompose(source, output, rank=4)
    return files_of(output)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(_PROGRAM)
    return path


def environment(**more: str | int) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not re.match("SLURM_|RANK$|WORLD_SIZE$", name)}
    return {
        **plain,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **{key: str(value) for key, value in more.items()},
    }


def start(command: list[str | Path], **more: str | int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), env=environment(**more), stdout=pipe, stderr=pipe, text=True)


def torchrun(program: Path, processes: int, *arguments: str | Path, restarts: int = 0, **more: str | int) -> str:
    """Runs to a good end; what it printed on stdout."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = start([*launcher, "--max-restarts", str(restarts), program, *arguments], **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def as_slurm(
    program: Path, processes: int, arguments: list[str | Path], **more: str | int
) -> list[subprocess.Popen[str]]:
    """The tasks of a step, as srun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    step = {
        "SLURM_STEP_NUM_TASKS": processes,
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": 7,
        "MASTER_PORT": port,
    }
    return [
        start([sys.executable, program, *arguments], **step, SLURM_PROCID=rank, SLURM_LOCALID=rank, **more)
        for rank in range(processes)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit codes and what was printed."""
    printed = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, printed, strict=True)]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process finishes of a job that it shares: it waits for its helpers to come, and is slower than they."""
    names: list[str] = []
    units, add = Shared.units, share.Share.add

    def together(shared: Shared, *arguments: Any) -> Iterator[int]:
        while len(shared._store.names("joined")) < shared.processes - 1:
            time.sleep(0.01)
        yield from units(shared, *arguments)

    def slowly(own: share.Share[Any], name: str, *arguments: Any) -> None:
        names.append(name)
        time.sleep(0.2)
        add(own, name, *arguments)

    monkeypatch.setattr(Shared, "units", together)
    monkeypatch.setattr(share.Share, "add", slowly)
    return names


def test_devices_share_the_work(
    source: Path, reference: dict[str, bytes], tmp_path: Path, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole shards here."""
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 1 << 30)
    outcome = decompose(source, tmp_path / "out", devices="cpu,cpu", rank=4)
    assert files_of(tmp_path / "out") == reference
    assert 0 < len(own) < len(list(source.glob("*.safetensors")))
    assert not outcome.was_finished
    assert decompose(source, tmp_path / "out", devices="cpu,cpu", rank=4).was_finished
    assert torch.get_num_threads() == 1


def test_devices_share_one_large_shard(
    tiny_checkpoint: Factory, tmp_path: Path, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 20_000)
    source = tiny_checkpoint()
    decompose(source, tmp_path / "one", rank=4)
    own.clear()
    decompose(source, tmp_path / "two", devices="cpu,cpu", rank=4)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    made = {int(name.split(".")[-2]) for name in own if name.endswith(".piece")}
    assert made
    assert made < set(range(max(made) + 2))  # the helper has the others


def test_merge_and_restore_share_the_work_too(
    source: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decompose(source, tmp_path / "out", rank=4)
    init = tmp_path / "out" / "pissa_init"
    merge(tmp_path / "out", init, tmp_path / "one")
    merge(tmp_path / "out", init, tmp_path / "two", devices="cpu,cpu")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    restore(source, tmp_path / "out", tmp_path / "restored", devices="cpu,cpu")
    assert files_of(tmp_path / "restored") == reference


@pytest.mark.parametrize("devices", ["", "cpu,", "cpu,,cpu", "cpu,abacus", "0,1"])
def test_devices_that_there_are_not(source: Path, tmp_path: Path, devices: str) -> None:
    with pytest.raises(PlanError, match="cannot be used"):
        decompose(source, tmp_path / "out", devices=devices, rank=4)
    assert not (tmp_path / "out").exists()


def test_publishing_takes_one_process(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="several processes cannot publish while they work; publish the finished"):
        decompose(source, tmp_path / "out", devices="cpu,cpu", publish="a/b", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "processes", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_torchrun_gives_the_bytes_of_one(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path, processes: int
) -> None:
    out = torchrun(program, processes, "decompose", source, "-o", tmp_path / "out", "--rank", "4", "--format", "json")
    assert files_of(tmp_path / "out") == reference
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_starts_a_killed_worker_anew(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path, rank: int
) -> None:
    """Its store keeps what was handed out before; nothing may be missing because of that."""
    arguments = ["decompose", source, "-o", tmp_path / "out", "--rank", "4"]
    torchrun(program, 2, *arguments, restarts=2, KILL_RANK=rank, KILL_AT=9, PIECE=20_000)
    assert files_of(tmp_path / "out") == reference


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_on_two_machines_starts_a_killed_worker_anew(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path, rank: int
) -> None:
    """Only the agent whose worker died counts a restart."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command: list[str | Path] = [program, "decompose", source, "-o", tmp_path / "out", "--rank", "4"]
    agents = [start([*launcher, *meeting, *command], KILL_RANK=rank, KILL_AT=9) for _ in range(2)]
    found = ended(agents)
    assert [code for code, _, _ in found] == [0, 0], found
    assert files_of(tmp_path / "out") == reference


def test_waiting_for_rank_0_can_be_interrupted(program: Path, source: Path, tmp_path: Path) -> None:
    nobody = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command: list[str | Path] = [sys.executable, program, "decompose", source, "-o", tmp_path / "out", "--rank", "4"]
    process = start(command, TELL=1, **nobody)
    assert process.stderr is not None
    assert process.stderr.readline() == "reaching\n"
    process.send_signal(signal.SIGINT)
    ((code, _, err),) = ended([process])
    assert code == 130
    assert err.strip() == "interrupted; run the same command again to carry on"


def test_tasks_of_slurm_survive_one_of_them(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Its shards are done by the others."""
    arguments: list[str | Path] = ["decompose", source, "-o", tmp_path / "out", "--rank", "4"]
    tasks = as_slurm(program, 3, arguments, SLOW="0.05")
    wait_until(lambda: bool(receipts_in(tmp_path / "out")), tasks[0])
    tasks[1].kill()
    found = ended(tasks)
    assert [code for code, _, _ in found] == [0, -signal.SIGKILL, 0], found
    assert [bool(out) for _, out, _ in found] == [True, False, False]
    assert files_of(tmp_path / "out") == reference


@pytest.mark.slow
def test_tasks_of_slurm_end_if_rank_0_is_killed(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["decompose", source, "-o", tmp_path / "out", "--rank", "4"]
    tasks = as_slurm(program, 2, arguments, SLOW="0.3")
    wait_until(lambda: bool(receipts_in(tmp_path / "out")), tasks[0])
    tasks[0].kill()
    code, out, err = ended(tasks)[1]
    assert (code, out) == (1, "")
    assert err == "error: the rendezvous store is gone, as if rank 0 had died; run the same command again to carry on\n"
    decompose(source, tmp_path / "out", rank=4)
    assert files_of(tmp_path / "out") == reference


def test_bad_input_ends_all_and_leaves_nothing(program: Path, source: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(source, tmp_path / "source"))
    path = max(bad.glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    found = ended(as_slurm(program, 2, ["decompose", bad, "-o", tmp_path / "out", "--rank", "4"]))
    for code, out, err in found:
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: .*; \S.*\n", err), err
    assert any("NaN" in err for _, _, err in found)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stopped_run_takes_its_helpers_with_it(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path, how: int, code: int
) -> None:
    output = tmp_path / "out"
    process = start(
        [sys.executable, program, "decompose", source, "-o", output, "--rank", "4", "--devices", "cpu,cpu"], SLOW="0.2"
    )
    wait_until(lambda: bool(receipts_in(output)), process)
    helpers = children_of(process.pid)
    process.send_signal(how)
    ((found, out, err),) = ended([process])
    assert (found, out) == (code, "")
    how_it_ended = "interrupted" if how == signal.SIGINT else "terminated"
    assert err.strip() == f"{how_it_ended}; run the same command again to carry on"
    assert helpers
    assert not any(map(is_running, helpers))
    decompose(source, output, rank=4)
    assert files_of(output) == reference


def test_a_killed_run_takes_its_helpers_with_it(program: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(
        [sys.executable, program, "decompose", source, "-o", output, "--rank", "4", "--devices", "cpu,cpu"], SLOW="0.2"
    )
    wait_until(lambda: bool(receipts_in(output)), process)
    helpers = children_of(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert helpers
    for _ in range(1000):
        if not any(map(is_running, helpers)):
            return
        time.sleep(0.01)
    raise AssertionError("a helper lives on")


def test_a_killed_helper_is_stood_in_for(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(
        [sys.executable, program, "decompose", source, "-o", output, "--rank", "4", "--devices", "cpu,cpu"], SLOW="0.1"
    )
    wait_until(lambda: bool(receipts_in(output)), process)
    (helper,) = children_of(process.pid)
    os.kill(helper, signal.SIGKILL)
    ((code, _, err),) = ended([process])
    assert code == 0, err
    assert err.splitlines() == ["note: the process for cpu died (signal 9); the others do its work"]
    assert files_of(output) == reference


def test_the_second_run_on_a_folder_is_refused(
    program: Path, source: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command: list[str | Path] = [sys.executable, program, "decompose", source, "-o", output, "--rank", "4"]
    first = start(command, SLOW="0.1")
    wait_until(lambda: (output / ".pissa" / "plan.json").exists(), first)
    ((code, out, err),) = ended([start(command)])
    assert (code, out) == (1, "")
    fact = f"{output} is being written by process {first.pid} on {socket.gethostname()}"
    assert err == f"error: {fact}; wait for it, or stop it and run this command again\n"
    ((code, _, err),) = ended([first])
    assert code == 0, err
    assert files_of(output) == reference


def children_of(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(path.parent.name))
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_carries_on_with_the_pieces_of_several(
    program: Path, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    source, output = tiny_checkpoint(), tmp_path / "out"
    command: list[str | Path] = [sys.executable, program, "decompose", source, "-o", output, "--rank", "4"]
    process = start([*command, "--devices", "cpu,cpu"], PIECE=20_000, SLOW="0.1")
    wait_until(lambda: len(receipts_in(output)) > 2, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (output / MANIFEST).exists()
    kept = {path: path.stat().st_ino for path in output.glob(".pissa/*.piece")}
    ((code, _, err),) = ended([start(command, PIECE=20_000, SLOW="0.0")])
    assert code == 0, err
    assert kept
    decompose(source, tmp_path / "fresh", rank=4)
    assert files_of(output) == files_of(tmp_path / "fresh")
