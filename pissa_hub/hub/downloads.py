"""Shards of a repository that come one after the other, the next one while the last is read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pissa_hub.errors import CARRY_ON, HubError
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
        names: of the shards, each taken when the one before it has come.
        work: where each lies until the next is asked for: two are on this disk at most, but for what the cache has
            anyway. None for the client's cache, where they stay.
        coming: names that are to come; what an interrupted run left of others is removed.
    """

    repository: Repository
    names: Iterable[str]
    work: Path | None
    coming: Collection[str] = ()
    _stopped: Event = field(default_factory=Event, init=False, repr=False)

    def __iter__(self) -> Iterator[Path]:
        self._tidy()
        names = iter(self.names)
        download = _Download(self.repository, names, self.work, self._stopped)
        try:
            while (path := download.result()) is not None:
                folder = download.folder
                download = _Download(self.repository, names, self.work, self._stopped)
                yield path
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            self.close()
            download.join(_GRACE_SECONDS)

    def close(self) -> None:
        self._stopped.set()

    def _tidy(self) -> None:
        """Keep of an interrupted run only what comes next."""
        if self.work is None or not self.work.is_dir():
            return
        coming = {_folder(self.work, name) for name in self.coming}
        for folder in self.work.iterdir():
            if folder not in coming:
                shutil.rmtree(folder, ignore_errors=True)
        for path in self.work.rglob("*.incomplete"):
            if _ORPHAN.fullmatch(path.name):
                path.unlink(missing_ok=True)


class _Download(Thread):
    """One shard on its way, if there is one more: even to ask for its name may take until the one before it is done."""

    def __init__(self, repository: Repository, names: Iterator[str], work: Path | None, stopped: Event) -> None:
        super().__init__(name="download", daemon=True)
        self.folder: Path | None = None
        self._repository = repository
        self._names = names
        self._work = work
        self._stopped = stopped
        self._path: Path | None = None
        self._error: BaseException | None = None
        self.start()

    def result(self) -> Path | None:
        """Where the shard lies; None if there is none. Raises what stopped the download."""
        while self.is_alive() and not self._stopped.is_set():
            self.join(_POLL_SECONDS)
        if self._error is not None:
            raise self._error
        if self.is_alive():
            raise HubError("the download is no longer waited for", CARRY_ON)
        return self._path

    def run(self) -> None:
        try:
            name = next(self._names, None)
            if name is None:
                return
            self.folder = None if self._work is None else _folder(self._work, name)
            self._path = self._repository.cached(name) or self._repository.fetch(
                name, self.folder, _bar_that_stops(self._stopped), self._stopped.wait
            )
        except BaseException as error:  # raised again by result()
            self._error = error


def _folder(work: Path, name: str) -> Path:
    return work / name.removesuffix(".safetensors")


def _bar_that_stops(stopped: Event) -> type[Any]:
    """The client's only call-back: told of every chunk, it ends the download by an error."""

    class Stopping(silent_bar()):  # type: ignore[misc]  # a class made by a function
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise _StoppedError
            return None

    return Stopping
