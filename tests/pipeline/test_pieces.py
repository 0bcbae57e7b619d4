"""A large shard in pieces: nothing is lost between them, and what is joined is what was read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pissa_hub.checkpoint.source import read_checkpoint
from pissa_hub.errors import ReadError
from pissa_hub.pipeline.decompose import _Decomposition, plan_decomposition
from pissa_hub.pipeline.destination import InPlace
from pissa_hub.pipeline.pieces import Division, cut, divide, too_large
from pissa_hub.pipeline.planned import WholeShard, span_of
from pissa_hub.pipeline.receipts import WorkFolder
from pissa_hub.pipeline.schedule import Alone
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.share import Share
from pissa_hub.progress import Silent

from ..conftest import SHARDED, Factory

pytestmark = pytest.mark.usefixtures("two_threads")
SIZE = 20_000


@dataclass(frozen=True)
class Place:
    """A job whose only shard is to be made of pieces."""

    job: Any
    output: Path
    work: WorkFolder
    division: Division[Any]

    def do(self, division: Division[Any] | None = None) -> None:
        Share(self.job, self.output, self.work, Alone(Silent()), InPlace()).do(division or self.division)


@pytest.fixture
def place(tiny_checkpoint: Factory, tmp_path: Path) -> Place:
    source = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "source"))
    plan = plan_decomposition(source, Settings(rank=4))
    job = _Decomposition(plan, torch.device("cpu"), is_published=False)
    work = WorkFolder(tmp_path / "out", job.digest)
    work.create(job.settings)
    return Place(job, tmp_path / "out", work, divide(job.shards, {"model.safetensors"}, SIZE))


def flip(path: Path) -> None:
    """The last bit of a file."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("at_least", [1, 5_000, SIZE, 1 << 30])
def test_pieces_are_the_shard(tiny_checkpoint: Factory, at_least: int) -> None:
    (shard,) = plan_decomposition(tiny_checkpoint(), Settings(rank=4)).shards
    pieces = cut(shard, at_least)
    assert [entry for piece in pieces for entry in piece.entries] == list(shard.entries)
    assert {entry.spec for piece in pieces for entry in piece.output.entries} == {e.spec for e in shard.output.entries}
    factors = [entry.spec for piece in pieces if piece.adapter for entry in piece.adapter.entries]
    assert shard.adapter is not None
    assert sorted(map(str, factors)) == sorted(str(entry.spec) for entry in shard.adapter.entries)
    spans = [span_of(piece) for piece in pieces]
    if len(pieces) == 1:
        assert spans == [None]
    else:
        bounds = [(span.start, span.stop) for span in spans if span]
        assert bounds[0][0] == shard.source.header.data_start
        assert bounds[-1][1] == shard.source.header.file_size
        assert all(before[1] == after[0] for before, after in pairwise(bounds))
    assert len({piece.name for piece in pieces}) == len(pieces)


@pytest.mark.parametrize("at_least", [1, 300, 1 << 20])
@pytest.mark.parametrize("rows", [[0, 8, 0], [0, 0, 8, 8, 0, 0, 8, 0], [8, 0, 0, 0], [0, 0]])
def test_no_piece_is_of_empty_tensors_alone(tmp_path: Path, rows: list[int], at_least: int) -> None:
    tensors = {f"{number:02}": torch.arange(rows * 16.0).view(rows, 16) for number, rows in enumerate(rows)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (shard,) = read_checkpoint(tmp_path).shards
    pieces = cut(WholeShard[Any](shard, shard.header, {}), at_least)
    assert [entry.name for piece in pieces for entry in piece.entries] == sorted(tensors)
    assert len(pieces) == 1 or all(span_of(piece) for piece in pieces)
    assert len(pieces) <= max(sum(map(bool, rows)), 1)


def test_only_what_would_keep_the_others_waiting_is_cut(tiny_checkpoint: Factory) -> None:
    one = plan_decomposition(tiny_checkpoint(), Settings(rank=4)).shards
    assert too_large(one, 8) == []  # pieces would be too small
    many = plan_decomposition(tiny_checkpoint(shard_size=SHARDED), Settings(rank=4)).shards
    division = divide(many, {many[1].name}, SIZE, largest_first=True)
    assert len(division.joins) == 1
    sizes = [sum(entry.nbytes for entry in unit.entries) for unit in division.units]
    assert sizes == sorted(sizes, reverse=True)
    (needed,) = division.needs.values()
    assert [division.units[unit] for unit in needed] == sorted(division.pieces(len(division.units)), key=str)


def test_joined_shard_is_that_of_one_stream(place: Place, tmp_path: Path) -> None:
    place.do()
    assert not place.work.pieces("model.safetensors")
    joined = place.work.read("model.safetensors")
    other = WorkFolder(tmp_path / "whole", place.job.digest)
    other.create(place.job.settings)
    Share(place.job, tmp_path / "whole", other, Alone(Silent()), InPlace()).do(divide(place.job.shards))
    assert joined == other.read("model.safetensors")
    for name in ("model.safetensors", ".pissa/model.safetensors.adapter"):
        assert (place.output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("suffix", ["", ".adapter"])
def test_damaged_piece_is_no_part_of_the_shard(place: Place, suffix: str) -> None:
    """Damaged after it was looked at."""
    pieces_only = Division(place.division.units, ())
    place.do(pieces_only)
    damaged = max(place.output.glob(f".pissa/*.piece{suffix}"))
    flip(damaged)
    share = Share(place.job, place.output, place.work, Alone(Silent()), InPlace())
    with pytest.raises(ReadError, match="changed"):
        share._joined(place.division.joins[0], place.division.pieces(len(place.division.units)))
    assert place.work.read("model.safetensors") is None
    place.do()
    assert place.work.read("model.safetensors") is not None


def test_source_that_changed_between_the_pieces_is_noticed(place: Place) -> None:
    place.do(Division(place.division.units, ()))
    flip(place.job.source.folder / "model.safetensors")
    share = Share(place.job, place.output, place.work, Alone(Silent()), InPlace())
    with pytest.raises(ReadError, match="changed while being read"):
        share._joined(place.division.joins[0], place.division.pieces(len(place.division.units)))


def test_shard_that_another_process_has_joined_meanwhile_counts(place: Place) -> None:
    """This one was taken for dead; the pieces are gone."""
    place.do()
    share = Share(place.job, place.output, place.work, Alone(Silent()), InPlace())
    joined = share._joined(place.division.joins[0], place.division.pieces(len(place.division.units)))
    assert joined == place.work.read("model.safetensors")
    (place.output / "model.safetensors").unlink()
    with pytest.raises(ReadError, match=r"the receipt of .* is gone; run the same command again"):
        share._joined(place.division.joins[0], place.division.pieces(len(place.division.units)))
