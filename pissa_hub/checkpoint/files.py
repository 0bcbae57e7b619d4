"""The files of a checkpoint, wherever they lie: what is asked of a place, and a folder as such a place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Protocol

from pissa_hub.checkpoint.ancillary import other_files
from pissa_hub.checkpoint.header import Header, read_header
from pissa_hub.checkpoint.opening import open_unbuffered
from pissa_hub.checkpoint.reader import feed, reading, sha256_file
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import CheckpointError, ReadError

_CACHE_FOLDER = re.compile(r"models--(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Pin:
    """A revision of a Hub repository as it was asked for, and the commit that it stood for then."""

    repo_id: str
    asked: str
    commit: str

    @property
    def key(self) -> str:
        return f"{self.repo_id}@{self.asked}"


class Supply(Protocol):
    """Shards that come to this disk one after the other."""

    def __iter__(self) -> Iterator[Path]:
        """Where each of them lies until the next one is asked for; iterated once, on one thread."""

    def close(self) -> None:
        """Stop; from any thread, also while another one waits for a shard, which then gets an error."""


class Files(Protocol):
    """Where a checkpoint lies. Names are relative and POSIX; whatever fails raises a PissaHubError."""

    @property
    def place(self) -> PurePath:
        """The folder or the repository's id, for messages."""

    @property
    def folder(self) -> Path:
        """Where :meth:`find` puts what it finds."""

    @property
    def pin(self) -> Pin | None:
        """On the Hub, which commit this is."""

    @property
    def origin(self) -> tuple[str, str] | tuple[None, None]:
        """Repository and commit on the Hub, as far as they are known."""

    def names(self) -> list[str]:
        """Files at the top, sorted."""

    def other_files(self) -> tuple[str, ...]:
        """What is carried over; see ``checkpoint.ancillary``."""

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def find(self, name: str) -> Path | None:
        """A file on this disk, fetched where it was not; None if there is none."""

    def path(self, name: str) -> Path:
        """:meth:`find`, of a file that there is."""

    def headers(self, names: Sequence[str]) -> list[Header]:
        """Of safetensors files, without their tensors."""

    def holds(self, name: str, digest: FileDigest, span: range | None = None) -> bool:
        """Whether a shard, or a span of its bytes, has this content."""

    def require_intact(self, name: str, found: FileDigest) -> None:
        """Raises unless what a supply gave, all of it just read, is what it was to give."""

    def require_unchanged(self) -> None:
        """Raises ReadError unless all files are those that were there when the work was planned."""

    def room(self, names: Sequence[str]) -> int:
        """Most bytes of a supply that are in its work folder at once."""

    def supply(self, names: Iterable[str], work: Path, coming: Collection[str] = ()) -> Supply:
        """Shards in the order of their use.

        Args:
            names: taken one by one, as late as can be.
            work: folder for what is not to stay.
            coming: which of them will be the first; of others, nothing is kept that an interrupted run left.
        """


@dataclass(frozen=True)
class Folder:
    """A checkpoint on this disk; a snapshot in the Hub's cache knows its origin."""

    folder: Path
    _stamps: dict[str, _Stamp] = field(default_factory=dict, init=False, repr=False, compare=False)

    pin = None

    @property
    def place(self) -> Path:
        return self.folder

    @property
    def origin(self) -> tuple[str, str] | tuple[None, None]:
        commit = self.folder.absolute()
        cached = _CACHE_FOLDER.fullmatch(commit.parent.parent.name)
        if cached is None or commit.parent.name != "snapshots" or not _COMMIT.fullmatch(commit.name):
            return None, None
        return cached[1].replace("--", "/"), commit.name

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def other_files(self) -> tuple[str, ...]:
        return other_files(self.folder)

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def find(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def path(self, name: str) -> Path:
        return self.folder / name

    def headers(self, names: Sequence[str]) -> list[Header]:
        with reading(self.folder):
            self._stamps.update((name, _stamp(self.folder / name)) for name in (*names, *self.other_files()))
        return [read_header(self.folder / name) for name in names]

    def holds(self, name: str, digest: FileDigest, span: range | None = None) -> bool:
        path = self.folder / name
        try:
            if span is not None:
                return digest == _digest_of(path, span)
            return path.stat().st_size == digest.size and FileDigest(*sha256_file(path)) == digest
        except (OSError, CheckpointError):
            return False

    def require_intact(self, name: str, found: FileDigest) -> None:
        """The file is its own standard, as long as it is the one that was there when the work was planned."""
        path = self.folder / name
        with reading(path):
            if self._stamps.get(name) != _stamp(path):
                raise ReadError(f"{path} changed while being read", "leave the source alone and start again")

    def require_unchanged(self) -> None:
        for name, stamp in self._stamps.items():
            path = self.folder / name
            with reading(path):
                if stamp != _stamp(path):
                    raise ReadError(f"{path} changed meanwhile", "leave the source alone and start again")

    def room(self, names: Sequence[str]) -> int:
        return 0

    def supply(self, names: Iterable[str], work: Path, coming: Collection[str] = ()) -> Supply:
        return _OnDisk(self.folder, names)


@dataclass(frozen=True)
class _OnDisk:
    """Shards that lie here already."""

    folder: Path
    names: Iterable[str]

    def __iter__(self) -> Iterator[Path]:
        return (self.folder / name for name in self.names)

    def close(self) -> None:
        """Nobody waits."""


def _stamp(path: Path) -> _Stamp:
    """What changes when a file is written or replaced: device, inode, size and time of the last change."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest_of(path: Path, span: range) -> FileDigest:
    digest = hashlib.sha256()
    with reading(path), open_unbuffered(path) as file:
        file.seek(span.start)
        size = feed(digest, file, len(span))
    return FileDigest(size, digest.hexdigest())
