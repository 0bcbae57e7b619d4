"""The stream fails as a whole: an error on any of its threads ends all of them and surfaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pissa_hub import decompose
from pissa_hub.checkpoint.files import Folder
from pissa_hub.checkpoint.header import TensorSpec, build_header
from pissa_hub.checkpoint.reader import BufferPool, ShardReader, sha256_file
from pissa_hub.checkpoint.source import Shard, read_checkpoint
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter
from pissa_hub.errors import OutputError, ReadError, VerificationError
from pissa_hub.pipeline import stream
from pissa_hub.pipeline.planned import WholeShard
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.progress import Silent

from ..conftest import SHARDED, Factory
from ..helpers import files_of, tensors_of
from .test_threads import _no_thread_is_left, in_time  # noqa: F401  # the fixture

pytestmark = pytest.mark.usefixtures("two_threads")


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int, error: Exception) -> None:
    """Let a method's n-th call raise."""
    original, calls = getattr(owner, method), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*arguments)

    monkeypatch.setattr(owner, method, failing)


@pytest.mark.parametrize("budget", [20_000, 192 << 20])
@pytest.mark.parametrize("call", [1, 7, 20])
def test_full_disk_ends_the_run_and_a_rerun_completes_it(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, budget: int
) -> None:
    """With buffers for a tensor or two, the reader waits for the writer's: it must not wait for ever."""
    source = tiny_checkpoint(shard_size=SHARDED)
    monkeypatch.setattr(stream, "BUFFER_BUDGET", budget)
    with monkeypatch.context() as patch:
        fail_at(patch, ShardWriter, "write", call, OutputError("the disk is full", "free some space"))
        with pytest.raises(OutputError, match="the disk is full"):
            in_time(lambda: decompose(source, tmp_path / "out", rank=4))
    assert not list((tmp_path / "out").rglob("*.partial"))
    in_time(lambda: decompose(source, tmp_path / "out", rank=4))
    in_time(lambda: decompose(source, tmp_path / "fresh", rank=4))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("budget", [20_000, 192 << 20])
@pytest.mark.parametrize("call", [1, 12])
def test_source_that_cannot_be_read_on_keeps_what_was_done(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, budget: int
) -> None:
    source = tiny_checkpoint(shard_size=SHARDED)
    decompose(source, tmp_path / "fresh", rank=4)
    monkeypatch.setattr(stream, "BUFFER_BUDGET", budget)
    with monkeypatch.context() as patch:
        fail_at(patch, ShardReader, "read_into", call, ReadError("the disk is broken", "replace it"))
        with pytest.raises(ReadError, match="the disk is broken"):
            in_time(lambda: decompose(source, tmp_path / "out", rank=4))
    assert not list((tmp_path / "out").rglob("*.partial"))
    decompose(source, tmp_path / "out", rank=4)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 20])
def test_bytes_do_not_depend_on_the_buffers(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    source = tiny_checkpoint(shard_size=SHARDED)
    decompose(source, tmp_path / "usual", rank=4)
    monkeypatch.setattr(stream, "BUFFER_BUDGET", budget)
    in_time(lambda: decompose(source, tmp_path / "out", rank=4))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "usual")


def test_progress_counts_every_byte_once(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    class Count:
        expected = done = 0
        weights: list[str]

        def __init__(self) -> None:
            self.weights = []

        def expect(self, nbytes: int) -> None:
            self.expected += nbytes

        def working_on(self, weight: str) -> None:
            self.weights.append(weight)

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

        def note(self, text: str) -> None:
            raise AssertionError(text)

    source, progress = tiny_checkpoint(shard_size=SHARDED), Count()
    outcome = decompose(source, tmp_path / "out", rank=4, progress=progress)
    assert progress.done == progress.expected == sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert sorted(progress.weights) == sorted(weight.module for weight in outcome.manifest.weights)


@dataclass(frozen=True)
class Doubled:
    """A weight that becomes float64, with its double beside it."""

    stored: TensorSpec

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def room(self) -> int:
        return 4 * self.stored.nbytes

    @property
    def replaced_by(self) -> list[str]:
        return [spec.name for spec in self.outputs]

    factors = ()

    @property
    def outputs(self) -> list[TensorSpec]:
        wide = replace(self.stored, dtype="F64")
        return [wide, replace(wide, name=f"{self.name}.double")]


def double(weight: Doubled, data: memoryview) -> stream.Made:
    assert data.nbytes == weight.room
    stored = torch.frombuffer(data, dtype=torch.float32, count=weight.stored.numel).double()
    replaced = torch.frombuffer(data, dtype=torch.float64).view(2, -1)
    replaced[0], replaced[1] = stored, 2 * stored
    half = data.nbytes // 2
    return stream.Made({weight.name: data[:half], f"{weight.name}.double": data[half:]}, {})


def doubled_shard(shard: Shard) -> WholeShard[Doubled]:
    entries = shard.header.entries
    weights = {entry.name: Doubled(entry.spec) for entry in entries if len(entry.shape) > 1}
    kept = [entry.spec for entry in entries if entry.name not in weights]
    doubled = [spec for weight in weights.values() for spec in weight.outputs]
    return WholeShard(shard, build_header(doubled + kept, {}), weights)


def doubled_shards(source: Path) -> list[WholeShard[Doubled]]:
    return [doubled_shard(shard) for shard in read_checkpoint(source).shards]


@dataclass
class Taken:
    """A place that takes all but one."""

    lost: str = ""
    names: list[str] = field(default_factory=list)

    def permits(self, name: str) -> bool:
        return name != self.lost

    def add(self, name: str, path: Path, digest: FileDigest) -> None:
        assert FileDigest(*sha256_file(path)) == digest
        self.names.append(name)

    def close(self) -> None:
        """Nobody waits."""


def run_stream(
    shards: list[WholeShard[Doubled]],
    output: Path,
    accept: Callable[[Receipt], None] = lambda receipt: None,
    place: Taken | None = None,
) -> WorkFolder:
    """Double the shards where they lie, with two workers."""
    work, folder = work_in(output), Folder(shards[0].source.path.parent)
    run = partial(
        stream.stream,
        shards,
        partial(folder.supply, work=work.folder),
        output,
        work,
        equip=lambda: double,
        workers=2,
        room=max(weight.room for shard in shards for weight in shard.weights.values()),
        accept=accept,
        place=place or Taken(),
        progress=Silent(),
    )
    in_time(run)
    return work


def work_in(output: Path) -> WorkFolder:
    work = WorkFolder(output, "digest")
    work.create({})
    return work


@pytest.mark.parametrize("budget", [1, 60_000, 64 << 20])
def test_worker_may_widen_and_add_tensors(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """What it writes counts in the buffers' budget."""
    source = tiny_checkpoint(shard_size=SHARDED)
    pools: list[BufferPool] = []
    acquired = BufferPool.acquire

    def acquire(pool: BufferPool, nbytes: int) -> Any:
        pools.append(pool)
        buffer = acquired(pool, nbytes)
        assert pool.allocated <= limit
        return buffer

    shards = doubled_shards(source)
    largest = max(weight.room for shard in shards for weight in shard.weights.values())
    limit = max(budget, 3 * largest)
    monkeypatch.setattr(stream, "BUFFER_BUDGET", budget)
    monkeypatch.setattr(BufferPool, "acquire", acquire)
    output, found = tmp_path / "out", {}
    run_stream(shards, output)
    assert len(pools) == sum(len(shard.source.header.entries) for shard in shards)
    for path in output.glob("*.safetensors"):
        found |= load_file(path)
    for name, tensor in tensors_of(source).items():
        if tensor.dim() > 1:
            assert torch.equal(found.pop(name), tensor.double())
            assert torch.equal(found.pop(f"{name}.double"), 2 * tensor.double())
        else:
            assert torch.equal(found.pop(name), tensor)
    assert not found


def test_shard_counts_only_if_it_is_accepted(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    shards = doubled_shards(tiny_checkpoint(shard_size=SHARDED))
    output = tmp_path / "out"

    def accept(receipt: Receipt) -> None:
        if receipt.shard == shards[1].source.name:
            raise VerificationError("another shard", "give the right one")

    with pytest.raises(VerificationError, match="another shard"):
        run_stream(shards, output, accept)
    work = WorkFolder(output, "digest")
    first, second = (
        work.receipt(shards[0].source.name, Folder(shards[0].source.path.parent)),
        work.receipt(shards[1].source.name, Folder(shards[0].source.path.parent)),
    )
    assert first is not None
    assert first.weights == ()
    assert second is None


def test_shard_that_another_process_has_taken_over_leaves_nothing(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """Whoever slept over it must not touch what the other one has written."""
    shards, output = doubled_shards(tiny_checkpoint(shard_size=SHARDED)), tmp_path / "out"
    place = Taken(lost=shards[1].name)
    work = run_stream(shards, output, place=place)
    others = [shard.name for shard in shards if shard is not shards[1]]
    assert place.names == others
    assert [shard.name for shard in shards if work.read(shard.name)] == others
    assert sorted(path.name for path in output.glob("*.safetensors*")) == sorted(others)
