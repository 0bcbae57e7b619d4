"""Shards through memory, one tensor at a time: a reader, workers and a writer, each on its own thread.

The reader runs ahead and the writer behind within one budget of bytes, so memory does not grow with the model. Tensors
pass in file order, which lets both ends hash whole files on the way; what replaces a tensor takes its place in the
buffer that it was read into. On a CPU several weights are in hand at once, each with its share of the threads: small
eigenproblems and narrow products use one core far better than they use many.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pissa_hub.checkpoint.files import Supply
from pissa_hub.checkpoint.header import Header, TensorEntry
from pissa_hub.checkpoint.reader import Buffer, BufferPool, PoolClosedError, ShardReader
from pissa_hub.checkpoint.source import Shard
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter
from pissa_hub.errors import HubError
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.manifest import WeightRecord
from pissa_hub.pipeline.destination import Destination, InPlace
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.threads import Prefetch, Sink, Team
from pissa_hub.progress import Progress

# Bytes in flight between the threads, or a weight for each worker and one more; a larger tensor passes alone.
BUFFER_BUDGET = 64 << 20
# Tensors between two threads: few, because the factors of a weight are not counted in the budget.
_QUEUED = 4


class PlannedWeight(Protocol):
    """A stored tensor that a worker replaces."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def room(self) -> int:
        """Bytes of its buffer: of what is read or of all that replaces it, whichever is more."""


W = TypeVar("W", bound=PlannedWeight)
W_co = TypeVar("W_co", bound=PlannedWeight, covariant=True)


class PlannedShard(Protocol[W_co]):
    """A shard and what is to become of it."""

    @property
    def source(self) -> Shard:
        """What is read."""

    @property
    def output(self) -> Header:
        """Of the shard that replaces it, under the same name."""

    @property
    def weights(self) -> Mapping[str, W_co]:
        """What goes to a worker, by its name in the source; all other tensors are copied."""

    @property
    def adapter(self) -> Header | None:
        """Of the shard's own part of the adapter, None where nothing goes there."""


@dataclass(frozen=True)
class Made:
    """What a worker makes of a weight.

    Attributes:
        tensors: name -> bytes of all that replaces it in the shard; they may lie in the weight's buffer.
        adapter: name -> bytes of what goes to the shard's part of the adapter.
        record: for the receipt.
    """

    tensors: Mapping[str, memoryview]
    adapter: Mapping[str, memoryview]
    record: WeightRecord | None = None


# Takes a weight and its buffer, the stored bytes at the front.
Worker = Callable[[W, memoryview], Made]


@dataclass(frozen=True)
class _Read(Generic[W]):
    """A tensor as stored, at the front of its buffer."""

    shard: PlannedShard[W]
    entry: TensorEntry
    buffer: Buffer


@dataclass(frozen=True)
class _ToWrite(Generic[W]):
    """What a tensor becomes; its buffer is free once that is written."""

    read: _Read[W]
    made: Made


@dataclass(frozen=True)
class _ShardEnd(Generic[W]):
    """All of a shard was read; its digest."""

    shard: PlannedShard[W]
    source: FileDigest


_Result = _ToWrite[W] | _ShardEnd[W]


def stream(
    shards: Sequence[PlannedShard[W]],
    supply: Supply,
    output: Path,
    work: WorkFolder,
    equip: Callable[[], Worker[W]],
    workers: int,
    accept: Callable[[Receipt], None],
    progress: Progress,
    destination: Destination | None = None,
) -> list[Receipt]:
    """Write what replaces each shard into ``output``; its receipt is left in ``work`` and returned.

    Args:
        shards: in the order of the work.
        supply: of their files, in the same order.
        output, work: the folders.
        equip: makes a worker; fp32 products are exact while it works, see ``factorization.precision``.
        workers: how many of them.
        accept: called with each finished shard's receipt before that counts; raises if the shard is not what it
            should be.
        progress: told of every weight and of the bytes read.
        destination: of each shard, once its receipt is written; ``output`` by default.

    Raises:
        CheckpointError: a shard cannot be read or changes meanwhile.
        HubError: a shard did not arrive, here or at the destination.
        OutputError: the output cannot be written.
        PissaHubError: what a worker or ``accept`` raises.
    """
    destination = destination or InPlace()
    largest = max((weight.room for shard in shards for weight in shard.weights.values()), default=0)
    pool = BufferPool(max(BUFFER_BUDGET, (workers + 1) * largest))
    with ExitStack() as cleanup:
        writers = cleanup.enter_context(_Writers[W](output, work, accept, progress, destination))
        sink: Sink[_Result[W]] = Sink(writers.consume, _QUEUED, on_failure=pool.close)
        cleanup.callback(_quietly, sink.close)
        cleanup.callback(destination.close)
        cleanup.enter_context(exact_fp32())
        team = cleanup.enter_context(Team(workers, equip))
        # The reader hands out the work, so that results are taken even while it waits for buffers.
        results = Prefetch(_hand_out(_read(shards, supply, pool), team, progress), 2 * workers + _QUEUED)
        cleanup.callback(results.close)
        cleanup.callback(pool.close)
        cleanup.callback(supply.close)
        try:
            for result in results:
                sink.put(result.result())
        except PoolClosedError:
            sink.close()  # raises what the writer did not survive
            raise
        except HubError:
            sink.finish()  # what did arrive counts
            raise
        sink.finish()
        return writers.receipts


def _read(
    shards: Iterable[PlannedShard[W]], supply: Supply, pool: BufferPool
) -> Generator[_Read[W] | _ShardEnd[W], None, None]:
    for shard, path in zip(shards, supply, strict=True):
        header = shard.source.header
        with ShardReader(path, header) as reader:
            for entry in header.entries:
                weight = shard.weights.get(entry.name)
                buffer = pool.acquire(weight.room if weight else entry.nbytes)
                reader.read_into(entry, buffer.view[: entry.nbytes])
                yield _Read(shard, entry, buffer)
            yield _ShardEnd(shard, FileDigest(header.file_size, reader.sha256()))


def _hand_out(
    items: Iterable[_Read[W] | _ShardEnd[W]], team: Team[Worker[W]], progress: Progress
) -> Generator[Future[_Result[W]], None, None]:
    """The results to come, in file order."""
    for item in items:
        if isinstance(item, _Read) and item.entry.name in item.shard.weights:
            yield team.submit(partial(_replace, item=item, progress=progress))
        else:
            done: Future[_Result[W]] = Future()
            done.set_result(_copy(item) if isinstance(item, _Read) else item)
            yield done


def _replace(worker: Worker[W], item: _Read[W], progress: Progress) -> _Result[W]:
    weight = item.shard.weights[item.entry.name]
    progress.working_on(weight.name)
    return _ToWrite(item, worker(weight, item.buffer.view))


def _copy(item: _Read[W]) -> _Result[W]:
    return _ToWrite(item, Made({item.entry.name: item.buffer.view}, {}))


def _quietly(close: Callable[[], None]) -> None:
    """On the way out of an error, the writer's own would only hide the first."""
    with suppress(BaseException):
        close()


class _Writers(Generic[W]):
    """The writer's side: the shard in hand, its part of the adapter, and its receipt when both are on disk."""

    def __init__(
        self,
        output: Path,
        work: WorkFolder,
        accept: Callable[[Receipt], None],
        progress: Progress,
        destination: Destination,
    ) -> None:
        self._output = output
        self._work = work
        self._accept = accept
        self._progress = progress
        self._destination = destination
        self._base: ShardWriter | None = None
        self._adapter: ShardWriter | None = None
        self._records: list[WeightRecord] = []
        self.receipts: list[Receipt] = []

    def __enter__(self) -> _Writers[W]:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._base, self._adapter):
            if writer is not None:
                writer.abort()

    def consume(self, item: _Result[W]) -> None:
        if isinstance(item, _ToWrite):
            self._write(item.read, item.made)
        else:
            self._finish(item)

    def _write(self, read: _Read[W], made: Made) -> None:
        base, adapter = self._open(read.shard)
        for name, data in made.tensors.items():
            base.write(name, data)
        if adapter is not None:
            for name, data in made.adapter.items():
                adapter.write(name, data)
        if made.record is not None:
            self._records.append(made.record)
        read.buffer.release()
        self._progress.advance(read.entry.nbytes)

    def _finish(self, end: _ShardEnd[W]) -> None:
        base, adapter = self._open(end.shard)
        digest = adapter.commit() if adapter else None
        receipt = Receipt(end.shard.source.name, end.source, base.commit(), digest, tuple(self._records))
        self._accept(receipt)
        self._work.write(receipt)
        self.receipts.append(receipt)
        self._base = self._adapter = None
        self._destination.add(receipt.shard, self._output / receipt.shard, receipt.output)

    def _open(self, shard: PlannedShard[W]) -> tuple[ShardWriter, ShardWriter | None]:
        if self._base is None:
            name = shard.source.name
            self._base = ShardWriter(self._output / name, shard.output)
            if shard.adapter is not None:
                self._adapter = ShardWriter(self._work.adapter_part(name), shard.adapter)
            self._records = []
        return self._base, self._adapter
