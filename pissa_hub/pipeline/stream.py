"""Shards through memory, one tensor at a time: a reader, workers and a writer, each on its own thread.

The reader runs ahead and the writer behind within one budget of bytes, so memory does not grow with the model. Tensors
pass in file order, which lets both ends hash whole files on the way; what replaces a tensor takes its place in the
buffer that it was read into. On a CPU several weights are in hand at once, each with its share of the threads: small
eigenproblems and narrow products use one core far better than they use many.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

from pissa_hub.checkpoint.files import Supply
from pissa_hub.checkpoint.header import TensorEntry
from pissa_hub.checkpoint.reader import Buffer, BufferPool, PoolClosedError, ShardReader
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter
from pissa_hub.errors import HubError
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.manifest import WeightRecord
from pissa_hub.pipeline.destination import Place
from pissa_hub.pipeline.device import environment
from pissa_hub.pipeline.planned import PlannedShard, PlannedWeight, span_of
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.threads import Prefetch, Sink, Team
from pissa_hub.progress import Progress

# Bytes in flight between the threads, or a weight for each worker and one more; a larger tensor passes alone.
BUFFER_BUDGET = 64 << 20
# Tensors between two threads: few, because the factors of a weight are not counted in the budget.
_QUEUED = 4


W = TypeVar("W", bound=PlannedWeight)


@dataclass(frozen=True)
class Made:
    """What a worker makes of a weight.

    Attributes:
        tensors: name -> bytes of all that replaces it in the shard; they may lie in the weight's buffer.
        adapter: name -> bytes of what goes to the shard's part of the adapter.
        record: for the receipt.
        device: that computed it, for the receipt; empty where that changes nothing.
    """

    tensors: Mapping[str, memoryview]
    adapter: Mapping[str, memoryview]
    record: WeightRecord | None = None
    device: str = ""


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
    shards: Iterable[PlannedShard[W]],
    open_supply: Callable[[Iterable[str]], Supply],
    output: Path,
    work: WorkFolder,
    *,
    equip: Callable[[], Worker[W]],
    workers: int,
    room: int,
    accept: Callable[[Receipt], None],
    place: Place,
    progress: Progress,
) -> None:
    """Write what replaces each shard into ``output``, and its receipt into ``work``.

    An interrupt of the main thread is passed on at once: what the other threads have in hand is not waited for.

    Args:
        shards: in the order of the work; taken one by one, each when its turn to be read has come.
        open_supply: of their files, by the names of their sources.
        output, work: the folders.
        equip: makes a worker; fp32 products are exact while it works, see ``factorization.precision``.
        workers: how many of them.
        room: of the largest weight, see :class:`PlannedWeight`.
        accept: called with each finished shard's receipt before that counts; raises if the shard is not what it
            should be.
        place: of each shard, once its receipt is written.
        progress: told of every weight and of the bytes read.

    Raises:
        CheckpointError: a shard cannot be read or changes meanwhile.
        HubError: a shard did not arrive, here or at the destination.
        OutputError: the output cannot be written.
        PissaHubError: what a worker or ``accept`` raises.
    """
    pool = BufferPool(max(BUFFER_BUDGET, (workers + 1) * room))
    taken: SimpleQueue[PlannedShard[W]] = SimpleQueue()
    supply = open_supply(_names(shards, taken))

    def close() -> None:
        """Let nobody wait: for work or a place, for a shard to come, for a buffer."""
        for part in (place, supply, pool):
            part.close()

    with ExitStack() as cleanup:
        writers = cleanup.enter_context(_Writers[W](output, work, accept, place, progress))
        sink: Sink[_Result[W]] = cleanup.enter_context(Sink(writers.consume, _QUEUED, on_failure=close))
        cleanup.enter_context(exact_fp32())
        team = cleanup.enter_context(Team(workers, equip))
        # The reader hands out the work, so that results are taken even while it waits for buffers.
        items = _hand_out(_read(taken, supply, pool), team, progress)
        results = cleanup.enter_context(Prefetch(items, 2 * workers + _QUEUED))
        cleanup.callback(close)
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


def _names(shards: Iterable[PlannedShard[W]], taken: SimpleQueue[PlannedShard[W]]) -> Iterator[str]:
    """The sources' names, for the supply; each shard whose name it took is in ``taken``."""
    for shard in shards:
        taken.put(shard)
        yield shard.source.name


def _read(
    shards: SimpleQueue[PlannedShard[W]], supply: Supply, pool: BufferPool
) -> Generator[_Read[W] | _ShardEnd[W], None, None]:
    for path in supply:
        shard = shards.get()
        span = span_of(shard)
        with ShardReader(path, shard.source.header, span) as reader:
            for entry in shard.entries:
                weight = shard.weights.get(entry.name)
                buffer = pool.acquire(weight.room if weight else entry.nbytes)
                reader.read_into(entry, buffer.view[: entry.nbytes])
                yield _Read(shard, entry, buffer)
            size = len(span) if span is not None else shard.source.header.file_size
            yield _ShardEnd(shard, FileDigest(size, reader.sha256()))


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


class _Writers(Generic[W]):
    """The writer's side: the shard in hand, its part of the adapter, and its receipt when both are on disk."""

    def __init__(
        self,
        output: Path,
        work: WorkFolder,
        accept: Callable[[Receipt], None],
        place: Place,
        progress: Progress,
    ) -> None:
        self._output = output
        self._work = work
        self._accept = accept
        self._place = place
        self._progress = progress
        self._environment = environment()
        self._base: ShardWriter | None = None
        self._adapter: ShardWriter | None = None
        self._records: list[WeightRecord] = []
        self._devices: set[str] = set()

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
        if made.device:
            self._devices.add(made.device)
        read.buffer.release()
        self._progress.advance(read.entry.nbytes)

    def _finish(self, end: _ShardEnd[W]) -> None:
        base, adapter = self._open(end.shard)
        if not self._place.permits(end.shard.name):
            self.__exit__()
            self._base = self._adapter = None
            return
        digest = adapter.commit() if adapter else None
        environment = {**self._environment, "device": ", ".join(sorted(self._devices))}
        receipt = Receipt(end.shard.name, end.source, base.commit(), digest, tuple(self._records), environment)
        self._accept(receipt)
        self._work.write(receipt)
        self._base = self._adapter = None
        self._place.add(receipt.shard, self._output / receipt.shard, receipt.output)

    def _open(self, shard: PlannedShard[W]) -> tuple[ShardWriter, ShardWriter | None]:
        if self._base is None:
            self._base = ShardWriter(self._output / shard.name, shard.output)
            if shard.adapter is not None:
                self._adapter = ShardWriter(self._work.adapter_part(shard.name), shard.adapter)
            self._records, self._devices = [], set()
        return self._base, self._adapter
