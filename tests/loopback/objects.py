"""The large object store of a loopback Hub: a folder of files named by their sha256."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import xet


class ObjectStore:
    """Contents by sha256, written atomically. With Xet they also lie in ``cas``, and clients work on copies of that.

    Args:
        folder: of the hub.
        with_xet: give large contents a Xet hash, so that clients download them through hf_xet.
    """

    def __init__(self, folder: Path, with_xet: bool) -> None:
        self.folder = folder / "objects"
        self.cas = folder / "cas"
        self.clones = folder / "clones"
        self.parts = folder / "parts"
        self.with_xet = with_xet
        for needed in (self.folder, self.cas, self.clones, self.parts):
            needed.mkdir(parents=True, exist_ok=True)

    def add(self, chunks: Iterable[bytes], expected: str | None = None) -> str:
        """Store a content and return its sha256.

        Raises:
            ValueError: the content has another sha256 than the expected one; nothing is stored.
        """
        digest = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if expected not in (None, digest.hexdigest()):
                raise ValueError(f"the content has sha256 {digest.hexdigest()}, not {expected}")
            Path(name).replace(self.folder / digest.hexdigest())
        finally:
            Path(name).unlink(missing_ok=True)
        return digest.hexdigest()

    def path(self, sha256: str) -> Path:
        """The file that holds a content.

        Raises:
            KeyError: the store does not have it.
        """
        path = self.folder / sha256
        if not path.exists():
            raise KeyError(sha256)
        return path

    def has(self, sha256: str) -> bool:
        return (self.folder / sha256).exists()

    def part(self, upload: str, number: int) -> Path:
        """Where part ``number`` (from 1) of a multipart upload waits for the others."""
        return self.parts / f"{upload}-{number}"

    def clone(self) -> Path:
        """A Xet folder for one client."""
        return xet.copy(self.cas, self.clones / str(len(list(self.clones.iterdir()))))

    def collect(self, wanted: Iterable[str]) -> None:
        """Take over what clients left in their Xet folders, of the contents wanted here."""
        missing = {sha256 for sha256 in wanted if not self.has(sha256)}
        for clone in sorted(self.clones.iterdir()) if missing else []:
            found = {sha256: file for sha256, file in xet.files(clone).items() if sha256 in missing}
            if not found:
                continue
            with tempfile.TemporaryDirectory(dir=self.folder.parent) as name:
                unlocked = xet.copy(clone, Path(name) / "cas")
                for sha256, file in found.items():
                    xet.get(unlocked, file, Path(name) / "content")
                    self.add([(Path(name) / "content").read_bytes()], sha256)
                    missing.discard(sha256)

    def publish(self, wanted: Iterable[str]) -> None:
        """Let Xet clients find these contents."""
        known = xet.files(self.cas)
        if self.with_xet and (new := [self.path(sha256) for sha256 in wanted if sha256 not in known]):
            xet.put(self.cas, new)

    def xet_hash(self, sha256: str) -> str | None:
        """The hash under which Xet clients find a content, None if they do not."""
        known = xet.files(self.cas).get(sha256)
        return known.hash if known else None


@dataclass(frozen=True)
class Entry:
    """A file in a commit: its content's sha256 and size in bytes, and how git refers to it."""

    sha256: str
    size: int
    lfs: bool
    blob_id: str

    @classmethod
    def regular(cls, content: bytes) -> Entry:
        return cls(hashlib.sha256(content).hexdigest(), len(content), False, git_blob_id(content))

    @classmethod
    def large(cls, sha256: str, size: int) -> Entry:
        return cls(sha256, size, True, git_blob_id(pointer(sha256, size)))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
