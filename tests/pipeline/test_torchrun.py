"""Processes of torchrun: the bytes of one, also if it has to start them anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..helpers import files_of
from .processes import ended, free_port, under_torchrun
from .watch import Kill, Watch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@pytest.mark.parametrize(
    "processes", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_of_torchrun_give_the_bytes_of_one(
    sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path, processes: int
) -> None:
    watch, output = Watch(tmp_path / "log"), tmp_path / "out"
    launcher = ["--standalone", "--nproc-per-node", str(processes)]
    arguments = ["decompose", sharded, "-o", output, "--rank", "4", "--format", "json"]
    ((code, out, err),) = ended([under_torchrun(watch, launcher, arguments)])
    assert code == 0, err
    assert files_of(output) == sharded_by_one
    assert len(out.splitlines()) == 1
    assert watch.ranks_at_work() == set(range(processes))
    assert sorted(watch.done()) == sorted(path.name for path in sharded.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("rank", "units"), [(0, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 0), (1, 0), (1, 1)))]
)
def test_torchrun_starts_a_killed_worker_anew(
    sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path, rank: int, units: int
) -> None:
    """Its store keeps what was handed out before; nothing may be missing because of that."""
    watch = Watch(tmp_path / "log", Kill(rank, units, sync=3), {"pieces.MIN_PIECE_BYTES": 20_000})
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    arguments = ["decompose", sharded, "-o", tmp_path / "out", "--rank", "4"]
    ((code, _, err),) = ended([under_torchrun(watch, launcher, arguments)])
    assert code == 0, err
    assert watch.is_killed()
    assert watch.ranks_at_work() == {0, 1}
    assert files_of(tmp_path / "out") == sharded_by_one


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_on_two_machines_starts_a_killed_worker_anew(
    sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path, rank: int
) -> None:
    """Only the agent whose worker died counts a restart."""
    watch = Watch(tmp_path / "log", Kill(rank, units=1, sync=3))
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", *meeting]
    arguments = ["decompose", sharded, "-o", tmp_path / "out", "--rank", "4"]
    found = ended([under_torchrun(watch, launcher, arguments) for _ in range(2)])
    assert [code for code, _, _ in found] == [0, 0], found
    assert watch.is_killed()
    assert watch.ranks_at_work() == {0, 1}
    assert files_of(tmp_path / "out") == sharded_by_one
