"""Too little memory on the device costs time, not the weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_hub import decompose
from pissa_hub.errors import ResourceError
from pissa_hub.pipeline.fallback import Resilient, is_out_of_memory
from pissa_hub.pipeline.stream import Made
from pissa_hub.pipeline.workers import Decomposer
from pissa_hub.progress import Silent

from ..conftest import SHARDED, Factory
from ..helpers import files_of

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


class Weight:
    """As far as the fallback looks at it."""

    name = "layer.weight"
    room = 4
    replaced_by = ("layer.weight",)
    factors = ()


class Fleet:
    """Workers of a device whose memory is full for the first ``failures`` calls."""

    def __init__(self, failures: dict[torch.device, int], error: Exception) -> None:
        self.failures = failures
        self.error = error
        self.calls: list[tuple[str, bytes]] = []
        self.notes: list[str] = []

    def equip(self, device: torch.device) -> Any:
        def work(weight: Weight, data: memoryview) -> Made:
            self.calls.append((device.type, bytes(data)))
            data[:2] = b"xx"  # half of the result, where the weight was
            if self.failures.get(device, 0):
                self.failures[device] -= 1
                raise self.error
            return Made({weight.name: data}, {}, device=device.type)

        return work

    def run(self, device: torch.device = GPU) -> Made:
        worker: Resilient[Weight] = Resilient(self.equip, device, self.notes.append)
        return worker(Weight(), memoryview(bytearray(b"abcd")))


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_once_more_on_the_device_then_on_the_cpu(error: Exception) -> None:
    assert is_out_of_memory(error)
    once = Fleet({GPU: 1}, error)
    assert once.run().device == "cuda"
    assert once.calls == [("cuda", b"abcd")] * 2  # each finds the weight as it was
    assert once.notes == []
    twice = Fleet({GPU: 2}, error)
    assert twice.run().device == "cpu"
    assert twice.calls == [("cuda", b"abcd")] * 2 + [("cpu", b"abcd")]
    assert twice.notes == ["layer.weight does not fit in the memory of cuda:0; it was done on the CPU"]


@pytest.mark.parametrize("device", [GPU, CPU])
def test_no_memory_anywhere_is_one_line(device: torch.device) -> None:
    fleet = Fleet({GPU: 9, CPU: 9}, MemoryError())
    with pytest.raises(ResourceError, match=r"layer.weight needs more memory than there is; use a machine with more"):
        fleet.run(device)


def test_other_errors_pass() -> None:
    fleet = Fleet({GPU: 1}, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        fleet.run()
    assert len(fleet.calls) == 1


def test_the_cpu_that_has_no_memory_keeps_the_work(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real allocation that no machine can make, and the same command again where there is room."""
    source, calls = tiny_checkpoint(shard_size=SHARDED), 0
    decompose(source, tmp_path / "fresh", rank=4)
    work = Decomposer.__call__

    def greedy(worker: Decomposer, weight: Any, data: memoryview) -> Made:
        nonlocal calls
        calls += 1
        if calls > 8:
            torch.empty(1 << 62, dtype=torch.uint8)
        return work(worker, weight, data)

    with monkeypatch.context() as patch:
        patch.setattr(Decomposer, "__call__", greedy)
        with pytest.raises(ResourceError, match="needs more memory than there is"):
            decompose(source, tmp_path / "out", rank=4)
    outcome = decompose(source, tmp_path / "out", rank=4)
    assert outcome.carried_over > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_notes_reach_whoever_waits(tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of several runs, under different versions, are no single run's."""

    class Notes(Silent):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

    source, notes = tiny_checkpoint(shard_size=SHARDED), Notes()
    work = Decomposer.__call__

    def failing(worker: Decomposer, weight: Any, data: memoryview) -> Made:
        if weight.name.startswith("model.layers.1"):
            raise MemoryError
        return work(worker, weight, data)

    with monkeypatch.context() as patch:
        patch.setattr(Decomposer, "__call__", failing)
        patch.setattr(torch, "__version__", "2.0.0")
        with pytest.raises(ResourceError):
            decompose(source, tmp_path / "out", rank=4)
    outcome = decompose(source, tmp_path / "out", rank=4, progress=notes)
    assert notes.texts == [
        f"shards were made with different torch (2.0.0, {torch.__version__}), so no single run has all their bytes"
    ]
    assert outcome.manifest.environment["torch"] == f"2.0.0, {torch.__version__}"
