"""One process's share of a job: it takes units from the schedule, streams them, and joins what was cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Generic, Protocol, TypeVar

import torch

from pissa_hub.checkpoint.files import Files, Supply
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import CARRY_ON, ReadError
from pissa_hub.pipeline.destination import Destination
from pissa_hub.pipeline.fallback import Resilient
from pissa_hub.pipeline.pieces import Division, Piece, bytes_read, join
from pissa_hub.pipeline.planned import PlannedShard, PlannedWeight, span_of
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.schedule import Schedule
from pissa_hub.pipeline.stream import Worker, stream

W = TypeVar("W", bound=PlannedWeight)


class Workload(Protocol[W]):
    """The part of a job that can be shared: what becomes of its shards."""

    @property
    def source(self) -> Files:
        """Where the shards come from."""

    @property
    def shards(self) -> Sequence[PlannedShard[W]]:
        """In the order of the work."""

    @property
    def device(self) -> torch.device:
        """That computes."""

    @property
    def workers(self) -> int:
        """How many weights to have in hand at once."""

    def worker(self, device: torch.device) -> Worker[W]:
        """A worker for the stream."""

    def accept(self, receipt: Receipt) -> None:
        """Raises VerificationError if a finished shard, read or written, is not what it should be."""


class Share(Generic[W]):
    """What this process does of the work, and the place where the stream's finished shards go.

    Args:
        job, output, work: what is to be done, and the folders.
        schedule: says which units of it.
        destination: of the shards.
    """

    def __init__(
        self, job: Workload[W], output: Path, work: WorkFolder, schedule: Schedule, destination: Destination
    ) -> None:
        self._job, self._output, self._work = job, output, work
        self._schedule, self._destination = schedule, destination
        self._numbers: dict[str, int] = {}
        self._delivering = Lock()

    def do(self, division: Division[W]) -> None:
        job, progress = self._job, self._schedule.progress
        rooms = [weight.room for shard in job.shards for weight in shard.weights.values()]
        equip = partial(Resilient[W], job.worker, job.device, progress.note)
        stream(
            self._to_do(division),
            self._supply,
            self._output,
            self._work,
            equip=equip,
            workers=job.workers,
            room=max(rooms, default=0),
            accept=self._accept,
            place=self,
            progress=progress,
        )

    def permits(self, name: str) -> bool:
        """Whether this process, if it has slept, still has the unit."""
        return self._schedule.has(self._numbers[name])

    def add(self, name: str, path: Path, digest: FileDigest) -> None:
        """A shard or piece is finished."""
        self._schedule.done(self._numbers[name])
        if name in self._sources:
            with self._delivering:
                self._destination.add(name, path, digest)

    def close(self) -> None:
        """Let nobody wait, for work or for a place."""
        self._schedule.close()
        self._destination.close()

    @cached_property
    def _sources(self) -> set[str]:
        """Names of whole shards."""
        return {shard.name for shard in self._job.shards}

    def _to_do(self, division: Division[W]) -> Iterator[PlannedShard[W]]:
        """What is left to be done, and on the way what needs no stream."""
        for number in self._schedule.units(len(division), division.needs):
            is_join = number >= len(division.units)
            shard = division.joins[number - len(division.units)] if is_join else division.units[number]
            self._numbers[shard.name] = number
            known = self._known(shard)
            if known is None and is_join:
                known = self._joined(shard, division.pieces(number))
            elif known is None:
                yield shard
                continue
            elif not is_join:
                self._schedule.count("carried", shard.name in self._sources)
                self._schedule.progress.advance(bytes_read(shard))
            self.add(shard.name, self._output / shard.name, known.output)

    def _known(self, shard: PlannedShard[W]) -> Receipt | None:
        """The receipt of a file that is finished."""
        return self._work.receipt(
            shard.name, self._job.source, self._destination.held, of=shard.source.name, span=span_of(shard)
        )

    def _joined(self, shard: PlannedShard[W], pieces: Sequence[Piece[W]]) -> Receipt:
        try:
            return self._join(shard, pieces)
        except ReadError:
            known = self._known(shard)  # another process, taken for dead, has joined them and removed the pieces
            if known is None:
                raise
            return known

    def _join(self, shard: PlannedShard[W], pieces: Sequence[Piece[W]]) -> Receipt:
        receipts = []
        for piece in pieces:
            receipt = self._work.read(piece.name)
            if receipt is None:
                raise ReadError(f"the receipt of {self._output / piece.name} is gone", CARRY_ON)
            receipts.append(receipt)
        source = self._job.source.path(shard.source.name)
        receipt = join(shard, pieces, receipts, source, self._output, self._work)
        self._accept(receipt)
        self._work.write(receipt)
        for path in self._work.pieces(shard.name):
            path.unlink(missing_ok=True)
        return receipt

    def _accept(self, receipt: Receipt) -> None:
        if receipt.shard in self._sources:  # what pieces are made of is checked when they are joined
            self._job.source.require_intact(receipt.shard, receipt.source)
            self._job.accept(receipt)

    def _supply(self, names: Iterable[str]) -> Supply:
        coming = [shard.source.name for shard in self._job.shards if not is_there(shard, self._work, self._destination)]
        rank = self._schedule.rank
        folder = self._work.folder / f"rank-{rank}" if rank else self._work.folder
        return self._job.source.supply(names, folder, coming[:2])


def is_there(shard: PlannedShard[W], work: WorkFolder, destination: Destination) -> bool:
    """Whether a shard seems to be finished; its bytes are read when its turn has come."""
    receipt = work.read(shard.name)
    return receipt is not None and (destination.held.get(shard.name) == receipt.output or work.is_there(receipt))
