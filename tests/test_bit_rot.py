"""One flipped bit anywhere in what was written is found; and nothing damaged is used again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import PissaHubError, convert, decompose, load, merge, restore, verify
from pissa_hub.adapter.merge_record import load_merge
from pissa_hub.adapter.record import load_conversion
from pissa_hub.errors import ManifestError
from pissa_hub.finished import RECORD_NAMES
from pissa_hub.hub.publish_release import check_release, open_release
from pissa_hub.manifest import load_manifest
from pissa_hub.progress import Silent
from pissa_hub.seal import read_sealed, sealed

from .conftest import SHARDED, Factory
from .helpers import ADAPTER, ADAPTER_CONFIG, MANIFEST, files_of, header_bytes, run_cli, seal_again, write_record

Capture = pytest.CaptureFixture[str]
KINDS = ("decomposed", "merged", "converted")
RECORDS = dict(zip(KINDS, RECORD_NAMES, strict=True))
LOADERS = dict(zip(KINDS, (load_manifest, load_merge, load_conversion), strict=True))
SETTINGS: dict[str, Any] = {"rank": 2, "targets": "q_proj,up_proj", "rank_pattern": {"up_proj": 1}}
SHARDS = ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
WEIGHTS = {"decomposed": ADAPTER, "merged": SHARDS[0], "converted": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a decomposition, an adapter trained on it, and what convert and merge made of it."""
    folder = tmp_path_factory.mktemp("made")
    source = Path(shutil.copytree(tiny_checkpoint(shard_size=SHARDED, num_hidden_layers=1), folder / "source"))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text('{"a tokenizer": "of sorts"}')
    decompose(source, folder / "decomposed", **SETTINGS)
    shutil.copytree(folder / "decomposed" / "pissa_init", folder / "adapter")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    trained = {name: tensor * 1.01 for name, tensor in tensors.items()}
    save_file(trained, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    convert(folder / "adapter", folder / "decomposed", folder / "converted")
    merge(folder / "decomposed", folder / "adapter", folder / "merged")
    return folder


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(made: Path, kind: str, tmp_path: Path) -> Path:
    """A copy of what one of the commands wrote, to be damaged."""
    return Path(shutil.copytree(made / kind, tmp_path / kind))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of all that was made."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def flip(path: Path, position: int, bit: int = 0) -> None:
    position %= path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def problems(folder: Path) -> list[str]:
    return [problem for check in verify(folder).checks for problem in check.problems]


def test_sealed_file_ends_with_the_hash_of_itself(tmp_path: Path) -> None:
    """Byte for byte: what a program in another language has to compute."""
    path = tmp_path / "record.json"
    path.write_bytes(sealed({"name": "ü", "numbers": [1, 0.5]}))
    assert path.read_bytes() == (
        '{\n "name": "ü",\n "numbers": [\n  1,\n  0.5\n ],\n'
        ' "sha256": "8fa18ed60added4e690658d3d4e2019642d48c28edef8f6e1dedcda94ca9b3d3"\n}\n'.encode()
    )
    assert read_sealed(path)["numbers"] == [1, 0.5]
    before = path.read_bytes()
    seal_again(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"{", b"{}\n", b'"\n}\n', b"0" * 64, b"0" * 68, b'{\n "sha256": ""\n}\n'])
def test_what_is_too_short_for_a_seal_has_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "record.json").write_bytes(data)
    with pytest.raises(ValueError, match="was changed or damaged after it was written"):
        read_sealed(tmp_path / "record.json")


def test_every_flipped_bit_of_the_record_is_found(folder: Path, kind: str) -> None:
    path, load = folder / RECORDS[kind], LOADERS[kind]
    load(folder)
    size = path.stat().st_size
    assert size > 1000
    for position in range(size):
        for bit in range(8):
            flip(path, position, bit)
            with pytest.raises(PissaHubError, match="was changed or damaged after it was written"):
                load(folder)
            flip(path, position, bit)
    assert problems(folder) == []


def test_flipped_bit_of_the_record_is_an_error_in_one_line(capfd: Capture, folder: Path, kind: str) -> None:
    flip(folder / RECORDS[kind], 100)
    line = run_cli(capfd, "verify", folder).error
    assert f"{RECORDS[kind]} was changed or damaged after it was written: its own SHA-256 is another; " in line


def places(path: Path) -> set[int]:
    """First and last byte, those of a safetensors file's header length, and some of its header and its tensors."""
    size, dice = path.stat().st_size, random.Random(path.name)
    if path.suffix != ".safetensors":
        return {0, size // 2, size - 1}
    start = len(header_bytes(path))
    sampled = {dice.randrange(8, start), dice.randrange(8, start), dice.randrange(start, size)}
    return {*range(9), start - 1, start, size - 1} | sampled


def test_flipped_bit_of_any_other_file_is_found(folder: Path, kind: str) -> None:
    dice = random.Random(0)
    names = files_of(folder).keys() - {RECORDS[kind]}
    assert WEIGHTS[kind] in names
    for name in names:
        for position in places(folder / name):
            bit = dice.randrange(8)
            flip(folder / name, position, bit)
            assert any(name in problem for problem in problems(folder)), (name, position, bit)
            flip(folder / name, position, bit)
    assert problems(folder) == []


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    other = path.with_name(f".{path.name}")
    other.write_bytes(path.read_bytes()[:-1] + b"!")
    path.unlink()
    path.symlink_to(other)


def replace_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a link to other bytes": replace_by_link,
    "a link to nothing": replace_by_dangling_link,
    "a link to itself": replace_by_itself,
    "a folder": replace_by_folder,
    **({"a pipe": replace_by_fifo} if hasattr(os, "mkfifo") else {}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_found(capfd: Capture, made: Path, tmp_path: Path, kind: str, damage: str) -> None:
    """Whichever it is, and nobody waits for a pipe's other end."""
    for number, name in enumerate(files_of(made / kind)):
        folder = Path(shutil.copytree(made / kind, tmp_path / str(number)))
        DAMAGE[damage](folder / name)
        ran = run_cli(capfd, "verify", folder)
        assert ran.code == 1
        if name == RECORDS[kind]:
            assert name in ran.error
        else:
            assert name in ran.out
            assert ran.out.splitlines()[-1] == "NOT sound: do not use this folder"


def test_swapped_files_are_found(copy: Path) -> None:
    for kind in ("decomposed", "merged"):
        first, second = (copy / kind / name for name in SHARDS)
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        assert all(any(name in problem for problem in problems(copy / kind)) for name in SHARDS)


def add_link_to_folder(folder: Path) -> None:
    (folder / "elsewhere").symlink_to(folder.parent)


ADDED: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: (folder / "modeling.py").touch(),
    "a file in a folder": lambda folder: ((folder / "new").mkdir(), (folder / "new" / "x.json").touch()),
    "a hidden file in a folder": lambda folder: ((folder / "new").mkdir(), (folder / "new" / ".x").touch()),
    "another record": lambda folder: [(folder / name).touch() for name in RECORD_NAMES if not (folder / name).exists()],
    "a link to nothing": lambda folder: (folder / "x.json").symlink_to("nowhere"),
    "a link to a folder": add_link_to_folder,
    **({"a pipe": lambda folder: os.mkfifo(folder / "x.json")} if hasattr(os, "mkfifo") else {}),
}


@pytest.mark.parametrize("added", ADDED)
def test_whatever_is_added_is_found(made: Path, tmp_path: Path, kind: str, added: str) -> None:
    folder = Path(shutil.copytree(made / kind, tmp_path / kind))
    ADDED[added](folder)
    # An empty manifest is one that cannot be read.
    try:
        found = problems(folder)
    except ManifestError as error:
        found = [str(error)]
    assert found
    assert all(f" is not in {RECORDS[kind]}" in line or f"{MANIFEST} was changed or damaged" in line for line in found)


def test_links_to_the_files_and_what_no_model_is_loaded_from_are_no_fault(folder: Path, tmp_path: Path) -> None:
    """The Hub's cache consists of links; its client and Git keep hidden files at the top."""
    stored = tmp_path / "blobs"
    stored.mkdir()
    for number, name in enumerate(files_of(folder)):
        (folder / name).rename(stored / str(number))
        (folder / name).symlink_to(stored / str(number))
    (folder / ".gitattributes").touch()
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.lock").touch()
    (folder / "empty").mkdir()
    assert problems(folder) == []


def test_folder_with_a_flipped_bit_is_no_release(folder: Path) -> None:
    check_release(open_release(folder), Silent())
    for name in files_of(folder):
        flip(folder / name, -1)
        with pytest.raises(PissaHubError, match=rf"{re.escape(name)} (has other content|was changed or damaged)"):
            check_release(open_release(folder), Silent())
        flip(folder / name, -1)


def test_folder_of_every_kind_is_verified_in_one_form(capfd: Capture, folder: Path, kind: str) -> None:
    files, headers, *more = json.loads(run_cli(capfd, "verify", folder, "--format", "json").out)["checks"]
    names = files_of(folder).keys() - {RECORDS[kind]}
    assert files == {"name": "files and hashes", "count": len(names), "problems": []}
    weights = [name for name in names if name.endswith(".safetensors")]
    assert headers == {"name": "headers and index", "count": len(weights), "problems": []}
    assert [check["name"] for check in more] == (["adapter"] if kind == "decomposed" else [])


def test_fault_that_the_record_vouches_for(copy: Path) -> None:
    """Headers and index have to be right by themselves."""
    for kind, name in (("merged", WEIGHTS["merged"]), ("converted", WEIGHTS["converted"])):
        tensors = load_file(copy / kind / name)
        save_file({**tensors, "foreign": torch.zeros(1)}, copy / kind / name, {"format": "pt"})
        flip(copy / kind / name, 8)
        vouch_for(copy / kind, RECORDS[kind], name)
        assert any("header" in problem and name in problem for problem in problems(copy / kind)), problems(copy / kind)
        flip(copy / kind / name, 8)
        vouch_for(copy / kind, RECORDS[kind], name)
        assert ["foreign" in problem for problem in problems(copy / kind)] == [True] * (kind == "merged")


def vouch_for(folder: Path, record: str, name: str) -> None:
    table, data = json.loads((folder / record).read_bytes()), (folder / name).read_bytes()
    table["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_record(folder / record, table)


SOURCES = {"merged": "decomposed", "converted": "source"}


@pytest.mark.parametrize("kind", SOURCES)
def test_source_of_a_merge_or_a_conversion_is_known_by_its_hashes(capfd: Capture, copy: Path, kind: str) -> None:
    source = copy / SOURCES[kind]
    ran = run_cli(capfd, "verify", copy / kind, "--source", source)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-2:] == ["ok      hashes of the source: 4", "sound"]
    flip(source / "model-00003-of-00004.safetensors", -1)
    line = run_cli(capfd, "verify", copy / kind, "--source", source).error
    assert "is not the source of this" in line
    assert "model-00003-of-00004.safetensors differs; give the checkpoint that it was made from" in line


def test_source_that_a_conversion_does_not_know(capfd: Capture, copy: Path) -> None:
    """As of an adapter that PEFT initialised."""
    convert(copy / "adapter", copy / "decomposed" / "pissa_init", copy / "again")
    record = copy / "again" / RECORDS["converted"]
    table = json.loads(record.read_bytes())
    table["base"]["files"] = {}
    write_record(record, table)
    line = run_cli(capfd, "verify", copy / "again", "--source", copy / "source").error
    assert "does not name the files of the original; leave out --source" in line


JOBS: dict[str, Callable[[Path, Path], object]] = {
    "decompose": lambda made, output: decompose(made / "source", output, **SETTINGS),
    "merge": lambda made, output: merge(made / "decomposed", made / "adapter", output),
    "restore": lambda made, output: restore(made / "source", made / "decomposed", output),
}
RESULTS = {"decompose": "decomposed", "merge": "merged", "restore": "decomposed", "convert": "converted"}


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def unfinished(made: Path, job: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a kill leaves once every shard has its receipt."""
    folder = tmp_path_factory.mktemp("unfinished")

    def snapshot(descriptor: int) -> None:
        if len(list(folder.glob("out/.pissa/*.receipt.json"))) == 4 and not (folder / "then").exists():
            shutil.copytree(folder / "out", folder / "then")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", snapshot)
        JOBS[job](made, folder / "out")
    assert files_of(folder / "out") == files_of(made / RESULTS[job])
    assert not (folder / "then" / RECORDS[RESULTS[job]]).exists()
    return folder / "then"


def test_flipped_bit_in_unfinished_work_is_not_carried_on_with(
    made: Path, job: str, unfinished: Path, tmp_path: Path
) -> None:
    names = [name for name, data in files_of(unfinished).items() if data]
    assert len([name for name in names if name.endswith(".adapter")]) == (2 if job == "decompose" else 0)
    for number, name in enumerate(names):
        size = (unfinished / name).stat().st_size
        for position in {0, 8, size // 2, size - 1}:
            output = Path(shutil.copytree(unfinished, tmp_path / f"{number}-{position}"))
            flip(output / name, position)
            JOBS[job](made, output)
            assert files_of(output) == files_of(made / RESULTS[job]), (name, position)


_VALUE = re.compile(rb'"[^"]*"|[\w.+-]+')


def test_flipped_bit_in_any_field_of_a_receipt_makes_it_void(
    made: Path, job: str, unfinished: Path, tmp_path: Path
) -> None:
    """Were it believed, its figures would be in the manifest for good."""
    receipt = max(unfinished.glob(".pissa/*.receipt.json"), key=lambda path: path.stat().st_size)
    data = receipt.read_bytes()
    ends = [found.end() - 1 - found[0].endswith(b'"') for found in _VALUE.finditer(data)]
    assert len(ends) > 10
    for end in ends:
        output = Path(shutil.copytree(unfinished, tmp_path / str(end)))
        flip(output / receipt.relative_to(unfinished), end)
        JOBS[job](made, output)
        assert files_of(output) == files_of(made / RESULTS[job]), data[:end]


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    **JOBS,
    "convert": lambda made, output: convert(made / "adapter", made / "decomposed", output),
    "merge into the original": lambda made, output: merge(made / "source", made / "converted", output),
    "load": lambda made, output: load(made / "source", made / "decomposed"),
}
NEEDED = {
    ("restore", "decomposed"): {MANIFEST, ADAPTER, ADAPTER_CONFIG},
    ("restore", "source"): set(SHARDS),
    ("convert", "decomposed"): {MANIFEST, ADAPTER, ADAPTER_CONFIG},
    ("merge", "decomposed"): {MANIFEST, ADAPTER, ADAPTER_CONFIG, *SHARDS},
    ("merge into the original", "converted"): {RECORDS["converted"], WEIGHTS["converted"], "adapter_config.json"},
    ("load", "decomposed"): {MANIFEST, ADAPTER, ADAPTER_CONFIG},
    ("load", "source"): set(SHARDS),
}


@pytest.mark.parametrize(("command", "read"), NEEDED)
def test_flipped_bit_in_what_a_command_reads_is_not_handed_on(
    made: Path, copy: Path, tmp_path: Path, command: str, read: str
) -> None:
    """It is refused, or what comes out is what it was to be."""
    output = tmp_path / "out"
    for name in files_of(copy / read) if command in RESULTS else NEEDED[command, read]:
        for position in (0, 8, -1):
            flip(copy / read / name, position)
            with suppress(PissaHubError):
                COMMANDS[command](copy, output)
                assert name not in NEEDED[command, read], position
                assert files_of(output) == files_of(made / RESULTS[command]), (name, position)
                shutil.rmtree(output)
            assert not output.exists()
            flip(copy / read / name, position)
