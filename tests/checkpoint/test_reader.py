"""Reading into reused buffers, hashing on the way, and the byte budget."""

import hashlib
import mmap
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pissa_hub.checkpoint import reader
from pissa_hub.checkpoint.header import TensorEntry, read_header
from pissa_hub.checkpoint.reader import BufferPool, PoolClosedError, ShardReader, sha256_file
from pissa_hub.errors import CheckpointError

PAGE = mmap.PAGESIZE


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(60 + n, 50, generator=generator) for n, name in enumerate("dbca")}
    tensors |= {"half": tensors["a"].half(), "none": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_reads(source: ShardReader, entries: Iterable[TensorEntry], tensors: dict[str, torch.Tensor]) -> None:
    for entry in entries:
        buffer = memoryview(bytearray(entry.nbytes))
        source.read_into(entry, buffer)
        assert bytes(buffer) == bytes_of(tensors[entry.name])


def test_reads_what_was_saved_and_hashes_the_file(
    shard: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = shard
    monkeypatch.setattr(reader, "_READ_BYTES", 1000)  # several reads per tensor
    header = read_header(path)
    with ShardReader(path, header) as source:
        assert_reads(source, header.entries, tensors)
        assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_any_order_reads_right_but_gives_no_hash(shard: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = shard
    header = read_header(path)
    with ShardReader(path, header) as source:
        assert_reads(source, reversed(header.entries), tensors)
        with pytest.raises(RuntimeError, match="read in order"):
            source.sha256()


def test_reading_again_does_not_spoil_the_hash(shard: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = shard
    header = read_header(path)
    with ShardReader(path, header) as source:
        for entry in (header.entries[0], *header.entries, header.entries[1]):
            source.read_into(entry, memoryview(bytearray(entry.nbytes)))
        assert source.sha256() == sha256_file(path)[1]


def test_typed_buffers_of_the_right_size_only(shard: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = shard
    header = read_header(path)
    with ShardReader(path, header) as source:
        out = torch.empty(63, 50)
        source.read_into(header["a"], memoryview(out.numpy()))
        assert torch.equal(out, tensors["a"])
        with pytest.raises(ValueError, match="for 12600 of 'a'"):
            source.read_into(header["a"], memoryview(bytearray(12599)))


def test_file_replaced_since_its_header_was_read(shard: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = shard
    header = read_header(path)
    data = path.read_bytes()
    for changed in (data + b"0", data.replace(b"pt", b"pf", 1)):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed while being read; leave"):
            ShardReader(path, header)


def test_file_truncated_while_open(shard: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = shard
    header = read_header(path)
    with ShardReader(path, header) as source, path.open("r+b") as file:
        file.truncate(header["half"].start + 10)
        with pytest.raises(CheckpointError, match="changed while being read"):
            source.read_into(header["half"], memoryview(bytearray(header["half"].nbytes)))


def test_missing_file(shard: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = shard
    header = read_header(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        ShardReader(path, header)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        sha256_file(path)


def test_sha256_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_FEED_BYTES", 7)
    path = tmp_path / "x"
    for data in (b"", b"1234567", b"0123456789" * 5):
        path.write_bytes(data)
        assert sha256_file(path) == (len(data), hashlib.sha256(data).hexdigest())


def test_buffers_are_shared_with_torch_and_of_the_size_asked_for() -> None:
    with BufferPool(1 << 20).acquire(24) as buffer:
        assert buffer.view.nbytes == 24
        torch.frombuffer(buffer.view, dtype=torch.float32)[:] = 1.5
        assert buffer.view.cast("f").tolist() == [1.5] * 6
        assert torch.frombuffer(buffer.view, dtype=torch.uint8).data_ptr() % PAGE == 0
    assert buffer.view.nbytes == 0


def test_buffers_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    with BufferPool(1 << 20).acquire(5) as buffer:
        buffer.view[:] = b"12345"
        assert bytes(buffer.view) == b"12345"


def test_zero_bytes_can_be_borrowed() -> None:
    with BufferPool(0).acquire(0) as buffer:
        assert buffer.view.nbytes == 0


def test_returned_buffers_are_lent_again() -> None:
    pool = BufferPool(16 * PAGE)
    addresses = set()
    for nbytes in (4 * PAGE, 3 * PAGE + 1, 2 * PAGE, 4 * PAGE):
        with pool.acquire(nbytes) as buffer:
            addresses.add(torch.frombuffer(buffer.view, dtype=torch.uint8).data_ptr())
    assert len(addresses) == 1
    assert pool.allocated == 4 * PAGE


def test_idle_buffers_are_freed_to_stay_within_the_budget() -> None:
    pool = BufferPool(10 * PAGE)
    first, second = pool.acquire(6 * PAGE), pool.acquire(4 * PAGE)
    first.release()
    second.release()
    assert pool.allocated == 10 * PAGE
    with pool.acquire(9 * PAGE):
        assert pool.allocated == 9 * PAGE


def test_releasing_twice_is_harmless() -> None:
    pool = BufferPool(10 * PAGE)
    buffer = pool.acquire(PAGE)
    buffer.release()
    buffer.release()
    with pool.acquire(10 * PAGE):
        assert pool.allocated == 10 * PAGE


def in_thread(pool: BufferPool, nbytes: int) -> tuple[threading.Thread, list[object]]:
    """A thread that borrows and returns; its outcome is appended to the list."""
    outcome: list[object] = []

    def borrow() -> None:
        try:
            with pool.acquire(nbytes) as buffer:
                outcome.append(buffer)
        except PoolClosedError as error:
            outcome.append(error)

    thread = threading.Thread(target=borrow, daemon=True)
    thread.start()
    return thread, outcome


def test_acquire_waits_for_the_budget() -> None:
    pool = BufferPool(10 * PAGE)
    held = pool.acquire(6 * PAGE)
    thread, outcome = in_thread(pool, 5 * PAGE)
    time.sleep(0.05)
    assert not outcome
    held.release()
    thread.join(5)
    assert outcome


def test_more_than_the_budget_is_granted_alone() -> None:
    pool = BufferPool(10 * PAGE)
    held = pool.acquire(PAGE)
    thread, outcome = in_thread(pool, 25 * PAGE)
    time.sleep(0.05)
    assert not outcome
    held.release()
    thread.join(5)
    assert outcome
    with pool.acquire(2 * PAGE):
        assert pool.allocated == 2 * PAGE


def test_close_fails_those_who_wait_and_those_who_come() -> None:
    pool = BufferPool(10 * PAGE)
    held = pool.acquire(10 * PAGE)
    thread, outcome = in_thread(pool, PAGE)
    time.sleep(0.05)
    pool.close()
    thread.join(5)
    assert isinstance(outcome[0], PoolClosedError)
    with pytest.raises(PoolClosedError):
        pool.acquire(1)
    held.view[0] = 1
    held.release()
    assert pool.allocated == 0


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 12), max_size=30))
def test_memory_stays_within_the_budget(steps: list[int]) -> None:
    """Pages asked for in turn; whoever would have to wait returns what is held first, oldest first."""
    pool = BufferPool(10 * PAGE)
    held: list[reader.Buffer] = []
    for pages in steps:
        # What is held may have more pages than asked for, at most twice as many.
        while held and sum(len(buffer._pages or b"") for buffer in held) + pages * PAGE > 10 * PAGE:
            held.pop(0).release()
        held.append(pool.acquire(pages * PAGE))
        assert pool.allocated <= max(10, pages) * PAGE or len(held) == 1


def test_a_disk_that_gives_little_at_a_time(
    shard: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reluctant(reader.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(memoryview(buffer)[:7])

        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 7))

    monkeypatch.setattr(reader, "FileIO", Reluctant)
    path, tensors = shard
    header = read_header(path)
    with ShardReader(path, header) as opened:
        assert_reads(opened, header.entries, tensors)
        assert opened.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
