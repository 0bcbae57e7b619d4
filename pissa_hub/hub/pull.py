"""Sources by name: a folder on this disk, or ``org/name[@revision]`` on the Hub. A folder of that name wins."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pissa_hub.checkpoint.ancillary import MAX_MODULES_BYTES, MODULES_NAME, carried_over
from pissa_hub.checkpoint.files import Folder, Pin, Supply
from pissa_hub.checkpoint.header import Header
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import (
    HUB_ID,
    Checkpoint,
    open_checkpoint,
    read_checkpoint,
    read_files,
    require_original,
)
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import HubError
from pissa_hub.hub.downloads import Downloads
from pissa_hub.hub.repository import Repository, open_repository

# Commits that names stand for; see ``checkpoint.files.Pin.key``.
Pins = Mapping[str, str]
_NO_PINS: Pins = {}
_SOURCE_FOLDER = "source"


@dataclass(frozen=True)
class PulledFolder:
    """A folder with what was asked for, and where on the Hub it is from; ``pin`` is None for one that was here."""

    folder: Path
    pin: Pin | None


def pull_original(source: str | Path, *, pins: Pins = _NO_PINS, keep: bool = True) -> Checkpoint:
    """``checkpoint.source.open_checkpoint``, of a repository too.

    Args:
        source: a folder, a ``.safetensors`` file, or ``org/name[@revision]``.
        pins: commits that an interrupted run went by.
        keep: whether shards that are fetched stay in the client's cache; else each is removed once it was read.

    Raises:
        CheckpointError: it is no original checkpoint.
        HubError: the repository cannot be read.
    """
    files = _on_hub(source, pins, keep)
    if files is None:
        return open_checkpoint(source)
    require_original(files)
    return read_files(files)


def pull_checkpoint(source: str | Path, *, pins: Pins = _NO_PINS, keep: bool = True) -> Checkpoint:
    """``checkpoint.source.read_checkpoint``, of a repository too; see :func:`pull_original`."""
    files = _on_hub(source, pins, keep)
    return read_checkpoint(source) if files is None else read_files(files)


def pull_folder(source: str | Path, names: Collection[str] | None = None, *, pins: Pins = _NO_PINS) -> PulledFolder:
    """A folder as it is, or one in the client's cache with the files of a repository that are asked for.

    Args:
        source: a folder or ``org/name[@revision]``.
        names: relative POSIX names of the files that matter, as far as there are such; None for all.
        pins: commits that an interrupted run went by.

    Raises:
        HubError: the repository cannot be read, or has none of the files.
    """
    files = _on_hub(source, pins, keep=True)
    if files is None:
        return PulledFolder(Path(source), None)
    found = [name for name in files.repository.files if names is None or name in names]
    if not found:
        wanted = "no file" if names is None else f"neither {' nor '.join(sorted(names))}"
        raise HubError(f"{files.place} holds {wanted}", "check the name and the revision")
    for name in found:
        files.repository.fetch(name)
    return PulledFolder(files.folder, files.pin)


@dataclass(frozen=True)
class HubFiles:
    """A checkpoint on the Hub; see ``checkpoint.files.Files``."""

    repository: Repository
    keep: bool

    @property
    def place(self) -> PurePosixPath:
        return PurePosixPath(self.pin.repo_id)

    @property
    def folder(self) -> Path:
        return self.repository.snapshot

    @property
    def pin(self) -> Pin:
        return self.repository.pin

    @property
    def origin(self) -> tuple[str, str]:
        return self.pin.repo_id, self.pin.commit

    def names(self) -> list[str]:
        return sorted(name for name in self.repository.files if "/" not in name)

    def other_files(self) -> tuple[str, ...]:
        is_there = MODULES_NAME in self.repository.files and self.size(MODULES_NAME) <= MAX_MODULES_BYTES
        modules = self.path(MODULES_NAME).read_bytes() if is_there else None
        return carried_over(self.place, self.repository.files, modules)

    def has(self, name: str) -> bool:
        return any(found == name or found.startswith(f"{name}/") for found in self.repository.files)

    def size(self, name: str) -> int:
        return self.repository.files[name].size

    def find(self, name: str) -> Path | None:
        return self.path(name) if name in self.repository.files else None

    def path(self, name: str) -> Path:
        return self.repository.fetch(name)

    def headers(self, names: Sequence[str]) -> list[Header]:
        return self.repository.headers(names)

    def holds(self, name: str, digest: FileDigest, span: range | None = None) -> bool:
        if span is not None:
            return Folder(self.path(name).parent).holds(name, digest, span)
        file = self.repository.files[name]
        sha256 = file.sha256 or sha256_file(self.path(name))[1]
        return digest == FileDigest(file.size, sha256)

    def require_intact(self, name: str, found: FileDigest) -> None:
        if self.repository.files[name].sha256 in (None, found.sha256):
            return
        cached = self.repository.cached(name)
        remedy = "run the same command again" if cached is None else f"remove {cached.resolve()} and run it again"
        raise HubError(f"{self.place / name} arrived with another SHA-256 than the Hub has of it", remedy)

    def require_unchanged(self) -> None:
        """A commit never changes."""

    def room(self, names: Sequence[str]) -> int:
        if self.keep:
            return 0
        return sum(sorted(self.size(name) for name in names if self.repository.cached(name) is None)[-2:])

    def supply(self, names: Iterable[str], work: Path, coming: Collection[str] = ()) -> Supply:
        return Downloads(self.repository, names, None if self.keep else work / _SOURCE_FOLDER, coming)


def _on_hub(source: str | Path, pins: Pins, keep: bool) -> HubFiles | None:
    """The repository that a source is the id of; None for a path."""
    found = HUB_ID.fullmatch(PurePosixPath(source).as_posix())
    if found is None or Path(source).exists():
        return None
    repo_id, revision = found[1], found[2]
    pin = Pin(repo_id, revision or "main", "")
    return HubFiles(open_repository(repo_id, revision, pins.get(pin.key)), keep)
