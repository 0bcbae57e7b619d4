"""verify finds every fault that it promises to find, and nothing in a sound folder."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import PissaHubError, decompose, verify
from pissa_hub.errors import CheckpointError, ManifestError, OutputError, VerificationError

from .conftest import SHARDED, Factory
from .helpers import ADAPTER, ADAPTER_CONFIG, MANIFEST, files_of, manifest_of, run_cli, write_record

Capture = pytest.CaptureFixture[str]
Table = dict[str, Any]
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source with other files, and its decomposition; for reading only."""
    folder = tmp_path_factory.mktemp("verify")
    source, output = folder / "source", folder / "out"
    shutil.copytree(tiny_checkpoint(shard_size=SHARDED, num_hidden_layers=1), source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    decompose(source, output, rank=4, targets="q_proj,k_proj,up_proj", rank_pattern={"k_proj": 2})
    return source, output


@pytest.fixture
def source(pair: tuple[Path, Path]) -> Path:
    return pair[0]


@pytest.fixture
def output(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(pair[1], tmp_path / "out"))


def problems(output: Path, source: Path | None = None) -> list[str]:
    return [problem for check in verify(output, source, sample=-1).checks for problem in check.problems]


def edit_manifest(output: Path, edit: Callable[[Table], object]) -> None:
    table = manifest_of(output)
    edit(table)
    write_record(output / MANIFEST, table)


def vouch_for(output: Path, name: str) -> None:
    """Give the manifest the hash of a changed file, as somebody who means to deceive would."""
    data = (output / name).read_bytes()
    digest = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(output, lambda table: table["files"].update({name: digest}))


def test_sound_folder(capfd: Capture, source: Path, output: Path) -> None:
    before = files_of(output)
    findings = verify(output, source, sample=-1)
    assert findings.is_sound
    assert {check.name: check.count for check in findings.checks} == {
        "files and hashes": len(before) - 1,
        "headers and index": 5,
        "adapter": 3,
        "W = W_res + s B A": 3,
        "other tensors byte-equal": 9,
        "certificates recomputed": 3,
    }
    assert [check.count for check in verify(output).checks] == [len(before) - 1, 5, 3]
    assert verify(output, source, sample=1).checks[-1].count == 1
    assert verify(output, source, sample=0).checks[-1].count == 0
    ran = run_cli(capfd, "verify", output, "--source", source)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1] == "sound"
    assert ran.out.count("ok ") == 6
    parsed = json.loads(run_cli(capfd, "verify", output, "--format", "json").out)
    assert parsed["is_sound"] is True
    assert parsed["checks"][0] == {"name": "files and hashes", "count": len(before) - 1, "problems": []}
    assert files_of(output) == before


def test_flipped_bit_in_any_file_is_found(pair: tuple[Path, Path], output: Path) -> None:
    dice = random.Random(0)
    names = sorted(files_of(output).keys() - {MANIFEST})
    assert len(names) == 11
    for name in names:
        data = (output / name).read_bytes()
        for position in {0, 8, len(data) - 1, *(dice.randrange(len(data)) for _ in range(6))} & set(range(len(data))):
            flipped = data[position] ^ (1 << dice.randrange(8))
            (output / name).write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
            assert any(name in problem for problem in problems(output)), (name, position)
        assert problems(output, pair[0]) != []
        (output / name).write_bytes(data)
    assert problems(output) == []


def test_flipped_bit_fails_the_command(capfd: Capture, output: Path) -> None:
    path = output / SHARD
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ran = run_cli(capfd, "verify", output)
    assert (ran.code, ran.err) == (1, "")
    assert f"{SHARD} has other content than {MANIFEST} says" in ran.out
    assert ran.out.splitlines()[-1] == "NOT sound: do not use this folder"
    parsed = run_cli(capfd, "verify", output, "--format", "json")
    assert parsed.code == 1
    assert json.loads(parsed.out)["is_sound"] is False


@pytest.mark.parametrize(
    "name",
    [
        SHARD,
        "config.json",
        "README.md",
        ADAPTER,
        ADAPTER_CONFIG,
        "1_Pooling/config.json",
        "model.safetensors.index.json",
    ],
)
def test_missing_file_is_found(source: Path, output: Path, name: str) -> None:
    (output / name).unlink()
    assert any(name in problem for problem in problems(output))
    assert any(name in problem for problem in problems(output, source))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_config.json", "pissa_init/more.safetensors", "new/file.py", "x.partial"]
)
def test_extra_file_is_found(output: Path, name: str) -> None:
    """adapter_config.json at the root, for one, would make transformers load an adapter unasked."""
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_bytes(b"")
    assert problems(output) == [f"{name} is not in {MANIFEST}"]


def test_what_the_hub_adds_is_no_fault(output: Path) -> None:
    (output / ".gitattributes").write_text("*.safetensors filter=lfs")
    (output / ".cache" / "huggingface").mkdir(parents=True)
    (output / ".cache" / "huggingface" / "x.lock").touch()
    assert problems(output) == []


@pytest.mark.parametrize(("missing", "cut"), [(1, False), (100, True)])
def test_truncated_file_is_found(source: Path, output: Path, missing: int, cut: bool) -> None:
    data = (output / ADAPTER).read_bytes()
    (output / ADAPTER).write_bytes(data[:missing] if cut else data[:-missing])
    assert any(ADAPTER in problem for problem in problems(output))
    assert any("cannot be read" in problem for problem in problems(output, source))


@pytest.mark.parametrize(
    ("key", "value"), [("r", 5), ("use_rslora", True), ("init_lora_weights", "pissa"), ("peft_type", "IA3")]
)
def test_altered_adapter_config_is_found_even_with_a_new_hash(output: Path, key: str, value: object) -> None:
    config = json.loads((output / ADAPTER_CONFIG).read_text())
    assert config[key] != value
    (output / ADAPTER_CONFIG).write_text(json.dumps({**config, key: value}))
    assert any("adapter_config.json has other" in p or "bytes instead" in p for p in problems(output))
    vouch_for(output, ADAPTER_CONFIG)
    assert [problem for problem in problems(output) if f"has {key}" in problem]


def test_altered_tensors_are_found_even_with_new_hashes(source: Path, output: Path) -> None:
    """What no hash can tell, the source does."""
    shard = next(path for path in sorted(output.glob("*.safetensors")) if b"q_proj" in path.read_bytes()[:4000])
    name = "model.layers.0.self_attn.q_proj.weight"
    for change in (name, "other"):
        tensors = load_file(shard)
        changed = (
            name if change == name else next(other for other in tensors if "_proj" not in other or "v_proj" in other)
        )
        original = tensors[changed].clone()
        tensors[changed].view(-1)[7] += 1e-4
        save_file(tensors, shard, {"format": "pt"})
        vouch_for(output, shard.name)
        assert problems(output) == []
        assert [problem for problem in problems(output, source) if problem.startswith(changed)]
        save_file({**tensors, changed: original}, shard, {"format": "pt"})
        vouch_for(output, shard.name)
    assert problems(output, source) == []


@pytest.mark.parametrize("edit", ["lose", "rename", "add", "scale"])
def test_altered_adapter_is_found_even_with_a_new_hash(output: Path, edit: str) -> None:
    tensors = load_file(output / ADAPTER)
    name = min(tensors)
    if edit == "lose":
        del tensors[name]
    elif edit == "rename":
        tensors["base_model.model.elsewhere.lora_A.weight"] = tensors.pop(name)
    elif edit == "add":
        tensors["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(4, 64)
    else:
        tensors[name] *= 1.001
    save_file(tensors, output / ADAPTER, {"format": "pt"})
    vouch_for(output, ADAPTER)
    assert problems(output)


@pytest.mark.parametrize("change", ["value", "tensor", "shard"])
def test_wrong_source_is_refused(capfd: Capture, source: Path, output: Path, tmp_path: Path, change: str) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    if change == "shard":
        shutil.rmtree(other)
        other.mkdir()
        save_file({"a": torch.zeros(2, 2)}, other / "model.safetensors")
    else:
        tensors = load_file(other / SHARD)
        name = min(tensors)
        tensors[name] = tensors[name] + 1e-3 if change == "value" else tensors[name].bfloat16()
        save_file(tensors, other / SHARD, {"format": "pt"})
    with pytest.raises(VerificationError, match="is not the source of this decomposition"):
        verify(output, other)
    line = run_cli(capfd, "verify", output, "--source", other).error
    assert "give the checkpoint that it was made from" in line


def test_folder_that_is_no_decomposition(capfd: Capture, source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no pissa_manifest"):
        verify(source)
    with pytest.raises(OutputError):
        verify(tmp_path / "nowhere")
    assert "has no pissa_manifest.json" in run_cli(capfd, "verify", source).error


def test_source_that_is_no_checkpoint(output: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        verify(output, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("energy",), lambda old: old * 1.01),
        (("energy",), lambda old: old * 0.99),
        (("singular_values", 0), lambda old: old * 1.001),
        (("singular_values", 3), lambda old: old * 0.999),
        (("reconstruction", "max_abs"), lambda old: old * 0.999),
        (("reconstruction", "relative_frobenius"), lambda old: old * 0.999),
        (("certificate", "energy_loss"), lambda old: 1e-9),
        (("certificate", "sigma_error"), lambda old: 1e-9),
        (("alpha",), lambda old: old * 1.01),
        (("rank",), lambda old: old + 1),
        (("shape",), lambda old: [old[0], old[1] + 1]),
        (("tensor",), lambda old: "model.norm.weight"),
        (("module",), lambda old: f"{old}x"),
        (("is_transposed",), lambda old: True),
    ],
)
def test_tampered_record_is_found_with_the_source(
    rough: tuple[Path, Path], tmp_path: Path, place: tuple[str | int, ...], value: Callable[[Any], Any]
) -> None:
    """Of factors that are certified not to be good, so that a claim of better ones is false."""
    source, made = rough
    output = Path(shutil.copytree(made, tmp_path / "out"))

    def tamper(table: Table) -> None:
        node = max(table["weights"], key=lambda weight: weight["certificate"]["energy_loss"])
        assert node["certificate"]["energy_loss"] > 1e-3
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value(node[place[-1]])

    edit_manifest(output, tamper)
    try:
        assert problems(output, source)
    except ManifestError:
        assert place == ("rank",)


@pytest.fixture(scope="module")
def rough(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bf16 source and a decomposition of it without power iterations."""
    source, output = (
        tiny_checkpoint(dtype=torch.bfloat16, num_hidden_layers=1),
        tmp_path_factory.mktemp("rough") / "out",
    )
    decompose(source, output, rank=4, svd="randomized", niter=0, targets="q_proj,up_proj")
    assert verify(output, source, sample=-1).is_sound
    return source, output


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", ""])
def test_manifest_that_points_out_of_the_folder(output: Path, name: str) -> None:
    (output.parent / "outside").write_bytes(b"")
    digest = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    edit_manifest(output, lambda table: table["files"].update({name: digest}))
    with pytest.raises(ManifestError, match=r"points out of the folder|files has the key"):
        verify(output)


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


_STRANGE = [None, True, -1, 0, 0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "a\0b", [], [1], {}, {"a": 1}]


def test_strange_manifest_is_refused_or_found_or_harmless_but_never_a_crash(source: Path, output: Path) -> None:
    """It may come from anybody's repository."""
    table = manifest_of(output)
    paths = list(nodes(table))
    dice = random.Random(0)
    for path in dice.sample(paths, 100):
        node = strange = copy.deepcopy(table)
        for key in path[:-1]:
            node = node[key]
        value = dice.choice(["delete", *_STRANGE])
        if value == "delete":
            del node[path[-1]]
        else:
            node[path[-1]] = value
        write_record(output / MANIFEST, strange)
        for given in (None, source):
            try:
                verify(output, given, sample=-1)
            except PissaHubError as error:
                lines = str(error).splitlines()
                assert len(lines) == 1  # it may or may not be refused


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"a": 1, "a": 2}', "[" * 100_000, "\xff"])
def test_manifest_that_is_no_manifest(capfd: Capture, output: Path, text: str) -> None:
    (output / MANIFEST).write_bytes(text.encode("latin-1"))
    for command in ("verify", "inspect"):
        assert MANIFEST in run_cli(capfd, command, output).error


def test_manifest_of_a_later_version(capfd: Capture, output: Path) -> None:
    edit_manifest(output, lambda table: table.update(version=2))
    assert "version 2; use a newer pissa_hub" in run_cli(capfd, "verify", output).error
