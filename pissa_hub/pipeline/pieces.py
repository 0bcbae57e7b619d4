"""One large shard shared out among processes: cut into pieces, each a file with a receipt, and joined again.

A piece is a run of tensors in file order, and to the stream a shard like any other, except that it lies in ``.pissa/``.
Where a shard is cut follows from the shard alone, so that pieces of an interrupted run fit whoever carries on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from pissa_hub.checkpoint.header import Header, TensorEntry, build_header
from pissa_hub.checkpoint.reader import ShardReader
from pissa_hub.checkpoint.source import Shard
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter
from pissa_hub.errors import ReadError
from pissa_hub.pipeline.planned import PlannedShard, PlannedWeight
from pissa_hub.pipeline.receipts import Receipt, WorkFolder, joint_environment

W = TypeVar("W", bound=PlannedWeight)
# Of a piece, as far as tensors allow: so much that the work outweighs the files, yet enough pieces for everybody.
MIN_PIECE_BYTES = 16 << 20
_MAX_PIECES = 64
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Piece(Generic[W]):
    """Some tensors of a shard; see ``pipeline.planned.PlannedShard``.

    Attributes:
        whole: the shard.
        number: position among the pieces.
        entries: what of the source is read, in file order.
    """

    whole: PlannedShard[W]
    number: int
    entries: Sequence[TensorEntry]

    @property
    def name(self) -> str:
        return WorkFolder.piece_name(self.whole.name, self.number)

    @property
    def source(self) -> Shard:
        return self.whole.source

    @cached_property
    def weights(self) -> Mapping[str, W]:
        weights = self.whole.weights
        return {entry.name: weights[entry.name] for entry in self.entries if entry.name in weights}

    @cached_property
    def output(self) -> Header:
        names = (
            name
            for entry in self.entries
            for name in (self.weights[entry.name].replaced_by if entry.name in self.weights else (entry.name,))
        )
        return _part_of(self.whole.output, names)

    @cached_property
    def adapter(self) -> Header | None:
        names = [name for weight in self.weights.values() for name in weight.factors]
        return _part_of(self.whole.adapter, names) if self.whole.adapter and names else None


def cut(shard: PlannedShard[W], at_least: int) -> list[Piece[W]]:
    """The pieces of a shard, in file order and as far as tensors allow ``at_least`` so many bytes each."""
    size = max(at_least, shard.source.header.file_size // _MAX_PIECES)
    runs: list[list[TensorEntry]] = []
    room = 0
    for entry in shard.entries:
        if not runs or (room < size and entry.nbytes > max(room, 0)):  # no run is of empty tensors alone
            runs.append([])
            room = size
        runs[-1].append(entry)
        room -= entry.nbytes
    return [Piece(shard, number, run) for number, run in enumerate(runs)]


@dataclass(frozen=True)
class Division(Generic[W]):
    """What several processes take one by one: whole shards and pieces first, then shards to be joined.

    Attributes:
        units: what is streamed.
        joins: shards whose pieces are among them.
    """

    units: tuple[PlannedShard[W] | Piece[W], ...]
    joins: tuple[PlannedShard[W], ...]

    def __len__(self) -> int:
        return len(self.units) + len(self.joins)

    @cached_property
    def needs(self) -> Mapping[int, Sequence[int]]:
        """A join's number -> those of its pieces; both count ``units`` first and ``joins`` after them."""
        return {
            len(self.units) + number: [
                position for position, unit in enumerate(self.units) if isinstance(unit, Piece) and unit.whole is shard
            ]
            for number, shard in enumerate(self.joins)
        }

    def name(self, number: int) -> str:
        """Of a unit or a join."""
        return (*self.units, *self.joins)[number].name

    def pieces(self, join: int) -> list[Piece[W]]:
        """Of a shard to be joined, by its number, in file order."""
        found = [unit for position in self.needs[join] if isinstance(unit := self.units[position], Piece)]
        return sorted(found, key=lambda piece: piece.number)


def divide(
    shards: Iterable[PlannedShard[W]],
    to_cut: Container[str] = (),
    at_least: int = MIN_PIECE_BYTES,
    *,
    largest_first: bool = False,
) -> Division[W]:
    """Divide work.

    Args:
        shards: all that is to be done.
        to_cut: names of those that are to be cut, into pieces of ``at_least`` so many bytes.
        largest_first: so that processes end at about the same time; else in the order of the shards.
    """
    units: list[PlannedShard[W] | Piece[W]] = []
    joins = []
    for shard in shards:
        if shard.name in to_cut:
            units += cut(shard, at_least)
            joins.append(shard)
        else:
            units.append(shard)
    if largest_first:
        units.sort(key=lambda unit: -bytes_read(unit))
    return Division(tuple(units), tuple(joins))


def too_large(shards: Sequence[PlannedShard[W]], processes: int) -> list[str]:
    """Names of the shards that would keep one process at work when the others are through."""
    share = sum(map(bytes_read, shards)) / processes
    return [shard.name for shard in shards if bytes_read(shard) > share / 2 and len(cut(shard, MIN_PIECE_BYTES)) > 1]


def bytes_read(shard: PlannedShard[W]) -> int:
    """Of the source."""
    return sum(entry.nbytes for entry in shard.entries)


def join(
    shard: PlannedShard[W],
    pieces: Sequence[Piece[W]],
    receipts: Sequence[Receipt],
    source: Path,
    output: Path,
    work: WorkFolder,
) -> Receipt:
    """Make a shard of its finished pieces, which are still there afterwards.

    Args:
        shard: what was cut.
        pieces: all of them.
        receipts: theirs, in the same order.
        source: where the shard that was read lies.
        output, work: the folders.

    Returns:
        What the shard's receipt is to be.

    Raises:
        ReadError: the source or a piece is not what the receipts name.
        OutputError: the shard cannot be written.
    """
    made = list(zip(pieces, receipts, strict=True))
    read = _source_digest(source, shard.source.header, made)
    written = assemble(
        [Part(output / piece.name, piece.output, receipt.output) for piece, receipt in made],
        shard.output,
        output / shard.name,
    )
    factors = [part for piece, receipt in made if (part := factor_part(piece, receipt, work))]
    adapter = assemble(factors, shard.adapter, work.adapter_part(shard.name)) if shard.adapter else None
    records = tuple(record for receipt in receipts for record in receipt.weights)
    return Receipt(shard.name, read, written, adapter, records, joint_environment(receipts))


@dataclass(frozen=True)
class Part:
    """A finished safetensors file, and what it has to be."""

    path: Path
    header: Header
    digest: FileDigest


def factor_part(shard: PlannedShard[W], receipt: Receipt, work: WorkFolder) -> Part | None:
    """A shard's share of the adapter, None if it has none."""
    if shard.adapter is None or receipt.adapter is None:
        return None
    return Part(work.adapter_part(shard.name), shard.adapter, receipt.adapter)


def assemble(parts: Iterable[Part], header: Header, target: Path) -> FileDigest:
    """One safetensors file of the tensors of others, one at a time.

    Args:
        parts: together, all tensors of the result.
        header: of the result.
        target: its place.

    Raises:
        ReadError: a part is not what it has to be; nothing is written.
        OutputError: the target cannot be written.
    """
    with ShardWriter(target, header) as writer:
        for part in parts:
            with ShardReader(part.path, part.header) as reader:
                for entry in part.header.entries:
                    data = memoryview(bytearray(entry.nbytes))
                    reader.read_into(entry, data)
                    writer.write(entry.name, data)
                if FileDigest(part.header.file_size, reader.sha256()) != part.digest:
                    raise ReadError(f"{part.path} was changed or damaged", "run the same command again to make it anew")
        return writer.commit()


def _source_digest(path: Path, header: Header, made: Iterable[tuple[Piece[W], Receipt]]) -> FileDigest:
    """Of the whole source, whose pieces are those that were read."""
    with ShardReader(path, header) as reader:
        for piece, receipt in made:
            digest = hashlib.sha256()
            for entry in piece.entries:
                data = memoryview(bytearray(entry.nbytes))
                reader.read_into(entry, data)
                digest.update(data)
            if digest.hexdigest() != receipt.source.sha256:
                raise ReadError(f"{path} changed while being read", "leave the source alone and start again")
        return FileDigest(header.file_size, reader.sha256())


def _part_of(whole: Header, names: Iterable[str]) -> Header:
    """A file of some of a header's tensors, in their order there."""
    wanted = set(names)
    return build_header([entry.spec for entry in whole.entries if entry.name in wanted], _METADATA)
