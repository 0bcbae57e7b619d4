"""Hostile manifests and other records, sealed as if they were sound, and what an interrupted run leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pissa_hub.seal import SEAL, sealed

from .case import (
    CONVERT,
    DECOMPOSE,
    INSPECT,
    PUBLISH_LORA,
    PUBLISH_MERGED,
    RESTORE,
    VERIFY,
    Attack,
    named,
    replaced,
    sparse,
    to_bytes,
)
from .sound import MANIFEST, WEIGHTS

_DIGEST = {"size": 1, "sha256": "0" * 64}
Change = Callable[[dict[str, Any]], object]


def record(path: str, change: Change) -> Callable[[Path], None]:
    """A record changed and sealed again."""

    def spoil(folder: Path) -> None:
        table = json.loads((folder / path).read_bytes())
        table.pop(SEAL)
        change(table)
        (folder / path).write_bytes(sealed(table))

    return spoil


def manifest(change: Change) -> Callable[[Path], None]:
    return record(f"done/{MANIFEST}", change)


def settings(**changes: Any) -> Callable[[Path], None]:
    return manifest(lambda table: table["settings"].update(changes))


def weight(**changes: Any) -> Callable[[Path], None]:
    return manifest(lambda table: table["weights"][0].update(changes))


def names(name: str) -> Callable[[Path], None]:
    """A file of that name in the manifest."""
    return manifest(lambda table: table["files"].update({name: _DIGEST}))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "done" / MANIFEST).write_bytes(data)


def file(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: replaced(folder / "done" / name, make)


def merged(change: Change) -> Callable[[Path], None]:
    return record("merged/pissa_merge.json", change)


def converted(change: Change) -> Callable[[Path], None]:
    return record("lora/pissa_conversion.json", change)


def plan(data: bytes) -> Callable[[Path], None]:
    """What an interrupted run would have left in the output."""

    def spoil(folder: Path) -> None:
        (folder / "out" / ".pissa").mkdir(parents=True)
        (folder / "out" / ".pissa" / "plan.json").write_bytes(data)

    return spoil


_MALFORMED = "is malformed"
_INSPECTED = {
    "of another version": ("use a newer pissa_hub", manifest(lambda table: table.update(version=2))),
    "of another program": ("is '<b>'", manifest(lambda table: table.update(format="<b>"))),
    "a version of a megabyte": ("use a newer pissa_hub", manifest(lambda table: table.update(version="x" * 1_000_000))),
    "a version with escapes": ("use a newer pissa_hub", manifest(lambda table: table.update(version="\x1b[2J\n"))),
    "changed without its seal": ("its own SHA-256 is another", content(b'{"format":"pissa-hub-manifest"}')),
    "nested 100,000 deep": ("own SHA-256 is another", content(b'{"a":' * 100_000)),
    "a pipe": ("has no pissa_manifest.json", file(MANIFEST, lambda path: os.mkfifo(path))),
    "a device": ("has no pissa_manifest.json", file(MANIFEST, lambda path: path.symlink_to("/dev/zero"))),
    "a gigabyte, sparse": ("is larger than", file(MANIFEST, lambda path: sparse(path, b"{", 1 << 30))),
    "negative rank": (_MALFORMED, weight(rank=-1)),
    "rank of another length": ("singular values", weight(rank=3)),
    "shape of 10^90": (_MALFORMED, weight(shape=[10**90, -1])),
    "energy that is a word": (_MALFORMED, weight(energy="all")),
    "energy of two": (_MALFORMED, weight(energy=2.0)),
    "a record that is a list": (_MALFORMED, manifest(lambda table: table.update(weights=[[]]))),
    "no weights": (_MALFORMED, manifest(lambda table: table.update(weights=[]))),
    "negative size of a file": (
        _MALFORMED,
        manifest(lambda table: table["files"].update({"a": {"size": -1, "sha256": "0" * 64}})),
    ),
    "a hash that is none": (
        _MALFORMED,
        manifest(lambda table: table["files"].update({"a": {"size": 1, "sha256": "../../etc/passwd"}})),
    ),
    "an unknown field": (_MALFORMED, manifest(lambda table: table.update({"__class__": "os.system"}))),
    "a method that is none": (_MALFORMED, settings(method="os.system")),
    "a module with escapes": (_MALFORMED, weight(module="\x1b[2Ja")),
    "a module of two lines": (_MALFORMED, weight(module="a\n")),
    "a tensor with a paragraph's end": (_MALFORMED, weight(tensor="a\u2029b")),
    "a licence of two lines": (_MALFORMED, manifest(lambda table: table["source"].update(license="mit\n---"))),
    "a device with escapes": (_MALFORMED, manifest(lambda table: table["environment"].update(device="\x9b2J"))),
    "a seed of 10^400": ("integer of 401 digits", settings(seed=10**400)),
}
_RESTORED = {
    "a file above": ("../x", names("../x")),
    "an absolute path": ("/etc/x", names("/etc/x")),
    "a backslash": ("x", names("..\\x")),
    "a shard of another size": (
        "is not the source of this decomposition",
        manifest(lambda table: next(iter(table["source"]["files"].values())).update(size=7)),
    ),
    "a weight that is nowhere": ("is not the source of this decomposition", weight(tensor="ghost.weight")),
    "a file that is nowhere": ("is neither in", names("ghost.txt")),
}
_VERIFIED = {
    "a file above": ("../x", names("../x")),
    "an absolute path": ("/etc/passwd", names("/etc/passwd")),
    "a file that is a pipe": ("tokenizer.json", file("tokenizer.json", lambda path: os.mkfifo(path))),
    "a file that is a device": ("tokenizer.json", file("tokenizer.json", lambda path: path.symlink_to("/dev/zero"))),
    "a shard that is a pipe": (
        "model-00001-of-00002.safetensors",
        file("model-00001-of-00002.safetensors", lambda path: os.mkfifo(path)),
    ),
}
_MERGED = {
    "a file above": (
        "pissa_merge.json",
        merged(lambda t: t["files"].update({"../x": _DIGEST})),
    ),
    "another version": ("pissa_merge.json", merged(lambda table: table.update(version=9))),
    "notes that are a number": ("pissa_merge.json", merged(lambda t: t.update(notes=1))),
    "a base that is a list": ("pissa_merge.json", merged(lambda t: t.update(base=[1]))),
}
_CONVERTED = {
    "a file above": (
        "pissa_conversion.json",
        converted(lambda table: table["files"].update({"../x": _DIGEST})),
    ),
    "a base that is a list": (
        "pissa_conversion.json",
        converted(lambda table: table.update(base=[1])),
    ),
    "a module without a name": (
        "pissa_conversion.json",
        converted(lambda table: table["modules"][0].update(module=7)),
    ),
}
_PLANS = {
    "no JSON": b"\xff\xfe",
    "nested 100,000 deep": b'{"commits":' * 100_000,
    "a number of 5000 digits": b'{"digest":' + b"9" * 5000 + b"}",
    "lists for all": to_bytes({"digest": ["x"], "commits": [1], "settings": []}),
    "a digest with escapes": to_bytes({"digest": "\x1b[2J", "commits": {}}),
    "empty": b"",
}

ATTACKS: tuple[Attack, ...] = (
    *named("manifest", _INSPECTED, INSPECT),
    *named("restored manifest", _RESTORED, RESTORE),
    *named("verified manifest", _VERIFIED, VERIFY),
    Attack(
        "converted manifest: another adapter",
        CONVERT,
        "is not the one that",
        manifest(lambda table: table["files"].update({f"pissa_init/{WEIGHTS}": _DIGEST})),
    ),
    *named("merge record", _MERGED, PUBLISH_MERGED),
    *named("conversion record", _CONVERTED, PUBLISH_LORA),
    *(
        Attack(f"plan of an earlier run: {name}", DECOMPOSE, "-> out: residual", plan(data), code=0, writes=True)
        for name, data in _PLANS.items()
    ),
)
