"""Shards of a repository that come one after the other, the next one while the last is read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pissa_hub.errors import HubError
from pissa_hub.hub.repository import Repository, silent_bar

_POLL_SECONDS = 0.1
# A download notices between two chunks that nobody wants it any more.
_GRACE_SECONDS = 3.0
# What a killed process leaves under a name that no other one takes up.
_ORPHAN = re.compile(r".*\.[0-9a-f]{8}\.incomplete")


class _StoppedError(Exception):
    """The consumer is gone."""


@dataclass(frozen=True)
class Downloads:
    """Shards in the order of their use.

    Args:
        repository: that holds them.
        names: of the shards.
        work: where each lies until the next is asked for: two are on this disk at most, but for what the cache has
            anyway. None for the client's cache, where they stay.
    """

    repository: Repository
    names: tuple[str, ...]
    work: Path | None
    _stopped: Event = field(default_factory=Event, init=False, repr=False)

    def __iter__(self) -> Iterator[Path]:
        self._tidy()
        download = self._start(0)
        try:
            for position in range(len(self.names)):
                assert download is not None
                path = download.result()
                download = self._start(position + 1)
                yield path
                if self.work is not None:
                    shutil.rmtree(self._folder(self.work, position), ignore_errors=True)
        finally:
            self.close()
            if download is not None:
                download.join(_GRACE_SECONDS)

    def close(self) -> None:
        self._stopped.set()

    def _start(self, position: int) -> _Download | None:
        if position == len(self.names):
            return None
        folder = None if self.work is None else self._folder(self.work, position)
        return _Download(self.repository, self.names[position], folder, self._stopped)

    def _folder(self, work: Path, position: int) -> Path:
        return work / self.names[position].removesuffix(".safetensors")

    def _tidy(self) -> None:
        """Keep of an interrupted run only what comes next."""
        if self.work is None or not self.work.is_dir():
            return
        coming = {self._folder(self.work, position) for position in range(min(len(self.names), 2))}
        for folder in self.work.iterdir():
            if folder not in coming:
                shutil.rmtree(folder, ignore_errors=True)
        for path in self.work.rglob("*.incomplete"):
            if _ORPHAN.fullmatch(path.name):
                path.unlink(missing_ok=True)


class _Download(Thread):
    """One shard on its way."""

    def __init__(self, repository: Repository, name: str, folder: Path | None, stopped: Event) -> None:
        super().__init__(name="download", daemon=True)
        self._repository = repository
        self._name = name
        self._folder = folder
        self._stopped = stopped
        self._path: Path | None = None
        self._error: BaseException | None = None
        self.start()

    def result(self) -> Path:
        """Where the shard lies. Raises what stopped the download."""
        while self.is_alive() and not self._stopped.is_set():
            self.join(_POLL_SECONDS)
        if self._error is not None:
            raise self._error
        if self._path is None:
            raise HubError(f"{self._name} is no longer waited for", "run the same command again to carry on")
        return self._path

    def run(self) -> None:
        try:
            self._path = self._repository.cached(self._name) or self._repository.fetch(
                self._name, self._folder, _bar_that_stops(self._stopped), self._stopped.wait
            )
        except BaseException as error:
            self._error = error


def _bar_that_stops(stopped: Event) -> type[Any]:
    """The client's only call-back: told of every chunk, it ends the download by an error."""

    class Stopping(silent_bar()):  # type: ignore[misc]  # a class made by a function
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise _StoppedError
            return None

    return Stopping
