"""``--devices``: this process and its helpers give the bytes of one, whoever dies, and leave nobody behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_hub import decompose, merge, restore
from pissa_hub.errors import PlanError
from pissa_hub.pipeline import pieces
from pissa_hub.pipeline.decompose import plan_decomposition
from pissa_hub.pipeline.receipts import WorkFolder
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.workers import Decomposer

from ..conftest import Factory
from ..helpers import MANIFEST, files_of
from ..interrupted import receipts_in, wait_until
from .processes import COMMAND, ended, start, watched_here
from .watch import Kill, Watch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

SMALL_PIECES = {"pieces.MIN_PIECE_BYTES": 20_000}
NO_PIECES = {"pieces.MIN_PIECE_BYTES": 1 << 30}


def on_two_devices(watch: Watch, source: Path, output: Path) -> subprocess.Popen[str]:
    return start(watch, [*COMMAND, "decompose", source, "-o", output, "--rank", "4", "--devices", "cpu,cpu"])


def held_at_work(watch: Watch, source: Path, output: Path) -> subprocess.Popen[str]:
    """A run whose two processes have done a unit each, and do no more by themselves."""
    watch.hold()
    process = on_two_devices(watch, source, output)
    wait_until(lambda: watch.ranks_at_work() == {0, 1}, process)
    assert watch.living() == 2
    assert len(receipts_in(output)) == 2
    return process


def test_devices_share_the_work(sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path) -> None:
    """Whole shards here."""
    output = tmp_path / "out"
    with watched_here(Watch(tmp_path / "log", constants=NO_PIECES)) as watch:
        outcome = decompose(sharded, output, devices="cpu,cpu", rank=4)
        assert files_of(output) == sharded_by_one
        assert watch.ranks_at_work() == {0, 1}
        assert sorted(watch.done()) == sorted(path.name for path in sharded.glob("*.safetensors"))
        assert not outcome.was_finished
        assert decompose(sharded, output, devices="cpu,cpu", rank=4).was_finished
    assert torch.get_num_threads() == 1


def test_devices_share_one_large_shard(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    with watched_here(Watch(tmp_path / "log", constants=SMALL_PIECES)) as watch:
        decompose(source, tmp_path / "two", devices="cpu,cpu", rank=4)
    decompose(source, tmp_path / "one", rank=4)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    (shard,) = plan_decomposition(source, Settings(rank=4)).shards
    made = {rank: {name for name in watch.done(rank) if name.endswith(".piece")} for rank in (0, 1)}
    assert made[0]
    assert made[1]
    assert made[0].isdisjoint(made[1])
    assert made[0] | made[1] == {piece.name for piece in pieces.cut(shard, 20_000)}
    assert sorted(watch.done()) == sorted([*made[0], *made[1], shard.name])


def test_merge_and_restore_share_the_work_too(sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path) -> None:
    decompose(sharded, tmp_path / "out", rank=4)
    init = tmp_path / "out" / "pissa_init"
    merge(tmp_path / "out", init, tmp_path / "one")
    with watched_here(Watch(tmp_path / "merge")) as watch:
        merge(tmp_path / "out", init, tmp_path / "two", devices="cpu,cpu")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert watch.ranks_at_work() == {0, 1}
    with watched_here(Watch(tmp_path / "restore")) as watch:
        restore(sharded, tmp_path / "out", tmp_path / "restored", devices="cpu,cpu")
    assert files_of(tmp_path / "restored") == sharded_by_one
    assert watch.ranks_at_work() == {0, 1}


@pytest.mark.parametrize("devices", ["", "cpu,", "cpu,,cpu", "cpu,abacus", "0,1"])
def test_devices_that_there_are_not(sharded: Path, tmp_path: Path, devices: str) -> None:
    with pytest.raises(PlanError, match="cannot be used"):
        decompose(sharded, tmp_path / "out", devices=devices, rank=4)
    assert not (tmp_path / "out").exists()


def test_publishing_takes_one_process(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="several processes cannot publish while they work; publish the finished"):
        decompose(sharded, tmp_path / "out", devices="cpu,cpu", publish="a/b", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stopped_run_takes_its_helpers_with_it(
    sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path, how: int, code: int
) -> None:
    watch, output = Watch(tmp_path / "log"), tmp_path / "out"
    process = held_at_work(watch, sharded, output)
    process.send_signal(how)
    ((found, out, err),) = ended([process])
    assert (found, out) == (code, "")
    how_it_ended = "interrupted" if how == signal.SIGINT else "terminated"
    assert err.strip() == f"{how_it_ended}; run the same command again to carry on"
    assert watch.living() == 0
    decompose(sharded, output, rank=4)
    assert files_of(output) == sharded_by_one


@pytest.mark.parametrize("units", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_helper_is_stood_in_for(
    sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path, units: int
) -> None:
    watch, output = Watch(tmp_path / "log", Kill(1, units, sync=2)), tmp_path / "out"
    ((code, _, err),) = ended([on_two_devices(watch, sharded, output)])
    assert code == 0, err
    assert err.splitlines() == ["note: the process for cpu died (signal 9); the others do its work"]
    assert watch.is_killed()
    assert watch.ranks_at_work() == {0}
    assert files_of(output) == sharded_by_one


def test_a_killed_run_takes_its_helpers_with_it_and_one_process_carries_on(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the pieces of both."""
    source, output, watch = tiny_checkpoint(), tmp_path / "out", Watch(tmp_path / "log", constants=SMALL_PIECES)
    process = held_at_work(watch, source, output)
    process.kill()
    wait_until(lambda: watch.living() == 0)
    process.communicate(timeout=300)
    assert not (output / MANIFEST).exists()

    plan, computed = plan_decomposition(source, Settings(rank=4)), []
    receipts = [WorkFolder(output, plan.digest).read(name) for name in watch.done()]
    kept = [{weight.tensor for weight in receipt.weights} for receipt in receipts if receipt]
    assert len(kept) == 2
    assert all(kept)
    call = Decomposer.__call__

    def noted(worker: Decomposer, weight: Any, data: memoryview) -> Any:
        computed.append(weight.stored.name)
        return call(worker, weight, data)

    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", SMALL_PIECES["pieces.MIN_PIECE_BYTES"])
    monkeypatch.setattr(Decomposer, "__call__", noted)
    decompose(source, output, rank=4)
    everything = {weight.stored.name for weight in plan.weights}
    assert sorted(computed) == sorted(everything - set.union(*kept))
    decompose(source, tmp_path / "fresh", rank=4)
    assert files_of(output) == files_of(tmp_path / "fresh")
