"""What does not belong together is one clear line, and nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import decompose, restore
from pissa_hub.errors import (
    AdapterError,
    CheckpointError,
    ManifestError,
    OutputError,
    PissaHubError,
    PlanError,
    VerificationError,
)

from ..conftest import SHARDED, Factory
from ..helpers import ADAPTER, ADAPTER_CONFIG, MANIFEST, files_of, manifest_of, write_record
from .test_restore import adapter_only

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def original(tiny_checkpoint: Factory, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_checkpoint(shard_size=SHARDED, num_hidden_layers=1), tmp_path / "model"))
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    return folder


@pytest.fixture
def init(original: Path, tmp_path: Path) -> Path:
    decompose(original, tmp_path / "decomposed", rank=4)
    return adapter_only(tmp_path / "decomposed", tmp_path / "init", "README.md")


@pytest.fixture(params=["absent", "empty"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Not there, or an empty folder."""
    folder = tmp_path / "parent" / "out"
    folder.parent.mkdir()
    if request.param == "empty":
        folder.mkdir()
    return folder


def refusal(kind: type[PissaHubError], original: Path, init: Path, output: Path) -> str:
    """The one line that a refusal said; checks that no file changed anywhere."""
    before = [files_of(folder) for folder in (original, init, output.parent) if folder.is_dir()]
    folders = sorted(output.parent.rglob("*"))
    with pytest.raises(kind) as raised:
        restore(original, init, output)
    assert [files_of(folder) for folder in (original, init, output.parent) if folder.is_dir()] == before
    assert sorted(output.parent.rglob("*")) == folders
    line = str(raised.value)
    assert "\n" not in line
    assert raised.value.fact
    assert raised.value.remedy
    return line


def change(folder: Path, tensor: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Change a tensor of a checkpoint; the name of its shard."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if tensor in tensors:
            save_file({**tensors, tensor: edit(tensors[tensor]).contiguous()}, path, {"format": "pt"})
            return path.name
    raise AssertionError(tensor)


def edit_manifest(init: Path, edit: Edit) -> None:
    table = manifest_of(init)
    edit(table)
    write_record(init / MANIFEST, table)


LAST = "model.norm.weight"
TARGET = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("tensor", [LAST, TARGET, "lm_head.weight"])
def test_changed_weight(original: Path, init: Path, output: Path, tensor: str) -> None:
    """Of the same size: its hash tells, at the end of its shard."""
    shard = change(original, tensor, lambda weight: weight + 1e-3)
    line = refusal(VerificationError, original, init, output)
    assert f"{original} is not the source of this decomposition: {shard} differs; give the checkpoint" in line


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_weight_that_no_residual_fits(original: Path, init: Path, output: Path, value: float) -> None:
    change(original, TARGET, lambda weight: torch.full_like(weight, value))
    assert "is not the source of this decomposition: " in refusal(VerificationError, original, init, output)


def test_shard_of_another_size(original: Path, init: Path, output: Path) -> None:
    shard = change(original, TARGET, lambda weight: weight[:-1])
    assert f"{shard} differs" in refusal(VerificationError, original, init, output)


def test_tensor_of_another_shape_or_dtype(original: Path, init: Path, output: Path) -> None:
    change(original, TARGET, lambda weight: weight.reshape(weight.shape[0] // 2, -1))
    line = refusal(VerificationError, original, init, output)
    assert f"it has no {TARGET} of F32 [96, 64]" in line
    change(original, TARGET, lambda weight: weight.view(torch.int32).reshape(96, 64))
    assert f"it has no {TARGET} of F32 [96, 64]" in refusal(VerificationError, original, init, output)


def test_more_or_fewer_shards(tiny_checkpoint: Factory, init: Path, output: Path, original: Path) -> None:
    for other in (tiny_checkpoint(num_hidden_layers=1), tiny_checkpoint(shard_size=SHARDED)):
        assert "is not the source" in refusal(VerificationError, other, init, output)


def test_decomposed_source(original: Path, init: Path, output: Path, tmp_path: Path) -> None:
    assert "is already decomposed" in refusal(CheckpointError, tmp_path / "decomposed", init, output)


def test_absent_source(tmp_path: Path, init: Path, output: Path) -> None:
    assert "nowhere does not exist" in refusal(CheckpointError, tmp_path / "nowhere", init, output)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", "edited"),
        ("config.json", "edited"),
        ("model.safetensors.index.json", "edited"),
        ("generation_config.json", "edited"),
        ("tokenizer.json", "gone"),
        ("config.json", "gone"),
    ],
)
def test_file_beside_the_weights(original: Path, init: Path, output: Path, name: str, change: str) -> None:
    path = original / name
    if change == "edited":
        path.write_text(json.dumps({**json.loads(path.read_text()), "edited": True}))
    else:
        path.unlink()
    line = refusal(VerificationError, original, init, output)
    assert f"{name} is neither in {original} nor in {init} as it was" in line
    assert f"put the {name} of that time into one of them" in line


def test_changed_file_can_come_from_the_init_folder(original: Path, init: Path, output: Path, tmp_path: Path) -> None:
    shutil.copy(original / "tokenizer.json", init)
    (original / "tokenizer.json").write_text("{}")
    restore(original, init, output)
    assert files_of(output) == files_of(tmp_path / "decomposed")


def test_other_adapter(original: Path, init: Path, output: Path, tmp_path: Path) -> None:
    decompose(original, tmp_path / "other", rank=4, seed=1, svd="randomized", niter=0)
    shutil.copy(tmp_path / "other" / ADAPTER, init / ADAPTER)
    assert "is not the one that" in refusal(AdapterError, original, init, output)


def test_changed_adapter_config(original: Path, init: Path, output: Path) -> None:
    config = json.loads((init / ADAPTER_CONFIG).read_text())
    (init / ADAPTER_CONFIG).write_text(json.dumps({**config, "lora_dropout": 0.5}))
    assert "adapter_config.json is not the one that" in refusal(AdapterError, original, init, output)


def test_no_adapter(original: Path, init: Path, output: Path) -> None:
    shutil.rmtree(init / "pissa_init")
    refusal(AdapterError, original, init, output)


def test_no_manifest(original: Path, init: Path, output: Path) -> None:
    (init / MANIFEST).unlink()
    assert f"has no {MANIFEST}" in refusal(ManifestError, original, init, output)


def test_malformed_manifest(original: Path, init: Path, output: Path) -> None:
    (init / MANIFEST).write_text("{")
    assert "was changed or damaged" in refusal(ManifestError, original, init, output)


@pytest.mark.parametrize(
    "name", ["../escaped.json", "/escaped.json", "a/../../escaped.json", "..\\escaped.json", "C:escaped.json", "."]
)
def test_manifest_that_points_out_of_the_folder(original: Path, init: Path, output: Path, name: str) -> None:
    edit_manifest(init, lambda table: table["files"].update({name: table["files"]["tokenizer.json"]}))
    line = refusal(ManifestError, original, init, output)
    assert "points out of the folder" in line or "files has the key" in line


def test_manifest_without_one_of_the_shards(original: Path, init: Path, output: Path) -> None:
    shard = min(path.name for path in original.glob("*.safetensors"))
    edit_manifest(init, lambda table: table["files"].pop(shard))
    assert f"does not name {shard!r}" in refusal(ManifestError, original, init, output)


@pytest.mark.parametrize(
    "edit",
    [
        lambda table: table["weights"][0].update(module="elsewhere"),
        lambda table: table["settings"].update(adapter_dtype="bfloat16"),
    ],
)
def test_manifest_that_the_adapter_contradicts(original: Path, init: Path, output: Path, edit: Edit) -> None:
    edit_manifest(init, edit)
    assert "which the adapter beside it lacks" in refusal(ManifestError, original, init, output)


def test_manifest_of_a_method_to_come(original: Path, init: Path, output: Path) -> None:
    edit_manifest(init, lambda table: table["settings"].update(method="loftq"))
    assert "method 'loftq' cannot be used" in refusal(PlanError, original, init, output)


@pytest.mark.parametrize("which", ["alpha", "hash of the residual", "residual dtype"])
def test_residual_that_comes_out_otherwise(original: Path, init: Path, output: Path, which: str) -> None:
    """As with arithmetic of another version: found out at the latest at the end of the shard."""
    shard = min(path.name for path in original.glob("*.safetensors") if TARGET in load_file(path))

    def edit(table: dict[str, Any]) -> None:
        if which == "alpha":
            for weight in table["weights"]:
                weight["alpha"] *= 2
        elif which == "residual dtype":
            table["settings"]["residual_dtype"] = "bfloat16"
        else:
            table["files"][shard]["sha256"] = hashlib.sha256(b"").hexdigest()

    edit_manifest(init, edit)
    line = refusal(VerificationError, original, init, output)
    assert "comes out with other bytes than the manifest names; restore with pissa_hub " in line
    if which == "hash of the residual":
        assert line.startswith(shard)


@pytest.mark.parametrize("inside", ["", "out"])
def test_output_in_an_input(original: Path, init: Path, inside: str) -> None:
    for folder, what in ((original, "the source"), (init, "the folder of the initial adapter")):
        with pytest.raises(OutputError, match=f"lies in {what}; choose a folder outside of it"):
            restore(original, init, folder / inside)
    assert not (original / "out").exists()
    assert not (init / "out").exists()


@pytest.mark.parametrize("content", ["file.txt", "folder/file", "model-00001-of-00004.safetensors"])
def test_foreign_output(original: Path, init: Path, output: Path, content: str) -> None:
    (output / content).parent.mkdir(parents=True, exist_ok=True)
    (output / content).write_text("precious")
    assert f"{output} is not empty; choose another folder" in refusal(OutputError, original, init, output)


def test_output_of_another_decomposition(original: Path, init: Path, output: Path) -> None:
    decompose(original, output, rank=3)
    assert f"{output} holds another decomposition" in refusal(OutputError, original, init, output)


def test_finished_output_and_another_source(original: Path, init: Path, output: Path) -> None:
    restore(original, init, output)
    shard = change(original, LAST, lambda weight: weight + 1)
    assert f"{shard} differs" in refusal(VerificationError, original, init, output)


def test_too_little_space(original: Path, init: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(digest["size"] for digest in manifest_of(init)["files"].values())
    with monkeypatch.context() as patch:
        patch.setattr("pissa_hub.pipeline.output.free_space", lambda output: needed - 1)
        assert "free some space" in refusal(OutputError, original, init, output)
        patch.setattr("pissa_hub.pipeline.output.free_space", lambda output: needed)
        restore(original, init, output)


def test_unusable_device(original: Path, init: Path, output: Path) -> None:
    with pytest.raises(PlanError, match="device 'warp' cannot be used"):
        restore(original, init, output, device="warp")
