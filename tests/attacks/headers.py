"""Hostile safetensors headers, and what is no safetensors file at all."""

from __future__ import annotations

import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import DECOMPOSE, Attack, named, replaced, sparse, store, tensor
from .sound import INDEX, SHARDS

MODEL = "model.safetensors"
TOO_LONG = "at most 25000000 are read"


def single(folder: Path) -> Path:
    """Where the one file of the source is to be; its shards and index are gone."""
    for name in (*SHARDS, INDEX):
        (folder / "source" / name).unlink()
    return folder / "source" / MODEL


def header(table: Any, data: bytes = b"") -> Callable[[Path], None]:
    return lambda folder: store(single(folder), table, data)


def content(data: bytes) -> Callable[[Path], object]:
    return lambda folder: single(folder).write_bytes(data)


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something that is no file in the place of the second shard."""
    return lambda folder: replaced(folder / "source" / SHARDS[1], make)


def _many(count: int, fields: str) -> Callable[[Path], None]:
    names = (f'"model.layers.{number}.weight":{fields}' for number in range(count))
    return lambda folder: store(single(folder), "{" + ",".join(names) + "}")


def _archive(folder: Path) -> None:
    with zipfile.ZipFile(single(folder), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Marker()))


class _Marker:
    """A pickle that leaves a file behind when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # its address has room for a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


_BYTE = b"\0"
_CASES = {
    "length 2^64 - 1": (TOO_LONG, content(b"\xff" * 8 + b"{}")),
    "length 0": ("does not begin with", content(bytes(8))),
    "length past the end": ("bytes of its header are missing", content((9999).to_bytes(8, "little") + b"{}")),
    "no length": ("is too short", content(b"\1\0")),
    "empty file": ("is too short", content(b"")),
    "header of 200 MB, sparse": (
        TOO_LONG,
        lambda folder: sparse(single(folder), (200_000_000).to_bytes(8, "little") + b"{", 200_000_100),
    ),
    "header of 25 MB of zeros, sparse": (
        "is not valid JSON",
        lambda folder: sparse(single(folder), (25_000_000).to_bytes(8, "little") + b"{", 25_000_100),
    ),
    "header of 25 MB of blanks": (
        "is not valid JSON",
        lambda folder: store(single(folder), b"{" + b" " * 24_999_999),
    ),
    "header of 24 MB in one name": ("has a name that is", lambda folder: store(single(folder), {"x" * 24_000_000: 1})),
    "file of a terabyte, sparse": ("bytes after its last tensor", lambda folder: _terabyte(single(folder))),
    "nested 50,000 deep": ("nested too deeply", header('{"a":' * 50_000)),
    "nested 900 deep": ("exactly dtype, shape and data_offsets", header('{"a":' * 900 + "1" + "}" * 900)),
    "lists 100,000 deep in metadata": ("nested too deeply", header('{"__metadata__":' + "[" * 100_000)),
    "the same tensor twice": (
        "repeats the key 'a'",
        header('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":0}', _BYTE),
    ),
    "the same field twice": (
        "repeats the key 'dtype'",
        header('{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', _BYTE),
    ),
    "overlap": ("overlaps the tensor before it", header({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6))),
    "one place for two": ("overlaps the tensor before it", header({"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4))),
    "hole": ("leaves a hole", header({"a": tensor(0, 2), "b": tensor(4, 6)}, bytes(6))),
    "bytes after the end": ("bytes after its last tensor", header({"a": tensor(0, 2)}, b"PK\3\4")),
    "truncated": ("is truncated", header({"a": tensor(0, 1 << 40)}, bytes(9))),
    "shape that overflows": ("overflows 63 bits", header({"a": tensor(0, 0, shape=[2**40, 2**40, 0])})),
    "shape times dtype that overflows": ("spans 0 bytes", header({"a": tensor(0, 0, "F64", [2**62])})),
    "negative size": ("at most 32 sizes", header({"a": tensor(0, 1, shape=[-1])}, _BYTE)),
    "size that is a fraction": ("at most 32 sizes", header({"a": tensor(0, 1, shape=[1.0])}, _BYTE)),
    "size that is true": ("at most 32 sizes", header({"a": tensor(0, 1, shape=[True])}, _BYTE)),
    "size of 10^400": ("holds an integer of 401 digits", header({"a": tensor(0, 1, shape=[10**400])}, _BYTE)),
    "size of ten million digits": (
        "holds an integer of 10000000 digits",
        header('{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + "9" * 10_000_000 + "]}}", _BYTE),
    ),
    "a thousand dimensions": ("at most 32 sizes", header({"a": tensor(0, 1, shape=[1] * 1000)}, _BYTE)),
    "offsets reversed": ("data_offsets that are not", header({"a": {**tensor(0, 1), "data_offsets": [1, 0]}}, _BYTE)),
    "offset beyond 2^63": (
        "data_offsets that are not",
        header({"a": {**tensor(0, 1), "data_offsets": [0, 2**63]}}, _BYTE),
    ),
    "offset NaN": ("holds NaN", header('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,NaN]}}', _BYTE)),
    "unknown dtype": ("has the unknown dtype", header({"a": tensor(0, 1, "PICKLE")}, _BYTE)),
    "dtype of a megabyte": ("has the unknown dtype", header({"a": tensor(0, 1, "X" * 1_000_000)}, _BYTE)),
    "dtype that is a list": ("has no dtype name", header({"a": tensor(0, 1, ["U8"])}, _BYTE)),
    "name with NUL": ("has a name that is", header({"a\0b": tensor(0, 1)}, _BYTE)),
    "name with a line break": ("has a name that is", header({"a\nerror: all is well": tensor(0, 1)}, _BYTE)),
    "name with escapes for the terminal": ("has a name that is", header({"\x1b[2J\x1b]0;x\7": tensor(0, 1)}, _BYTE)),
    "name with C1 escapes": ("has a name that is", header({"\x9b31m": tensor(0, 1)}, _BYTE)),
    "name that turns the line around": ("has a name that is", header({"\u202egpj.exe": tensor(0, 1)}, _BYTE)),
    "name of half a character": ("half of a surrogate pair", header({"\ud800": tensor(0, 1)}, _BYTE)),
    "name of a megabyte": ("has a name that is", header({"x" * 1_000_000: tensor(0, 1)}, _BYTE)),
    "empty name": ("has a name that is", header({"": tensor(0, 1)}, _BYTE)),
    "half a million tensors": ("describes more than 80000 tensors", _many(500_000, "{}")),
    "a million sizes": ("holds more than 640000 values", header({"a": tensor(0, 1, shape=[1] * 1_000_000)}, _BYTE)),
    "as many tensors as are read, the first bad": ("is not described by", _many(80_000, "{}")),
    "80,000 tensors, the last bad": (
        "leaves a hole",
        _many(80_000, '{"dtype":"U8","shape":[1,1],"data_offsets":[1,2]}'),
    ),
    "metadata that are no strings": ("__metadata__ 'a' is not a string", header({"__metadata__": {"a": 1}})),
    "metadata that are a list": ("__metadata__ is not an object", header({"__metadata__": [1]})),
    "byte order mark": ("does not begin with", header(b"\xef\xbb\xbf{}")),
    "UTF-16": ("does not begin with", header("{}".encode("utf-16"))),
    "not UTF-8": ("is not UTF-8", header(b'{"\xff\xfe":1}')),
    "only scalars and empty tensors": (
        "rank 2 does not fit b.weight of shape [0, 5]",
        header({"a": tensor(0, 1, shape=[]), "b.weight": tensor(1, 1, shape=[0, 5])}, _BYTE),
    ),
    "no tensors": ("holds no Linear or Conv1D weight", header({})),
    "LFS pointer": ("is a Git LFS pointer", content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
    "pickle under another name": (TOO_LONG, lambda folder: content(pickle.dumps(_Marker()))(folder)),
    "zip under another name": (TOO_LONG, _archive),
    "GGUF under another name": (TOO_LONG, content(b"GGUF\3\0\0\0" + bytes(64))),
    "web page under another name": (TOO_LONG, content(b"<!DOCTYPE html><html>404</html>")),
    "pickles alone": ("is a pickle", lambda folder: single(folder).with_suffix(".bin").write_bytes(b"\x80\2.")),
}
_SPECIAL = {
    "folder": ("is not a file", instead(Path.mkdir)),
    "link to itself": ("is missing", instead(_loop)),
    "dangling link": ("is missing", instead(lambda path: path.symlink_to("nowhere"))),
    "link to /dev/zero": ("is not a file", instead(lambda path: path.symlink_to("/dev/zero"))),
    "link to /dev/stdin": ("is not a file", instead(lambda path: path.symlink_to("/dev/stdin"))),
    "pipe": ("is not a file", instead(lambda path: os.mkfifo(path))),
    "socket": ("is not a file", instead(_socket)),
    "link to a file of the system": ("", instead(lambda path: path.symlink_to("/etc/passwd"))),
}


def _terabyte(path: Path) -> None:
    store(path, {"a": tensor(0, 1)}, _BYTE)
    with path.open("r+b") as file:
        file.truncate(1 << 40)


ATTACKS: tuple[Attack, ...] = (
    *named("header", _CASES, DECOMPOSE),
    *named("in place of a shard", _SPECIAL, DECOMPOSE),
)
