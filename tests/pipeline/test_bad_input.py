"""A bad input is one clear line, exit code 1, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub.pipeline import decompose as decompose_module
from pissa_hub.pipeline import output as output_folder

from ..conftest import SHARDED, Factory
from ..helpers import files_of, header_bytes, run_cli, run_python

INDEX = "model.safetensors.index.json"
LAST = "model-00006-of-00006.safetensors"

Capture = pytest.CaptureFixture[str]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux's file system")
as_user_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Not there, in a folder of its own."""
    folder = tmp_path / "parent"
    folder.mkdir()
    return folder / "out"


@pytest.fixture(params=["absent", "empty"])
def either_output(request: pytest.FixtureRequest, output: Path) -> Iterator[Path]:
    """Not there, or an empty folder; checked to be so again after the test."""
    if request.param == "empty":
        output.mkdir()
    yield output
    assert [path.name for path in output.parent.rglob("*")] == (["out"] if request.param == "empty" else [])


def refused(capfd: Capture, source: Path, output: Path, *options: object) -> str:
    """The line that the refusal of a source said; checks that no file changed anywhere."""
    before = files_of(source) if source.is_dir() else {}
    line = run_cli(capfd, "decompose", source, "-o", output, "--rank", 4, *options).error
    assert (files_of(source) if source.is_dir() else {}) == before
    return line


def poison(source: Path, tensor: str, value: float) -> None:
    """Put a value into a tensor at [1, 2], or [1] of a vector."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            tensors[tensor][(1, 2)[: tensors[tensor].dim()]] = value
            save_file(tensors, path, {"format": "pt"})
            return
    raise AssertionError(tensor)


def edit_index(source: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((source / INDEX).read_text())
    edit(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def test_missing_shard(capfd: Capture, source: Path, either_output: Path) -> None:
    (source / LAST).unlink()
    line = refused(capfd, source, either_output)
    assert f"{LAST} is missing, though {INDEX} names it; download" in line


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_truncated_shard(capfd: Capture, source: Path, either_output: Path, kept: float) -> None:
    data = (source / LAST).read_bytes()
    (source / LAST).write_bytes(data[: int(len(data) * kept)])
    line = refused(capfd, source, either_output)
    assert LAST in line
    assert "truncated" in line or "too short" in line


def test_trailing_bytes(capfd: Capture, source: Path, either_output: Path) -> None:
    with (source / LAST).open("ab") as file:
        file.write(b"\0")
    assert f"{LAST} has 1 bytes after its last tensor" in refused(capfd, source, either_output)


def test_index_promises_more_than_the_shards_hold(capfd: Capture, source: Path, either_output: Path) -> None:
    edit_index(source, lambda weight_map: weight_map.update({"ghost.weight": LAST}))
    assert f"{LAST} lacks tensor 'ghost.weight'" in refused(capfd, source, either_output)


def test_shards_hold_more_than_the_index_names(capfd: Capture, source: Path, either_output: Path) -> None:
    edit_index(source, lambda weight_map: weight_map.pop("model.norm.weight"))
    assert "holds tensor 'model.norm.weight', which" in refused(capfd, source, either_output)


@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "sub/{}", "..\\{}", "{}\0", "model.bin", ".hidden.safetensors"])
def test_weight_map_that_points_elsewhere(
    capfd: Capture, source: Path, either_output: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(source / LAST, tmp_path / LAST)
    edit_index(source, lambda weight_map: weight_map.update({"model.norm.weight": name.format(LAST)}))
    line = refused(capfd, source, either_output)
    assert "'model.norm.weight'" in line
    assert "no bare .safetensors file name" in line


def test_duplicate_keys_in_the_index(capfd: Capture, source: Path, either_output: Path) -> None:
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"model.norm.weight": "x.safetensors",'))
    assert "repeats the key 'model.norm.weight'" in refused(capfd, source, either_output)


def test_duplicate_keys_in_a_header(capfd: Capture, source: Path, either_output: Path) -> None:
    header, data = header_bytes(source / LAST), (source / LAST).read_bytes()
    text = header[8:].rstrip()
    name = next(name for name in json.loads(text) if name != "__metadata__")
    text = text[:-1] + b"," + json.dumps({name: json.loads(text)[name]}).encode()[1:]
    (source / LAST).write_bytes(len(text).to_bytes(8, "little") + text + data[len(header) :])
    assert f"repeats the key {name!r}" in refused(capfd, source, either_output)


def test_one_tensor_in_two_shards(capfd: Capture, source: Path, either_output: Path) -> None:
    tensors = load_file(source / LAST)
    first = min(source.glob("*.safetensors"))
    save_file({**load_file(first), **tensors}, first, {"format": "pt"})
    assert "is in both" in refused(capfd, source, either_output)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickle_only(capfd: Capture, tiny_checkpoint: Factory, tmp_path: Path, either_output: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(tiny_checkpoint() / "config.json", source)
    torch.save({}, source / name)
    line = refused(capfd, source, either_output)
    assert f"{name} is a pickle" in line
    assert "save_pretrained" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])
def test_value_that_is_no_number(capfd: Capture, source: Path, either_output: Path, layer: str, value: float) -> None:
    poison(source, f"model.{layer}.weight", value)
    line = refused(capfd, source, either_output)
    assert f"model.{layer}.weight has 1 NaN or Inf, the first at [1, 2]" in line


def test_nan_in_the_last_shard_leaves_nothing_of_those_before(
    capfd: Capture, source: Path, either_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = max(source.glob("*.safetensors"))
    targets = [name for name in load_file(last) if "_proj" in name]
    poison(source, targets[-1], float("nan"))
    committed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (committed.append(descriptor), fsync(descriptor)))
    assert f"{targets[-1]} has 1 NaN" in refused(capfd, source, either_output)
    assert len(committed) > 10


def test_folders_made_for_the_output_are_removed_with_it(capfd: Capture, source: Path, output: Path) -> None:
    poison(source, "model.layers.0.self_attn.q_proj.weight", float("nan"))
    refused(capfd, source, output / "deep" / "er")
    assert not output.exists()


def test_nan_in_what_is_not_targeted_is_copied(capfd: Capture, source: Path, output: Path) -> None:
    poison(source, "model.norm.weight", float("nan"))
    assert run_cli(capfd, "decompose", source, "-o", output, "--rank", 4).code == 0


def test_excluding_the_bad_weight_helps(capfd: Capture, source: Path, output: Path) -> None:
    poison(source, "model.layers.0.self_attn.q_proj.weight", float("nan"))
    options = ("--rank", 4, "--exclude", "layers.0.self_attn.q_proj")
    assert run_cli(capfd, "decompose", source, "-o", output, *options).code == 0


def test_rank_above_the_smaller_side(capfd: Capture, source: Path, either_output: Path) -> None:
    line = refused(capfd, source, either_output, "--rank", 33)
    assert "rank 33 does not fit model.layers.0.self_attn.k_proj.weight of shape [32, 64]: 1 to 32 does" in line
    assert "--rank-pattern k_proj=32" in line
    line = refused(capfd, source, either_output, "--rank-pattern", "q_proj=65")
    assert "rank 65 does not fit model.layers.0.self_attn.q_proj.weight" in line


@pytest.mark.parametrize("targets", ["q_prj", "attention.q_prj", r"re:.*q_prj"])
def test_no_target_matched(capfd: Capture, source: Path, either_output: Path, targets: str) -> None:
    line = refused(capfd, source, either_output, "--targets", targets)
    assert f"{targets!r} matches no weight of the checkpoint; did you mean q_proj" in line
    assert "gate_proj" in line


def test_nothing_left_to_decompose(capfd: Capture, source: Path, either_output: Path) -> None:
    assert "--exclude leaves no weight" in refused(capfd, source, either_output, "--exclude", "re:.*proj")


def test_tied_head_targeted(capfd: Capture, tiny_checkpoint: Factory, either_output: Path) -> None:
    source = tiny_checkpoint(shard_size=SHARDED, tie_word_embeddings=True)
    assert "lm_head shares its weight with" in refused(capfd, source, either_output, "--targets", "lm_head")


@pytest.mark.parametrize(
    ("option", "value", "fact"),
    [
        ("--rank", 0, "rank 0"),
        ("--alpha", -1, "alpha -1"),
        ("--alpha", "nan", "alpha nan"),
        ("--alpha", "inf", "alpha inf"),
        ("--tolerance", 0, "tolerance 0"),
        ("--tolerance", "nan", "tolerance nan"),
        ("--niter", -1, "niter -1"),
        ("--targets", "", "--targets is empty"),
        ("--targets", "re:(", "is no valid regex"),
        ("--exclude", "nowhere", "'nowhere' matches no weight"),
        ("--rank-pattern", "nowhere=3", "'nowhere' matches no target"),
        ("--rank-pattern", "(=3", "is no valid regex"),
        ("--device", "warp", "device 'warp'"),
        ("--device", "cuda:99", "device 'cuda:99'"),
        ("--device", "meta", "device 'meta'"),
        ("--device", "", "device ''"),
    ],
)
def test_unusable_option(
    capfd: Capture, source: Path, either_output: Path, option: str, value: object, fact: str
) -> None:
    assert fact in refused(capfd, source, either_output, option, value)


@pytest.mark.parametrize("content", ["file.txt", ".hidden", "folder/file"])
def test_output_that_is_not_empty(capfd: Capture, source: Path, output: Path, content: str) -> None:
    (output / content).parent.mkdir(parents=True)
    (output / content).write_text("precious")
    assert f"{output} is not empty; choose another folder" in refused(capfd, source, output)
    assert files_of(output) == {content: b"precious"}


def test_output_with_a_foreign_manifest(capfd: Capture, source: Path, output: Path) -> None:
    output.mkdir()
    (output / "pissa_manifest.json").write_text('{"format": "of another program"}')
    assert f"{output} is not empty" in refused(capfd, source, output)
    assert len(files_of(output)) == 1


def test_output_that_is_a_file(capfd: Capture, source: Path, output: Path) -> None:
    output.write_text("precious")
    assert f"{output} is not a folder" in refused(capfd, source, output)
    assert output.read_text() == "precious"


def test_output_below_a_file(capfd: Capture, source: Path, output: Path) -> None:
    output.write_text("precious")
    assert str(output) in refused(capfd, source, output / "below")
    assert output.read_text() == "precious"


def test_output_that_is_a_broken_link(capfd: Capture, source: Path, output: Path) -> None:
    output.symlink_to(output.parent / "nowhere" / "at-all")
    assert str(output) in refused(capfd, source, output)


@linux_only
def test_output_where_no_folder_can_be_made(capfd: Capture, source: Path) -> None:
    assert "/proc/here" in refused(capfd, source, Path("/proc/here"))


@as_user_only
def test_output_that_may_not_be_written(capfd: Capture, source: Path, output: Path) -> None:
    output.mkdir(mode=0o500)
    assert str(output) in refused(capfd, source, output)


@pytest.mark.parametrize("inside", ["", "out", "deep/er"])
def test_output_in_the_source(capfd: Capture, source: Path, inside: str) -> None:
    assert "lies in the source" in refused(capfd, source, source / inside)


def test_too_little_space(capfd: Capture, source: Path, either_output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = json.loads(run_cli(capfd, "decompose", source, "--rank", 4, "--dry-run", "--format", "json").out)
    monkeypatch.setattr(output_folder, "free_space", lambda output: needed["disk_bytes"] - 1)
    line = refused(capfd, source, either_output)
    assert f"{either_output} needs 0.00 GB" in line
    assert "free some space" in line


def test_enough_space_to_the_byte(capfd: Capture, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = json.loads(run_cli(capfd, "decompose", source, "--rank", 4, "--dry-run", "--format", "json").out)
    monkeypatch.setattr(output_folder, "free_space", lambda output: needed["disk_bytes"])
    assert run_cli(capfd, "decompose", source, "-o", output, "--rank", 4).code == 0


def test_already_decomposed(capfd: Capture, source: Path, output: Path, tmp_path: Path) -> None:
    assert run_cli(capfd, "decompose", source, "-o", output, "--rank", 4).code == 0
    line = refused(capfd, output, tmp_path / "twice")
    assert f"{output} is already decomposed" in line
    assert "give the original checkpoint" in line
    assert not (tmp_path / "twice").exists()


def test_adapter_as_source(capfd: Capture, source: Path, output: Path, either_output: Path) -> None:
    for path in source.iterdir():
        path.unlink()
    (source / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(2, 2)}, source / "adapter_model.safetensors")
    assert "holds a PEFT adapter" in refused(capfd, source, either_output)


def test_empty_source(capfd: Capture, tmp_path: Path, either_output: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert "holds no safetensors file" in refused(capfd, tmp_path / "nothing", either_output)


def test_absent_source(capfd: Capture, tmp_path: Path, either_output: Path) -> None:
    assert "nowhere does not exist" in refused(capfd, tmp_path / "nowhere", either_output)


def test_hub_id(capfd: Capture, tmp_path: Path, either_output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(capfd, Path("meta-llama/Llama-3.2-1B"), either_output)
    assert "hf download meta-llama/Llama-3.2-1B" in line


@pytest.mark.parametrize("config", ["", "{", "[]", '{"a": 1} x', "\xff"])
def test_malformed_config(capfd: Capture, source: Path, either_output: Path, config: str) -> None:
    (source / "config.json").write_bytes(config.encode("latin-1"))
    assert "config.json is not" in refused(capfd, source, either_output)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.float64, torch.int64])
def test_target_that_is_not_stored_as_plain_weight(
    capfd: Capture, source: Path, either_output: Path, dtype: torch.dtype
) -> None:
    path = next(path for path in sorted(source.glob("*.safetensors")) if b"_proj" in header_bytes(path))
    tensors = load_file(path)
    name = next(name for name in tensors if "_proj" in name)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path, {"format": "pt"})
    line = refused(capfd, source, either_output)
    assert f"tensor '{name}' is stored as" in line
    if dtype.itemsize == 1:
        assert "quantised storage is not supported yet; exclude it or start from the unquantised model" in line


def test_file_whose_name_is_no_text(capfd: Capture, source: Path, either_output: Path) -> None:
    """The manifest, which is UTF-8, could not name it."""
    try:
        Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.txt")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "caf" in refused(capfd, source, either_output)


def test_file_that_may_not_be_read(
    capfd: Capture, source: Path, either_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out before the work, not after it."""
    (source / "LICENSE").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "LICENSE")
    assert "LICENSE cannot be read" in refused(capfd, source, either_output)


def test_error_of_the_system_is_one_line_too(
    capfd: Capture, source: Path, either_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr(decompose_module, "make_plan", denied)
    assert "/some/where: Permission denied" in refused(capfd, source, either_output)


def test_debugging_shows_the_traceback(source: Path, output: Path) -> None:
    (source / LAST).unlink()
    command = ("-m", "pissa_hub", "decompose", source, "-o", output)
    plain = run_python(*command)
    assert f"{LAST} is missing" in plain.error
    debugged = run_python(*command, PISSA_HUB_DEBUG="1")
    assert debugged.code == 1
    assert debugged.out == ""
    assert debugged.err.startswith("Traceback")
    assert f"{LAST} is missing" in debugged.err
    assert not output.exists()
