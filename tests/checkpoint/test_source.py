"""Folders become checkpoints, and whatever is amiss is refused in one line that names it."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pissa_hub.checkpoint import source
from pissa_hub.checkpoint.index import INDEX_NAME
from pissa_hub.checkpoint.source import Checkpoint, open_checkpoint, read_checkpoint
from pissa_hub.errors import CheckpointError, HeaderError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(2, 3) for name in names}, path, metadata={"format": "pt"})


def write_index(root: Path, weight_map: object) -> None:
    (root / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))


def fill(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    root = tmp_path / "single"
    weights(root / "model.safetensors", "a", "b")
    (root / "config.json").write_text('{"model_type": "llama", "limit": Infinity}')
    return root


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    root = tmp_path / "sharded"
    weights(root / SECOND, "a")
    weights(root / FIRST, "b", "c")
    write_index(root, {"a": SECOND, "b": FIRST, "c": FIRST})
    (root / "config.json").write_text("{}")
    return root


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy
    assert str(path) in message or str(Path(path).parent) in message
    return message


def names(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    return [(shard.name, entry.name) for shard, entry in checkpoint.tensors()]


def test_single_file(single: Path) -> None:
    checkpoint = open_checkpoint(str(single))
    assert names(checkpoint) == [("model.safetensors", "a"), ("model.safetensors", "b")]
    assert checkpoint.shards[0].path == single / "model.safetensors"
    assert checkpoint.index is None
    assert checkpoint.index_bytes is None
    assert checkpoint.config == {"model_type": "llama", "limit": float("inf")}
    assert checkpoint.other_files == ("config.json",)
    assert (checkpoint.repo_id, checkpoint.revision, checkpoint.license, checkpoint.readme) == (None,) * 4
    assert open_checkpoint(single / "model.safetensors") == checkpoint


def test_shards_in_name_order(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert names(checkpoint) == [(FIRST, "b"), (FIRST, "c"), (SECOND, "a")]
    assert checkpoint.index_bytes == (sharded / INDEX_NAME).read_bytes()
    assert checkpoint.index == json.loads(checkpoint.index_bytes)
    assert checkpoint.other_files == ("config.json",)


def test_relative_paths(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single)
    assert open_checkpoint("model.safetensors").root == Path()
    assert open_checkpoint(".").other_files == ("config.json",)


def test_without_config(single: Path) -> None:
    (single / "config.json").unlink()
    assert open_checkpoint(single).config is None


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00001.safetensors"])
def test_the_only_safetensors_file(tmp_path: Path, name: str) -> None:
    weights(tmp_path / name, "a")
    assert names(open_checkpoint(tmp_path)) == [(name, "a")]


def test_safetensors_files_beside_the_model_are_left_alone(single: Path, sharded: Path) -> None:
    for root in (single, sharded):
        (root / "consolidated.safetensors").write_bytes(b"not even one")
        (root / "model.fp16.safetensors").write_bytes(b"")
        checkpoint = open_checkpoint(root)
        assert checkpoint.other_files == ("config.json",)
        assert [entry.name for _, entry in checkpoint.tensors()] in (["a", "b"], ["b", "c", "a"])


def test_a_given_file_among_several(tmp_path: Path) -> None:
    weights(tmp_path / "one.safetensors", "a")
    weights(tmp_path / "two.safetensors", "b")
    assert names(open_checkpoint(tmp_path / "two.safetensors")) == [("two.safetensors", "b")]
    assert "holds 2 safetensors files but no model.safetensors.index.json; download" in refusal(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights")
def test_snapshot_in_the_hub_cache(tmp_path: Path, sharded: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--some-model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sharded.iterdir()):
        blob = path.rename(repository / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    checkpoint = open_checkpoint(snapshot)
    assert (checkpoint.repo_id, checkpoint.revision) == ("org/some-model", commit)
    assert checkpoint.shards[0].path == snapshot / FIRST
    assert checkpoint.other_files == ("config.json",)


def test_readme_and_license(single: Path) -> None:
    text = "---\r\nlanguage: en\r\nlicense: 'apache-2.0'\r\ntags:\r\n- x\r\n---\r\n# Model\r\nlicense: mit\r\n"
    (single / "README.md").write_bytes(text.encode())
    checkpoint = open_checkpoint(single)
    assert checkpoint.readme == text
    assert checkpoint.license == "apache-2.0"
    assert "README.md" not in checkpoint.other_files


@pytest.mark.parametrize(
    "text", ["", "license: mit\n", "---\nlicense:\n- mit\n---\n", "---\ntitle: x\n---\nlicense: mit\n"]
)
def test_no_plain_license(single: Path, text: str) -> None:
    (single / "README.md").write_text(text)
    assert open_checkpoint(single).license is None


def test_readme_is_bounded(single: Path) -> None:
    (single / "README.md").write_bytes(b"\xff" * ((1 << 20) + 1))
    assert open_checkpoint(single).readme == "\ufffd" * (1 << 20)


CARRIED = [
    *(
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.txt",
        "merges.txt",
        "generation_config.json",
    ),
    *("LICENSE", "modeling_custom.py", "chat_template.jinja", "1_Pooling/config.json", "docs/README.md"),
]
NOT_CARRIED = [
    *(
        "README.md",
        ".gitattributes",
        ".cache/huggingface/x.json",
        ".git/config",
        "pytorch_model.bin",
        "tf.h5",
    ),
    *(
        "flax_model.msgpack",
        "rust_model.ot",
        "model.gguf",
        "onnx/model.onnx",
        "onnx/config.json",
        "weights.PT",
    ),
    *("original/params.json", "openvino/model.xml", "coreml/x.json", "checkpoint-500/trainer_state.json"),
    *("runs/events", "optimizer.pt", "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json"),
    *(
        "unet/diffusion.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "arrays.npz",
        "x.pkl",
    ),
    *("pissa_conversion.json", "pissa_merge.json"),
    *("__pycache__/x.pyc", "docs/onnx/x.txt", "model.ckpt", "model.pth", "model.tflite", "model.mlmodel"),
]


def test_what_is_carried_over(single: Path) -> None:
    fill(single, **dict.fromkeys([*CARRIED, *NOT_CARRIED], "x"))
    assert open_checkpoint(single).other_files == tuple(sorted([*CARRIED, "config.json"]))


def test_residual_base_is_read_without_what_was_added_to_it(single: Path) -> None:
    original = open_checkpoint(single)
    fill(single, **dict.fromkeys(["pissa_manifest.json", "pissa_init/adapter_config.json", "README.md"], "x"))
    assert "is already decomposed" in refusal(single)
    residual = read_checkpoint(single)
    assert (residual.shards, residual.other_files) == (original.shards, original.other_files)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights")
def test_links(single: Path, tmp_path: Path) -> None:
    fill(tmp_path, **{"elsewhere/vocab.txt": "x"})
    (single / "linked").symlink_to(tmp_path / "elsewhere")
    (single / "dangling.txt").symlink_to(tmp_path / "absent")
    (single / "same.json").symlink_to("config.json")
    assert open_checkpoint(single).other_files == ("config.json", "same.json")
    (single / "vocab.txt").symlink_to(tmp_path / "elsewhere" / "vocab.txt")
    assert "vocab.txt is a link out of the checkpoint" in refusal(single)


MODULES = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": 3}, 4])


def test_sentence_transformers_modules_keep_their_weights(single: Path) -> None:
    fill(single, **{"modules.json": MODULES, "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}"})
    fill(single, **{"2_Dense/pytorch_model.bin": "x", "3_Other/model.safetensors": "x"})
    weights(single / "2_Dense" / "model.safetensors", "linear.weight")
    assert open_checkpoint(single).other_files == (
        *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
        *("config.json", "modules.json"),
    )


def test_pickled_sentence_transformers_module(single: Path) -> None:
    fill(single, **{"modules.json": MODULES, "2_Dense/pytorch_model.bin": "x"})
    message = refusal(single)
    assert str(Path("2_Dense", "pytorch_model.bin")) in message
    assert "save it again" in message


@pytest.mark.parametrize("text", ["{", "{}", "[" * 100_000])
def test_odd_modules_json_names_no_modules(single: Path, text: str) -> None:
    fill(single, **{"modules.json": text, "2_Dense/model.safetensors": "x"})
    assert open_checkpoint(single).other_files == ("config.json", "modules.json")


def test_absent_folder(tmp_path: Path) -> None:
    assert "does not exist; give a folder" in refusal(tmp_path / "absent")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "org/name@main"])
def test_hub_sources_are_not_supported_yet(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(name)
    message = str(caught.value)
    assert f"{name} is no folder here" in message
    assert f"hf download {name.partition('@')[0]} --local-dir" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickle_only(tmp_path: Path, name: str) -> None:
    fill(tmp_path, **{name: "x", "config.json": "{}"})
    for path in (tmp_path, tmp_path / name):
        message = refusal(path)
        assert f"{name} is a pickle" in message
        assert "save_pretrained" in message


def test_no_weights_at_all(tmp_path: Path) -> None:
    assert "holds no safetensors file" in refusal(tmp_path)
    fill(tmp_path, **{"config.json": "{}"})
    assert "config.json is not a safetensors file" in refusal(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["pissa_manifest.json", "pissa_init/adapter_config.json", ".pissa/plan.json"])
def test_already_decomposed(single: Path, name: str) -> None:
    fill(single, **{name: "{}"})
    assert f"is already decomposed: it holds {name.split('/')[0]}; give the original" in refusal(single)


def test_peft_adapter(tmp_path: Path) -> None:
    weights(tmp_path / "adapter_model.safetensors", "lora_A")
    fill(tmp_path, **{"adapter_config.json": "{}"})
    assert "holds a PEFT adapter, not a model; give its base model" in refusal(tmp_path)
    assert "holds a PEFT adapter" in refusal(tmp_path / "adapter_model.safetensors")


def test_lone_shard(sharded: Path) -> None:
    assert f"is not a checkpoint by itself: {INDEX_NAME} lies beside it; give" in refusal(sharded / FIRST)
    (sharded / INDEX_NAME).unlink()
    (sharded / SECOND).unlink()
    assert f"{FIRST} is one of 2 shards, and there is no {INDEX_NAME}" in refusal(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert f"{SECOND} is missing, though {INDEX_NAME} names it; download" in refusal(sharded)


def test_truncated_shard(sharded: Path) -> None:
    with (sharded / FIRST).open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 5)
    with pytest.raises(HeaderError, match=rf"{FIRST} is truncated: 5 bytes are missing; download"):
        open_checkpoint(sharded)


def test_index_beside_a_single_file_that_it_does_not_mean(sharded: Path) -> None:
    weights(sharded / "model.safetensors", "a")
    assert f"holds both model.safetensors and {INDEX_NAME}; remove" in refusal(sharded)


def test_index_of_a_single_file(single: Path) -> None:
    write_index(single, {"a": "model.safetensors", "b": "model.safetensors"})
    assert open_checkpoint(single).index is not None
    assert open_checkpoint(single / "model.safetensors").index is not None


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    write_index(sharded, {"a": SECOND, "b": FIRST, "c": FIRST, "d.weight": FIRST})
    message = refusal(sharded)
    assert f"{FIRST} lacks tensor 'd.weight', which {INDEX_NAME} promises" in message


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    write_index(sharded, {"a": SECOND, "b": FIRST, "c": SECOND})
    assert f"{SECOND} lacks tensor 'c'" in refusal(sharded)


def test_shard_holds_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    write_index(sharded, {"a": SECOND, "b": FIRST})
    assert f"{FIRST} holds tensor 'c', which {INDEX_NAME} does not name" in refusal(sharded)


def test_one_tensor_in_two_shards(sharded: Path) -> None:
    weights(sharded / SECOND, "a", "b")
    message = refusal(sharded)
    assert "tensor 'b' is in both" in message
    assert FIRST in message
    assert SECOND in message


@pytest.mark.parametrize(
    "file",
    [
        *("../model.safetensors", "sub/model.safetensors", "/model.safetensors", "..\\model.safetensors"),
        *(
            "C:model.safetensors",
            "a\0.safetensors",
            "a\n.safetensors",
            "a\u202e.safetensors",
            ".hidden.safetensors",
            ".safetensors",
        ),
        *("model.bin", "", "x" * 300 + ".safetensors"),
    ],
)
def test_weight_map_leaves_the_folder(sharded: Path, file: str) -> None:
    write_index(sharded, {"a": file, "b": FIRST})
    message = refusal(sharded)
    assert f"{INDEX_NAME} maps tensor 'a' to " in message
    assert "which is no bare .safetensors file name" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "maps tensor 'a' to no file name"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "repeats the key 'a'"),
        ('{"weight_map": ' + "[" * 100_000, "is nested too deeply"),
        ('{"metadata": {"a": 1e999}}', "holds 1e999, a number too large"),
        ('{"metadata": [-1' + "0" * 90 + "e" + "9" * 90 + "]}", "holds -1000"),
    ],
)
def test_malformed_index(sharded: Path, text: str, expected: str) -> None:
    (sharded / INDEX_NAME).write_text(text)
    assert f"{INDEX_NAME} {expected}" in refusal(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_malformed_config(single: Path, text: str) -> None:
    (single / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert re.search("config.json is (not|nested)", refusal(single))


def test_sizes_are_bounded(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_CONFIG_BYTES", 1)
    assert "config.json is larger than 1 bytes" in refusal(sharded)
    monkeypatch.setattr(source, "MAX_INDEX_BYTES", 10)
    assert f"{INDEX_NAME} is larger than 10 bytes" in refusal(sharded)


def test_unreadable_folder(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "cannot be read: Permission denied" in refusal(single)
