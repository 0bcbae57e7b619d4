"""Killed at any point, the same command carries on and ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import decompose, verify
from pissa_hub.errors import MatrixError, OutputError, ReadError
from pissa_hub.pipeline.decompose import plan_decomposition, run
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.settings import Settings

from ..conftest import SHARDED, Factory
from ..helpers import MANIFEST, ROOT, files_of, run_cli
from ..interrupted import receipts_in, snapshots_of, unfinished, wait_until, work_done_from

pytestmark = pytest.mark.usefixtures("two_threads")

CPU = torch.device("cpu")
SHARDS = 4
FIRST_RECEIPT = ".pissa/model-00001-of-00004.safetensors.receipt.json"
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

# The command line in a process that halts once it has the file HALT, or kills itself at the fsync KILL_AT.
_PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pissa_hub import cli
from pissa_hub.progress import Bar

advance = Bar.advance
def halting(self, nbytes):
    while os.path.exists(os.environ.get("HALT", "")):
        time.sleep(0.01)
    advance(self, nbytes)
Bar.advance = halting

fsync, calls = os.fsync, 0
def deadly(descriptor):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = deadly
cli.main(sys.argv[1:])
"""


def small(tiny_checkpoint: Factory) -> Path:
    source = tiny_checkpoint(shard_size=SHARDED, num_hidden_layers=1)
    assert len(list(source.glob("*.safetensors"))) == SHARDS
    return source


@pytest.fixture(scope="module")
def reference(
    tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory, two_threads: None
) -> dict[str, bytes]:
    """All files of an uninterrupted run."""
    output = tmp_path_factory.mktemp("reference") / "out"
    decompose(small(tiny_checkpoint), output, rank=4)
    return files_of(output)


@pytest.fixture(scope="module")
def snapshots(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory, two_threads: None) -> list[Path]:
    source = small(tiny_checkpoint)
    taken = snapshots_of(lambda output: decompose(source, output, rank=4), tmp_path_factory.mktemp("snapshots"))
    assert len(taken) > 30
    return taken


def test_every_point_of_a_run_is_one_to_carry_on_from(
    tiny_checkpoint: Factory, snapshots: list[Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    plan = plan_decomposition(small(tiny_checkpoint), Settings(rank=4))

    def carry_on(output: Path) -> int:
        outcome = run(plan, output, [CPU])
        return SHARDS if outcome.was_finished else outcome.carried_over

    carried = work_done_from(snapshots, carry_on, reference, tmp_path)
    assert carried == sorted(carried)
    assert set(carried) == set(range(SHARDS + 1))


def test_work_that_was_done_is_not_done_again(tiny_checkpoint: Factory, snapshots: list[Path], tmp_path: Path) -> None:
    output = unfinished(snapshots, 2, tmp_path / "out")
    done = receipts_in(output)
    before = {name: (output / name).stat().st_ino for name in done}
    outcome = decompose(small(tiny_checkpoint), output, rank=4)
    assert outcome.carried_over == 2
    assert {name: (output / name).stat().st_ino for name in done} == before


def _empty(data: bytes) -> bytes:
    return b""


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _longer(data: bytes) -> bytes:
    return data + b"\0"


@pytest.mark.parametrize("damage", [_empty, _half, _flipped, _longer])
def test_damaged_work_is_redone(
    tiny_checkpoint: Factory,
    snapshots: list[Path],
    reference: dict[str, bytes],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    plan = plan_decomposition(small(tiny_checkpoint), Settings(rank=4))
    names = [
        name for name in files_of(unfinished(snapshots, SHARDS, tmp_path / "whole")) if not name.endswith(".partial")
    ]
    assert sum(name.endswith(".adapter") for name in names) == SHARDS - 1
    names.remove(".pissa/lock")  # nobody holds it
    assert len(names) == 3 * SHARDS
    for number, name in enumerate(names):
        output = unfinished(snapshots, SHARDS, tmp_path / str(number))
        (output / name).write_bytes(damage((output / name).read_bytes()))
        run(plan, output, [CPU])
        assert files_of(output) == reference, name


@pytest.mark.parametrize("pattern", [".pissa/*.receipt.json", ".pissa/*.adapter", "*.safetensors", ".pissa/plan.json"])
def test_lost_work_is_redone(
    tiny_checkpoint: Factory, snapshots: list[Path], reference: dict[str, bytes], tmp_path: Path, pattern: str
) -> None:
    output = unfinished(snapshots, SHARDS, tmp_path / "out")
    min(output.glob(pattern)).unlink()
    decompose(small(tiny_checkpoint), output, rank=4)
    assert files_of(output) == reference


def test_empty_work_folder_gives_no_leave_to_overwrite(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """As a run leaves it that is killed at its first or its last step."""
    output = tmp_path / "out"
    (output / ".pissa").mkdir(parents=True)
    (output / "config.json").write_text("somebody's own")
    with pytest.raises(OutputError, match="is not empty"):
        decompose(small(tiny_checkpoint), output, rank=4)
    assert (output / "config.json").read_text() == "somebody's own"
    (output / "config.json").unlink()
    (output / ".pissa-0a1b2c3d.partial").mkdir()
    decompose(small(tiny_checkpoint), output, rank=4)
    assert not list(output.glob(".pissa*"))


def test_stale_partial_files_are_removed(
    tiny_checkpoint: Factory, snapshots: list[Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = unfinished(snapshots, 1, tmp_path / "out")
    (output / "pissa_init").mkdir(exist_ok=True)
    (output / "1_Pooling").mkdir()
    for name in ("x.partial", "pissa_init/y.1-ab.partial", ".pissa/z.partial", "1_Pooling/config.json.9-cd.partial"):
        (output / name).write_bytes(b"half a file")
    decompose(small(tiny_checkpoint), output, rank=4)
    assert files_of(output) == reference


@pytest.mark.parametrize(
    "settings", [{"rank": 5}, {"seed": 1}, {"alpha": 8}, {"adapter_dtype": "bfloat16"}, {"exclude": "q_proj"}]
)
def test_other_settings_do_not_carry_on(
    tiny_checkpoint: Factory, snapshots: list[Path], tmp_path: Path, settings: dict[str, object]
) -> None:
    output = unfinished(snapshots, 1, tmp_path / "out")
    before = files_of(output)
    with pytest.raises(OutputError, match="unfinished work of another plan"):
        decompose(small(tiny_checkpoint), output, **{"rank": 4, **settings})
    assert files_of(output) == before


def test_other_source_does_not_carry_on(tiny_checkpoint: Factory, snapshots: list[Path], tmp_path: Path) -> None:
    output = unfinished(snapshots, 1, tmp_path / "out")
    before = files_of(output)
    with pytest.raises(OutputError, match="unfinished work of another plan"):
        decompose(tiny_checkpoint(shard_size=SHARDED), output, rank=4)
    assert files_of(output) == before


def test_shards_whose_source_changed_are_redone(
    tiny_checkpoint: Factory, snapshots: list[Path], tmp_path: Path
) -> None:
    """Else the folder would mix two checkpoints, each shard with a sound receipt."""
    output = unfinished(snapshots, 2, tmp_path / "out")
    source = Path(shutil.copytree(small(tiny_checkpoint), tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    decompose(source, output, rank=4)
    decompose(source, tmp_path / "fresh", rank=4)
    assert files_of(output) == files_of(tmp_path / "fresh")
    assert verify(output, source, sample=-1).is_sound


def test_nothing_is_left_if_the_source_turned_bad(
    tiny_checkpoint: Factory, snapshots: list[Path], tmp_path: Path
) -> None:
    """Not even of the files that come after the shards."""
    output = Path(shutil.copytree(snapshots[-3], tmp_path / "out"))
    assert (output / "README.md").exists()
    source = Path(shutil.copytree(small(tiny_checkpoint), tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(MatrixError, match="NaN"):
        decompose(source, output, rank=4)
    assert not list(output.iterdir())


def test_finished_folder_is_left_as_it_is(
    tiny_checkpoint: Factory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, output = small(tiny_checkpoint), tmp_path / "out"
    command = ("decompose", source, "-o", output, "--rank", 4)
    assert run_cli(capfd, *command).code == 0
    before = {name: (output / name).stat() for name in files_of(output)}
    again = run_cli(capfd, *command)
    assert again.code == 0
    assert again.out == f"{output} is finished already: same source, same settings; nothing to do\n"
    assert {name: (output / name).stat() for name in files_of(output)} == before
    outcome = decompose(source, output, rank=4)
    assert outcome.was_finished
    assert outcome.manifest.to_bytes() == (output / MANIFEST).read_bytes()


@pytest.mark.parametrize("settings", [{"rank": 5}, {"seed": 1}, {"alpha": 8.0}, {"rank_pattern": {"q_proj": 2}}])
def test_finished_folder_of_other_settings_is_refused(
    tiny_checkpoint: Factory, reference: dict[str, bytes], tmp_path: Path, settings: dict[str, object]
) -> None:
    source, output = small(tiny_checkpoint), tmp_path / "out"
    decompose(source, output, rank=4)
    with pytest.raises(OutputError, match="another decomposition, of other weights or settings"):
        decompose(source, output, **{"rank": 4, **settings})
    assert files_of(output) == reference


@pytest.mark.parametrize("targeted", [True, False])
def test_finished_folder_of_other_weights_is_refused(tiny_checkpoint: Factory, tmp_path: Path, targeted: bool) -> None:
    source = Path(shutil.copytree(small(tiny_checkpoint), tmp_path / "source"))
    output = tmp_path / "out"
    decompose(source, output, rank=4)
    before = files_of(output)
    changed = "model.layers.0.mlp.up_proj.weight" if targeted else "model.norm.weight"
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if changed in tensors:
            tensors[changed] += 0.5
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(OutputError, match="of other weights or settings"):
        decompose(source, output, rank=4)
    assert files_of(output) == before


def test_finished_folder_of_another_config_is_refused(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(small(tiny_checkpoint), tmp_path / "source"))
    output = tmp_path / "out"
    decompose(source, output, rank=4)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (source / "config.json").read_text() != config
    with pytest.raises(OutputError, match="another decomposition"):
        decompose(source, output, rank=4)


def start(source: Path, output: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM, "decompose", str(source), "-o", str(output), "--rank", "4"]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@posix_only
@pytest.mark.parametrize("kill_at", ["12", "16", "between two fsyncs"])
def test_kill_9_and_the_same_command_again(
    tiny_checkpoint: Factory, reference: dict[str, bytes], tmp_path: Path, kill_at: str
) -> None:
    source, output = small(tiny_checkpoint), tmp_path / "out"
    if kill_at.isdecimal():
        process = start(source, output, KILL_AT=kill_at)
    else:
        process = start(source, output, HALT=str(output / FIRST_RECEIPT))
        wait_until((output / FIRST_RECEIPT).exists, process)
        process.kill()
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert not (output / MANIFEST).exists()
    assert (output / ".pissa").is_dir()
    outcome = decompose(source, output, rank=4)
    assert not outcome.was_finished
    assert outcome.carried_over > 0
    assert files_of(output) == reference


@posix_only
def test_interrupt_says_so_and_the_same_command_carries_on(
    tiny_checkpoint: Factory, reference: dict[str, bytes], tmp_path: Path
) -> None:
    source, output = small(tiny_checkpoint), tmp_path / "out"
    process = start(source, output, HALT=str(output / FIRST_RECEIPT))
    wait_until((output / FIRST_RECEIPT).exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert out == ""
    assert err.strip().splitlines() == ["interrupted; run the same command again to carry on"]
    assert not list(output.rglob("*.partial"))
    outcome = decompose(source, output, rank=4)
    assert outcome.carried_over > 0
    assert files_of(output) == reference


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "pissa_init/adapter_model.safetensors"])
def test_damaged_finished_folder_is_not_called_finished(tiny_checkpoint: Factory, tmp_path: Path, name: str) -> None:
    source, output = small(tiny_checkpoint), tmp_path / "out"
    decompose(source, output, rank=4)
    (output / name).unlink()
    with pytest.raises(OutputError, match=f"{name} is damaged or gone"):
        decompose(source, output, rank=4)


def test_source_that_is_replaced_under_the_run_is_noticed(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a checkpoint of the same shapes, as a trainer saves one over the other: the headers are equal."""
    source = Path(shutil.copytree(small(tiny_checkpoint), tmp_path / "source"))
    write = WorkFolder.write

    def replaced(work: WorkFolder, receipt: Receipt) -> None:
        write(work, receipt)
        path = max(source.glob("*.safetensors"))
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "write", replaced)
        with pytest.raises(ReadError, match=r"model-00004-of-00004.safetensors changed while being read; leave"):
            decompose(source, tmp_path / "out", rank=4)
    assert not (tmp_path / "out" / MANIFEST).exists()
    outcome = decompose(source, tmp_path / "out", rank=4)
    assert outcome.carried_over > 0
    decompose(source, tmp_path / "fresh", rank=4)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "tokenizer.json"])
def test_source_that_is_replaced_after_it_was_read_is_noticed(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its tokenizer belongs to its weights, and one process's shards to another one's."""
    source = Path(shutil.copytree(small(tiny_checkpoint), tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}")
    accept = WorkFolder.write

    def replaced(work: WorkFolder, receipt: Receipt) -> None:
        accept(work, receipt)
        if receipt.shard == "model-00004-of-00004.safetensors":
            shutil.copy(source / name, tmp_path / "copy")
            (tmp_path / "copy").replace(source / name)

    monkeypatch.setattr(WorkFolder, "write", replaced)
    with pytest.raises(ReadError, match=f"{name} changed meanwhile; leave the source alone"):
        decompose(source, tmp_path / "out", rank=4)
    assert not (tmp_path / "out" / MANIFEST).exists()
    monkeypatch.undo()
    assert decompose(source, tmp_path / "out", rank=4).carried_over == SHARDS
