"""Where the finished shards of a job go: they stay in the output folder, or another place takes them over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pissa_hub.checkpoint.writer import FileDigest


class Place(Protocol):
    """Where the stream's finished files go."""

    def permits(self, name: str) -> bool:
        """Whether a file that is written may take its name."""

    def add(self, name: str, path: Path, digest: FileDigest) -> None:
        """Take a finished file."""

    def close(self) -> None:
        """Let nobody wait in :meth:`add`, from any thread."""


class Destination(Protocol):
    """A place for all finished shards of a job."""

    @property
    def held(self) -> Mapping[str, FileDigest]:
        """Files that are there and need not lie in the output folder."""

    def add(self, name: str, path: Path, digest: FileDigest) -> None:
        """Take a finished shard; its file may be gone afterwards. Raises HubError or OutputError."""

    def close(self) -> None:
        """Stop; from any thread, also while another one waits in :meth:`add`, which then gets an error."""

    def commit(self, folder: Path) -> Any:
        """The folder is finished: make what was added final, and return what there is to say of it."""

    def abandon(self) -> None:
        """The input turned out to be bad: leave nothing of what was added."""


class InPlace:
    """The output folder itself."""

    held: Mapping[str, FileDigest] = {}

    def add(self, name: str, path: Path, digest: FileDigest) -> None:
        """It lies where it shall."""

    def close(self) -> None:
        """Nobody waits."""

    def commit(self, folder: Path) -> None:
        """It is final."""

    def abandon(self) -> None:
        """Who wrote the files removes them."""
