"""Tasks of SLURM, which nobody starts anew: the bytes of one, whoever dies, and one voice."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pissa_hub import decompose

from ..helpers import files_of
from .processes import as_slurm, ended
from .watch import Kill, Watch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


@pytest.mark.parametrize("units", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_tasks_survive_one_of_them(sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path, units: int) -> None:
    """What it had in hand is done by the others."""
    watch = Watch(tmp_path / "log", Kill(1, units, sync=4), {"shared.GRACE_SECONDS": 5.0})
    found = ended(as_slurm(watch, 3, ["decompose", sharded, "-o", tmp_path / "out", "--rank", "4"]))
    assert [code for code, _, _ in found] == [0, -signal.SIGKILL, 0], found
    assert [bool(out) for _, out, _ in found] == [True, False, False]
    assert watch.is_killed()
    assert watch.done(0)
    assert watch.done(2)
    assert set(watch.done()) == {path.name for path in sharded.glob("*.safetensors")}
    assert files_of(tmp_path / "out") == sharded_by_one


@pytest.mark.slow
def test_tasks_end_if_rank_0_is_killed(sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path) -> None:
    watch = Watch(tmp_path / "log", Kill(0, units=1, sync=4))
    leader, other = ended(as_slurm(watch, 2, ["decompose", sharded, "-o", tmp_path / "out", "--rank", "4"]))
    assert leader == (-signal.SIGKILL, "", "")
    assert watch.is_killed()
    code, out, err = other
    assert (code, out) == (1, "")
    assert err == "error: the rendezvous store is gone, as if rank 0 had died; run the same command again to carry on\n"
    decompose(sharded, tmp_path / "out", rank=4)
    assert files_of(tmp_path / "out") == sharded_by_one


def test_bad_input_ends_all_and_leaves_nothing(sharded: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(sharded, tmp_path / "source"))
    path = min(bad.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    watch = Watch(tmp_path / "log")
    found = ended(as_slurm(watch, 2, ["decompose", bad, "-o", tmp_path / "out", "--rank", "4"]))
    for code, out, err in found:
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: .*; \S.*\n", err), err
    assert any("NaN" in err for _, _, err in found)
    assert watch.ranks_at_work() == {0, 1}
    assert not (tmp_path / "out").exists()
