"""The stream fails as a whole: an error on any of its threads ends all of them and surfaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pissa_hub import decompose
from pissa_hub.checkpoint.reader import ShardReader
from pissa_hub.checkpoint.writer import ShardWriter
from pissa_hub.errors import CheckpointError, OutputError
from pissa_hub.pipeline import stream

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
def test_source_that_cannot_be_read_on_leaves_nothing(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, budget: int
) -> None:
    monkeypatch.setattr(stream, "BUFFER_BUDGET", budget)
    fail_at(monkeypatch, ShardReader, "read_into", call, CheckpointError("the disk is broken", "replace it"))
    with pytest.raises(CheckpointError, match="the disk is broken"):
        in_time(lambda: decompose(tiny_checkpoint(shard_size=SHARDED), tmp_path / "out", rank=4))
    assert not (tmp_path / "out").exists()


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

    source, progress = tiny_checkpoint(shard_size=SHARDED), Count()
    outcome = decompose(source, tmp_path / "out", rank=4, progress=progress)
    assert progress.done == progress.expected == sum(tensor.nbytes for tensor in tensors_of(source).values())
    assert sorted(progress.weights) == sorted(weight.module for weight in outcome.manifest.weights)
