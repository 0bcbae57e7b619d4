"""Shards through memory, one tensor at a time: a reader, the arithmetic and a writer, each on its own thread.

The reader runs ahead and the writer behind within one budget of bytes, so memory does not grow with the model. Tensors
pass in file order, which lets both ends hash whole files on the way; the base's bytes replace a weight's own in the
buffer that they were read into. On a CPU several weights are in hand at once, each with its share of the threads:
small eigenproblems and narrow products use one core far better than they use many.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa_hub.checkpoint.encoding import decode
from pissa_hub.checkpoint.header import TORCH_DTYPES, TensorEntry
from pissa_hub.checkpoint.reader import Buffer, BufferPool, PoolClosedError, ShardReader
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter
from pissa_hub.factorization.methods import Factors, pissa_factors, subtract
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.svd import truncated_svd
from pissa_hub.factorization.workspace import Workspace
from pissa_hub.manifest import CertificateRecord, ReconstructionRecord, WeightRecord
from pissa_hub.pipeline.plan import ShardPlan, WeightPlan
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.threads import Prefetch, Sink, Team
from pissa_hub.progress import Progress

# Bytes in flight between the threads, or a weight for each worker and one more; a larger tensor passes alone.
BUFFER_BUDGET = 64 << 20
# Tensors between two threads: few, because the factors of a weight are not counted in the budget.
_QUEUED = 4
# Bytes that the matrices of all workers may take; a larger matrix has a single worker.
WORKSPACE_BUDGET = 512 << 20
# fp32 copies of a weight that its decomposition holds: itself, its transpose, basis and products.
_COPIES = 4


@dataclass(frozen=True)
class _Read:
    """A tensor as stored."""

    shard: ShardPlan
    entry: TensorEntry
    buffer: Buffer


@dataclass(frozen=True)
class _ShardEnd:
    """All of a shard was read; its digest."""

    shard: ShardPlan
    source: FileDigest


@dataclass(frozen=True)
class _Write:
    """A tensor of the output, whose memory goes back to its owner by ``release``."""

    shard: ShardPlan
    name: str
    data: memoryview
    release: Callable[[], None]


@dataclass(frozen=True)
class _Decomposed:
    """A weight's factors, for the shard's part of the adapter, and its record."""

    shard: ShardPlan
    weight: WeightPlan
    factors: Factors
    record: WeightRecord


_Written = _Write | _Decomposed | _ShardEnd


def stream(
    shards: Iterable[ShardPlan],
    output: Path,
    work: WorkFolder,
    settings: Settings,
    device: torch.device,
    workers: int,
    progress: Progress,
) -> list[Receipt]:
    """Decompose shards into ``output``; the receipt of each is left in ``work`` and returned.

    Raises:
        CheckpointError: a shard cannot be read or changes meanwhile.
        MatrixError: a weight holds NaN or Inf, or its base does not fit its dtype.
        OutputError: the output cannot be written.
    """
    shards = list(shards)
    largest = max((weight.stored.nbytes for shard in shards for weight in shard.weights.values()), default=0)
    pool = BufferPool(max(BUFFER_BUDGET, (workers + 1) * largest))
    with ExitStack() as cleanup:
        writers = cleanup.enter_context(_Writers(output, work, progress))
        sink: Sink[_Written] = Sink(writers.consume, _QUEUED, on_failure=pool.close)
        cleanup.callback(_quietly, sink.close)
        cleanup.enter_context(exact_fp32())
        team = cleanup.enter_context(Team(workers, lambda: _Decomposer(settings, device, progress)))
        # The reader hands out the work, so that results are taken even while it waits for buffers.
        results = Prefetch(_hand_out(_read(shards, pool), team), 2 * workers + _QUEUED)
        cleanup.callback(results.close)
        cleanup.callback(pool.close)
        try:
            for result in results:
                for item in result.result():
                    sink.put(item)
        except PoolClosedError:
            sink.close()  # raises what the writer did not survive
            raise
        sink.finish()
        return writers.receipts


def worker_count(weights: Iterable[WeightPlan], device: torch.device) -> int:
    """How many weights to have in hand at once: one on a GPU, else what threads and memory allow.

    Follows from the plan and the number of threads alone: each worker's share of the threads decides the last bits.
    """
    if device.type != "cpu":
        return 1
    largest = max((weight.stored.numel for weight in weights), default=0)
    return max(min(torch.get_num_threads(), WORKSPACE_BUDGET // max(_COPIES * 4 * largest, 1)), 1)


def _hand_out(
    items: Iterable[_Read | _ShardEnd], team: Team[_Decomposer]
) -> Generator[Future[Sequence[_Written]], None, None]:
    """The results to come, in file order."""
    for item in items:
        if isinstance(item, _Read) and item.entry.name in item.shard.weights:
            yield team.submit(partial(_Decomposer.decompose, item=item))
        else:
            done: Future[Sequence[_Written]] = Future()
            if isinstance(item, _Read):
                done.set_result([_Write(item.shard, item.entry.name, item.buffer.view, item.buffer.release)])
            else:
                done.set_result([item])
            yield done


def _quietly(close: Callable[[], None]) -> None:
    """On the way out of an error, the writer's own would only hide the first."""
    with suppress(BaseException):
        close()


def _read(shards: Iterable[ShardPlan], pool: BufferPool) -> Generator[_Read | _ShardEnd, None, None]:
    for shard in shards:
        header = shard.source.header
        with ShardReader(shard.source.path, header) as reader:
            for entry in header.entries:
                buffer = pool.acquire(entry.nbytes)
                reader.read_into(entry, buffer.view)
                yield _Read(shard, entry, buffer)
            yield _ShardEnd(shard, FileDigest(header.file_size, reader.sha256()))


class _Decomposer:
    """The arithmetic on one device, with buffers that it keeps from weight to weight."""

    def __init__(self, settings: Settings, device: torch.device, progress: Progress) -> None:
        self._settings = settings
        self._progress = progress
        self._workspace = Workspace()
        self._anchor = torch.empty(0, device=device)

    def decompose(self, item: _Read) -> Sequence[_Written]:
        weight = item.shard.weights[item.entry.name]
        stored, settings = weight.stored, self._settings
        self._progress.working_on(weight.target.module.name)
        matrix = self._workspace.take("weight", stored.shape, self._anchor)
        decode(stored, item.buffer.view, matrix)
        svd = truncated_svd(
            matrix, weight.target.rank, settings.svd_settings, name=stored.name, workspace=self._workspace
        )
        factors = pissa_factors(svd, weight.scaling, TORCH_DTYPES[weight.lora_A.dtype])
        if weight.residual_dtype == stored.dtype:
            data, release = item.buffer.view, item.buffer.release
        else:
            data = memoryview(bytearray(matrix.numel() * TORCH_DTYPES[weight.residual_dtype].itemsize))
            release = _nothing
            item.buffer.release()
        base = torch.frombuffer(data, dtype=TORCH_DTYPES[weight.residual_dtype]).view(stored.shape)
        deviation = subtract(matrix, factors, base, name=stored.name, workspace=self._workspace)
        certificate = svd.certificate
        record = WeightRecord(
            tensor=stored.name,
            module=weight.target.module.name,
            shape=(weight.target.out_features, weight.target.in_features),
            is_transposed=weight.is_conv1d,
            source_dtype=stored.dtype,
            rank=weight.target.rank,
            alpha=weight.target.alpha,
            singular_values=tuple(svd.s.tolist()),
            energy=svd.energy,
            certificate=CertificateRecord(
                certificate.kind,
                certificate.energy_loss,
                certificate.sigma_error if certificate.sigma_error < float("inf") else None,
                certificate.failure_probability,
            ),
            reconstruction=ReconstructionRecord(**asdict(deviation)),
        )
        return (
            _Decomposed(item.shard, weight, factors, record),
            _Write(item.shard, stored.name, data, release),
        )


def _nothing() -> None:
    pass


class _Writers:
    """The writer's side: the shard in hand, its part of the adapter, and its receipt when both are on disk."""

    def __init__(self, output: Path, work: WorkFolder, progress: Progress) -> None:
        self._output = output
        self._work = work
        self._progress = progress
        self._base: ShardWriter | None = None
        self._adapter: ShardWriter | None = None
        self._records: list[WeightRecord] = []
        self.receipts: list[Receipt] = []

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in (self._base, self._adapter):
            if writer is not None:
                writer.abort()

    def consume(self, item: _Write | _Decomposed | _ShardEnd) -> None:
        base, adapter = self._open(item.shard)
        if isinstance(item, _Write):
            base.write(item.name, item.data)
            self._progress.advance(item.shard.source.header[item.name].nbytes)
            item.release()
        elif isinstance(item, _Decomposed):
            assert adapter is not None
            left, right = item.factors.left, item.factors.right
            A, B = (left.t(), right.t()) if item.weight.is_conv1d else (right, left)
            adapter.write(item.weight.lora_A.name, _bytes(A))
            adapter.write(item.weight.lora_B.name, _bytes(B))
            self._records.append(item.record)
        else:
            digest = adapter.commit() if adapter else None
            receipt = Receipt(item.shard.name, item.source, base.commit(), digest, tuple(self._records))
            self._work.write(receipt)
            self.receipts.append(receipt)
            self._base = self._adapter = None

    def _open(self, shard: ShardPlan) -> tuple[ShardWriter, ShardWriter | None]:
        if self._base is None:
            self._base = ShardWriter(self._output / shard.name, shard.output)
            if shard.adapter is not None:
                self._adapter = ShardWriter(self._work.adapter_part(shard.name), shard.adapter)
            self._records = []
        return self._base, self._adapter


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order."""
    array: Any = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
