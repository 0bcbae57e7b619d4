"""Xet storage in a folder, as hf_xet keeps it behind a ``local://`` URL.

hf_xet locks such a folder until its process ends. So every client gets a copy of its own, what it leaves there is
collected when it commits, and the hub's own work with hf_xet is done by this file run as a short-lived process.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Of a metadata shard: a header, then records of 48 bytes. A file's record starts with its hash, its flags and the
# number of its segments; a record follows for each segment, another for its verification, and one with the sha256.
SHARD_HEADER, RECORD = 48, 48
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30
END = b"\xff" * 32


@dataclass(frozen=True)
class XetFile:
    """A file in Xet storage: the hash that Xet clients ask for, and the size in bytes."""

    hash: str
    size: int


def files(cas: Path) -> dict[str, XetFile]:
    """The files in a storage folder, by sha256."""
    return {
        sha256: file
        for shard in sorted(cas.glob("xet/xorbs/shards/*.mdb"))
        for sha256, file in _in_shard(shard.read_bytes())
    }


def _in_shard(shard: bytes) -> Iterator[tuple[str, XetFile]]:
    position = SHARD_HEADER
    while shard[position : position + 32] != END:
        flags, segments = struct.unpack_from("<II", shard, position + 32)
        hash_, first = _hex(shard, position), position + RECORD
        size = sum(struct.unpack_from("<I", shard, first + RECORD * index + 36)[0] for index in range(segments))
        position = first + RECORD * segments * (2 if flags & WITH_VERIFICATION else 1)
        if flags & WITH_SHA256:
            yield _hex(shard, position), XetFile(hash_, size)
            position += RECORD


def _hex(shard: bytes, position: int) -> str:
    """A hash of 32 bytes, which Xet writes as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", shard, position))


def copy(cas: Path, target: Path) -> Path:
    """A storage folder with the same files, to be locked and changed on its own."""

    def link(source: str, destination: str) -> None:
        if "default." in source:
            os.link(source, destination)
        else:
            shutil.copyfile(source, destination)

    shutil.copytree(cas, target, copy_function=link, ignore=shutil.ignore_patterns("shard-session"))
    return target


def put(cas: Path, paths: list[Path]) -> None:
    """Add files to a storage folder that nobody has locked."""
    _process(cas, "put", *map(str, paths))


def get(cas: Path, file: XetFile, path: Path) -> None:
    """Reconstruct a file from a storage folder that nobody has locked."""
    _process(cas, "get", file.hash, str(file.size), str(path))


def _process(cas: Path, *arguments: str) -> None:
    command = [sys.executable, __file__, str(cas), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"hf_xet failed on {cas}: {done.stderr}")


def _main(cas: str, action: str, *arguments: str) -> None:
    import hf_xet

    session, endpoint = hf_xet.XetSession(), f"local://{cas}"
    if action == "put":
        with session.new_upload_commit(endpoint=endpoint) as commit:
            for path in arguments:
                commit.start_upload_file(path, sha256=hf_xet.COMPUTE_SHA256)
    else:
        hash_, size, path = arguments
        with session.new_file_download_group(endpoint=endpoint) as group:
            group.start_download_file(hf_xet.XetFileInfo(hash_, int(size)), path)


if __name__ == "__main__":
    _main(*sys.argv[1:])
