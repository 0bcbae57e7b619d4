"""Hostile indexes, and what may lie in a folder beside weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import DECOMPOSE, Attack, edit_json, named, replaced, sparse, store, tensor, to_bytes
from .sound import INDEX, SHARDS

_NORM = "model.norm.weight"
_BARE = "which is no bare .safetensors file name"


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "source" / INDEX, change)


def mapped(file: object, tensor_name: str = _NORM) -> Callable[[Path], None]:
    return index(lambda table: table["weight_map"].update({tensor_name: file}))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "source" / INDEX).write_bytes(data)


def file(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """A file of the source replaced."""
    return lambda folder: replaced(folder / "source" / name, make)


def link(name: str, target: str) -> Callable[[Path], object]:
    return file(name, lambda path: path.symlink_to(target))


def added(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "source" / name).touch()


_INDEXES = {
    "a file above": (_BARE, mapped(f"../{SHARDS[0]}")),
    "an absolute path": (_BARE, mapped("/etc/passwd")),
    "a folder below": (_BARE, mapped(f"sub/{SHARDS[0]}")),
    "backslashes": (_BARE, mapped(f"..\\{SHARDS[0]}")),
    "a drive": (_BARE, mapped(f"C:{SHARDS[0]}")),
    "NUL in a name": (_BARE, mapped(f"{SHARDS[0]}\0.safetensors")),
    "escapes for the terminal": (_BARE, mapped("\x1b[2Jx.safetensors")),
    "an empty name": (_BARE, mapped("")),
    "a web address": (_BARE, mapped("https://example.org/x.safetensors")),
    "a pickle": (_BARE, mapped("pytorch_model.bin")),
    "a hidden file": (_BARE, mapped(".x.safetensors")),
    "a name of a megabyte": (_BARE, mapped("x" * 1_000_000 + ".safetensors")),
    "a number": ("to no file name", mapped(7)),
    "a list": ("to no file name", mapped([SHARDS[0]])),
    "a missing shard": ("is missing, though", mapped("model-00003-of-00003.safetensors")),
    "a tensor that is in another shard": ("lacks tensor", mapped(SHARDS[0])),
    "a tensor that is nowhere": ("lacks tensor", mapped(SHARDS[0], "ghost\x1b[31m.weight")),
    "a tensor left out": (
        "which model.safetensors.index.json does not name",
        index(lambda t: t["weight_map"].pop(_NORM)),
    ),
    "itself": (_BARE, mapped(INDEX)),
    "no map": ("has no weight_map", index(lambda table: table.pop("weight_map"))),
    "a map that is a list": ("has no weight_map", index(lambda table: table.update(weight_map=[1]))),
    "metadata that are a list": ("has metadata that are no object", index(lambda table: table.update(metadata=[1]))),
    "half a character": ("half of a surrogate pair", index(lambda table: table.update(metadata={"a": "\ud800"}))),
    "nested 100,000 deep": ("nested too deeply", content(b'{"weight_map":' * 100_000)),
    "a key twice": ("repeats the key 'weight_map'", content(b'{"weight_map":{},"weight_map":{}}')),
    "half a million tensors": (
        "holds more than 300000 values",
        content(b'{"weight_map":{' + b'"a":"x.safetensors",' * 500_000 + b'"b":0}}'),
    ),
    "a number of a million digits": ("integer of 1000000 digits", content(b'{"metadata":' + b"9" * 1_000_000 + b"}")),
    "100 MB, sparse": ("is larger than 25000000 bytes", file(INDEX, lambda path: sparse(path, b"{", 100_000_000))),
    "a pipe": ("is not a regular file", file(INDEX, lambda path: os.mkfifo(path))),
    "a folder": ("cannot be read", file(INDEX, Path.mkdir)),
    "a dangling link": ("is a link that leads nowhere", link(INDEX, "nowhere")),
    "a device": ("is not a regular file", link(INDEX, "/dev/zero")),
}


def _deep(folder: Path) -> None:
    (folder / "source" / "/".join(["deep"] * 400)).mkdir(parents=True)
    (folder / "source" / "/".join(["deep"] * 400) / "x.txt").touch()


def _crowd(folder: Path) -> None:
    crowd = folder / "source" / "crowd"
    crowd.mkdir()
    for number in range(10_001):
        (crowd / f"{number}").touch()


def _another_shard(folder: Path) -> None:
    path = folder / "source" / SHARDS[0]
    store(path, {_NORM: tensor(0, 64, "F32", [16])}, bytes(64))


def _linked_away(folder: Path) -> None:
    """The output is a link into the source."""
    (folder / "out").symlink_to("source")


def _hub_cache(folder: Path) -> None:
    """The source as the Hub's client keeps it: links to files named by their hashes."""
    repository = folder / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((folder / "source").iterdir())):
        path.rename(repository / "blobs" / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    (folder / "source").rmdir()
    (folder / "source").symlink_to(snapshot)


def _module(folder: Path) -> None:
    source = folder / "source"
    (source / "modules.json").write_bytes(to_bytes([{"path": "2_Dense"}, {"path": "../../etc"}, {"path": "/etc"}]))
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\2.")


def _secret(name: str, spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_text('{"auths": "secret"}')
        spoil(folder)

    return make


_FOLDERS = {
    "config.json is a link to a secret": (
        "is a link out of the checkpoint",
        _secret("secret.json", link("config.json", "../secret.json")),
    ),
    "a carried file is a link above": (
        "is a link out of the checkpoint",
        _secret("secret.txt", link("vocab.txt", "../secret.txt")),
    ),
    "a carried file is a link to a secret": ("is a link out of the checkpoint", link("tokenizer.json", "/etc/passwd")),
    "config.json is a dangling link": ("is a link that leads nowhere", link("config.json", "nowhere")),
    "config.json is a pipe": ("is not a regular file", file("config.json", lambda path: os.mkfifo(path))),
    "config.json is a device": ("is not a regular file", link("config.json", "/dev/zero")),
    "config.json is a folder": ("cannot be read", file("config.json", Path.mkdir)),
    "names of two cases": ("which other systems do not tell apart", added("license")),
    "a line break in a name": ("whose name is not printable", added("a\nerror: all is well.txt")),
    "escapes for the terminal in a name": ("whose name is not printable", added("\x1b[2J.txt")),
    "a name that turns the line around": ("whose name is not printable", added("\u202etxt.exe")),
    "a name that is no text": ("whose name is not UTF-8", added(os.fsdecode(b"\xff\xfe.txt"))),
    "too many files": ("holds more than 10000 files", _crowd),
    "folders 400 deep": ("folders more than 16 deep", _deep),
    "one tensor in two shards": ("is in both", _another_shard),
    "both a single file and an index": (
        "holds both",
        lambda folder: store(folder / "source" / "model.safetensors", {"a": tensor(0, 1)}, b"\0"),
    ),
    "the output is a link into the source": ("lies in the source", _linked_away),
    "the output is a dangling link": ("out", lambda folder: (folder / "out").symlink_to("nowhere/at/all")),
    "pickle of a module": ("holds a module's weights as pickle", _module),
}


ATTACKS: tuple[Attack, ...] = (
    *named("index names", _INDEXES, DECOMPOSE),
    *named("folder", _FOLDERS, DECOMPOSE),
    Attack("folder: as in the Hub's cache", DECOMPOSE, "-> out: residual", _hub_cache, code=0, writes=True),
    Attack("folder: a link within", DECOMPOSE, "-> out: residual", link("vocab.txt", "LICENSE"), code=0, writes=True),
    Attack("folder: a hidden secret", DECOMPOSE, "-> out: residual", added(".env"), code=0, writes=True),
    Attack("folder: HTML in a name", DECOMPOSE, "-> out: residual", added("<b>.txt"), code=0, writes=True),
    Attack(
        "folder: README.md is a device",
        DECOMPOSE,
        "-> out: residual",
        link("README.md", "/dev/zero"),
        code=0,
        writes=True,
    ),
)
