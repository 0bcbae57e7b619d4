"""Tensors from a shard into reused buffers, hashed on the way."""

import contextlib
import hashlib
import mmap
import os
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from threading import Condition
from typing import Protocol

from pissa_hub.checkpoint.header import Header, TensorEntry
from pissa_hub.checkpoint.opening import open_unbuffered
from pissa_hub.errors import ReadError

_READ_BYTES = 1 << 20  # small enough that the hash finds the bytes still in cache
_FEED_BYTES = 4 << 20


class Digest(Protocol):
    """A running hash, as :mod:`hashlib` makes them."""

    def update(self, data: memoryview, /) -> None: ...


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure of the system into the error that names ``path``."""
    try:
        yield
    except OSError as error:
        fact = f"{path} cannot be read: {error.strerror}"
        raise ReadError(fact, "check that it exists, its permissions and the disk") from error


def read_small(path: Path) -> bytes:
    """All of a file. Raises ReadError if it cannot be read."""
    with reading(path):
        return path.read_bytes()


def feed(digest: Digest, file: FileIO, limit: int = sys.maxsize) -> int:
    """Add the rest of ``file``, ``limit`` bytes at most, to ``digest``, through one reused buffer; returns how many."""
    buffer = memoryview(bytearray(_FEED_BYTES))
    total = 0
    while count := file.readinto(buffer[: limit - total]):
        digest.update(buffer[:count])
        total += count
    return total


def sha256_file(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 in hex of a file. Raises ReadError."""
    digest = hashlib.sha256()
    with reading(path), open_unbuffered(path) as file:
        size = feed(digest, file)
    return size, digest.hexdigest()


class ShardReader:
    """Reads the tensors of one shard; for one thread.

    Plain reads, not a memory map: resident memory stays at the buffers', and a network disk that fails or a
    file that shrinks meanwhile gives an error rather than SIGBUS.

    Args:
        path, header: of the shard.
        span: bytes of the file, from the start of a tensor to the end of one, to which :meth:`sha256` is confined.

    Raises:
        ReadError: the file cannot be read, or is no longer the one that ``header`` was read from.
    """

    def __init__(self, path: Path, header: Header, span: range | None = None) -> None:
        self._path = path
        self._header = header
        self._digest = hashlib.sha256(b"" if span is not None else header.raw)
        self._hashed, self._end = (span.start, span.stop) if span is not None else (header.data_start, header.file_size)
        with reading(self._path):
            self._file = open_unbuffered(path)
            size, raw = os.fstat(self._file.fileno()).st_size, _read(self._file, len(header.raw))
        if size != header.file_size or raw != header.raw:
            self.close()
            raise self._changed()

    def read_into(self, entry: TensorEntry, buffer: memoryview) -> None:
        """Fill ``buffer``, of exactly ``entry.nbytes`` contiguous bytes, with the tensor's bytes."""
        if buffer.nbytes != entry.nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes for {entry.nbytes} of {entry.name!r}")
        if not entry.nbytes:
            return
        view = buffer.cast("B")
        with reading(self._path):
            self._file.seek(entry.start)
            while len(view):
                count = self._file.readinto(view[:_READ_BYTES])
                if not count:
                    raise self._changed()
                position = entry.stop - len(view)
                if position == self._hashed:
                    self._digest.update(view[:count])
                    self._hashed += count
                view = view[count:]

    def sha256(self) -> str:
        """SHA-256 in hex of the whole file or of its span, once every tensor in it was read in file order.

        Raises:
            RuntimeError: some tensor was not read, or not in file order.
        """
        if self._hashed != self._end:
            raise RuntimeError(f"{self._path}: only the first {self._hashed} bytes were read in order")
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _changed(self) -> ReadError:
        return ReadError(f"{self._path} changed while being read", "leave the source alone and start again")


def _read(file: FileIO, size: int) -> bytes:
    """The next ``size`` bytes; fewer only where the file ends, as a network disk may give fewer at a time."""
    data = bytearray(size)
    view = memoryview(data)
    while len(view) and (count := file.readinto(view)):
        view = view[count:]
    return bytes(data[: size - len(view)])


class PoolClosedError(RuntimeError):
    """A buffer was asked of a pool that is closed."""


class Buffer:
    """Bytes on loan from a :class:`BufferPool`: ``view`` is writable, page-aligned and of the size asked for.

    ``torch.frombuffer(buffer.view, ...)`` shares the memory. Leaving ``with`` gives it back; so does
    :meth:`release`, after which nothing may touch tensors made of it.
    """

    def __init__(self, pool: "BufferPool", pages: mmap.mmap, nbytes: int) -> None:
        self._pool = pool
        self._pages: mmap.mmap | None = pages
        self.view = memoryview(pages)[:nbytes]

    def release(self) -> None:
        """Give the bytes back; does nothing the second time."""
        pages, self._pages = self._pages, None
        if pages is not None:
            self.view = memoryview(b"")
            self._pool._take_back(pages)

    def __enter__(self) -> "Buffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class BufferPool:
    """Lends byte buffers to threads and keeps all memory, on loan and idle, within ``budget`` bytes.

    A request larger than the budget is granted while nothing else is on loan, so who holds no loan never
    waits for ever; a thread that acquires while it holds one must keep the sum within the budget. Returned
    buffers are lent again: touching fresh pages costs as much as the arithmetic on them.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._changed = Condition()
        self._idle: list[mmap.mmap] = []
        self._lent = 0
        self._closed = False

    @property
    def allocated(self) -> int:
        """Bytes held from the system, on loan and idle."""
        with self._changed:
            return self._lent + sum(map(len, self._idle))

    def acquire(self, nbytes: int) -> Buffer:
        """Borrow ``nbytes``; waits until they fit the budget.

        Raises:
            PoolClosedError: the pool was closed, now or while waiting.
        """
        size = max(-(-nbytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._lent or self._lent + size <= self._budget)
            if self._closed:
                raise PoolClosedError("the buffer pool is closed")
            pages = self._reuse(size) or self._allocate(size)
            self._lent += len(pages)
        return Buffer(self, pages, nbytes)

    def close(self) -> None:
        """Free what is idle and fail whoever waits; buffers on loan stay valid until released."""
        with self._changed:
            self._closed = True
            self._idle.clear()
            self._changed.notify_all()

    def _reuse(self, size: int) -> mmap.mmap | None:
        """The smallest idle buffer that fits, unless it would waste more than it holds."""
        fitting = [pages for pages in self._idle if size <= len(pages) <= 2 * size]
        if not fitting:
            return None
        pages = min(fitting, key=len)
        self._idle.remove(pages)
        return pages

    def _allocate(self, size: int) -> mmap.mmap:
        while self._idle and self._lent + sum(map(len, self._idle)) + size > self._budget:
            self._idle.pop(0)
        return _fresh_pages(size)

    def _take_back(self, pages: mmap.mmap) -> None:
        with self._changed:
            self._lent -= len(pages)
            if not self._closed:
                self._idle.append(pages)
            self._changed.notify_all()


def _fresh_pages(size: int) -> mmap.mmap:
    """Zeroed memory that goes back to the system as soon as the last view of it is gone."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
