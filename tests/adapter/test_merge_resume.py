"""Killed at any point, the same merge carries on and ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import merge
from pissa_hub.errors import OutputError, VerificationError

from ..conftest import SHARDED
from ..helpers import MANIFEST, files_of, run_cli
from ..interrupted import receipts_in, snapshots_of, unfinished, work_done_from
from .kinds import Kind
from .trained import CONFIG, PEFTS_OWN_WARNINGS, WEIGHTS, Trained, Training

pytestmark = PEFTS_OWN_WARNINGS

# Untied on the way, so that a shard gets a tensor that the base does not have.
KIND = Kind(
    settings={"shard_size": SHARDED, "num_hidden_layers": 1, "tie_word_embeddings": True}, also=("embed_tokens",)
)
SHARDS = 3
RECORD = "pissa_merge.json"


@pytest.fixture
def done(trained: Training) -> Trained:
    return trained(KIND)


@pytest.fixture(scope="module")
def reference(trained: Training, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of an uninterrupted run."""
    output = tmp_path_factory.mktemp("reference") / "out"
    merge(trained(KIND).base, trained(KIND).adapter, output)
    return files_of(output)


@pytest.fixture(scope="module")
def snapshots(trained: Training, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    done = trained(KIND)
    return snapshots_of(lambda output: merge(done.base, done.adapter, output), tmp_path_factory.mktemp("snapshots"))


def changed_base(done: Trained, target: Path) -> Path:
    """A copy of the residual with another norm, and a manifest that knows it not."""
    assert done.base is not None
    shutil.copytree(done.base, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] += 1
            save_file(tensors, path, {"format": "pt"})
    return target


def changed_adapter(done: Trained, target: Path) -> Path:
    """A copy of the adapter after another step."""
    shutil.copytree(done.adapter, target)
    tensors = {name: 1.001 * tensor for name, tensor in load_file(target / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    return target


def test_every_point_of_a_run_is_one_to_carry_on_from(
    done: Trained, snapshots: list[Path], reference: dict[str, bytes], tmp_path: Path
) -> None:
    assert len(snapshots) > 20

    def carry_on(output: Path) -> int:
        outcome = merge(done.base, done.adapter, output)
        return SHARDS if outcome.was_finished else outcome.carried_over

    carried = work_done_from(snapshots, carry_on, reference, tmp_path)
    assert carried == sorted(carried)
    assert set(carried) == set(range(SHARDS + 1))


def test_work_that_was_done_is_not_done_again(done: Trained, snapshots: list[Path], tmp_path: Path) -> None:
    output = unfinished(snapshots, 2, tmp_path / "out")
    names = receipts_in(output)
    before = {name: (output / name).stat().st_ino for name in names}
    assert merge(done.base, done.adapter, output).carried_over == 2
    assert {name: (output / name).stat().st_ino for name in names} == before


def test_the_bytes_do_not_depend_on_the_threads(done: Trained, reference: dict[str, bytes], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        merge(done.base, done.adapter, tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert files_of(tmp_path / "out") == reference


def test_a_finished_folder_is_left_as_it_is(
    done: Trained, reference: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("merge", done.base, done.adapter, "-o", tmp_path / "out")
    assert run_cli(capfd, *command).code == 0
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in reference}
    again = run_cli(capfd, *command)
    assert again.code == 0
    assert f"{tmp_path / 'out'} is finished already" in again.out
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_of(tmp_path / "out")} == before
    outcome = merge(done.base, done.adapter, tmp_path / "out")
    assert outcome.was_finished
    assert outcome.record.to_bytes() == reference[RECORD]


@pytest.mark.parametrize("receipts", [1, SHARDS])
def test_unfinished_work_of_another_merge_is_refused(
    done: Trained, snapshots: list[Path], tmp_path: Path, receipts: int
) -> None:
    output = unfinished(snapshots, receipts, tmp_path / "out")
    before = files_of(output)
    with pytest.raises(OutputError, match="unfinished work of another plan"):
        merge(done.base, changed_adapter(done, tmp_path / "adapter"), output)
    with pytest.raises(OutputError, match="unfinished work of another plan"):
        merge(done.base, done.adapter, output, dtype="bfloat16")
    assert files_of(output) == before


def test_finished_work_of_another_merge_is_refused(done: Trained, tmp_path: Path) -> None:
    output = tmp_path / "out"
    merge(done.base, done.adapter, output)
    before = files_of(output)
    with pytest.raises(OutputError, match="holds another merge"):
        merge(done.base, changed_adapter(done, tmp_path / "adapter"), output)
    with pytest.raises(OutputError, match="holds another merge"):
        merge(done.base, done.adapter, output, dtype="bfloat16")
    with pytest.raises(OutputError, match="holds a merge of another base"):
        merge(changed_base(done, tmp_path / "base"), done.adapter, output)
    assert files_of(output) == before


def test_another_config_of_the_adapter_is_another_merge(done: Trained, tmp_path: Path) -> None:
    """Its scaling is in there."""
    merge(done.base, done.adapter, tmp_path / "out")
    adapter = Path(shutil.copytree(done.adapter, tmp_path / "adapter"))
    config = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(config.replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert (adapter / CONFIG).read_text() != config
    with pytest.raises(OutputError, match="holds another merge"):
        merge(done.base, adapter, tmp_path / "out")


def test_a_base_that_changed_meanwhile_leaves_nothing(done: Trained, snapshots: list[Path], tmp_path: Path) -> None:
    """Its sound receipts included: else the folder would mix two bases."""
    output = unfinished(snapshots, 1, tmp_path / "out")
    base = changed_base(done, tmp_path / "base")
    with pytest.raises(VerificationError, match=f"is not what {MANIFEST} names"):
        merge(base, done.adapter, output)
    assert not files_of(output)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "README.md", "model-00002-of-00003.safetensors"])
def test_a_damaged_finished_folder_is_not_called_finished(done: Trained, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    merge(done.base, done.adapter, output)
    (output / name).unlink()
    with pytest.raises(OutputError, match=f"{name} is damaged or gone"):
        merge(done.base, done.adapter, output)


@pytest.mark.parametrize("content", [b"{}", b"[", b'{"format": "pissa-hub-merge", "version": 2}'])
def test_a_record_that_cannot_be_read_is_refused(done: Trained, tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(OutputError, match=f"{RECORD} was changed or damaged"):
        merge(done.base, done.adapter, tmp_path)
    assert files_of(tmp_path) == {RECORD: content}
