"""Files that appear whole or not at all: a shard written tensor by tensor, small files, copies.

Each is written as ``<name>.<unique>.partial`` beside its target and takes the target's name only once every
byte is on the disk. Modes follow the umask.
"""

import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from pissa_hub.checkpoint.header import Header
from pissa_hub.checkpoint.opening import open_unbuffered
from pissa_hub.checkpoint.reader import Digest, feed, reading
from pissa_hub.errors import CheckpointError, OutputError

_WRITE_BYTES = 1 << 20  # small enough that the hash finds the bytes still in cache
_COPY_BYTES = 64 << 20
_WRITE_BACK_BYTES = 64 << 20
_FICLONE = 0x40049409  # linux/fs.h
_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded"}
# What a folder that can be written may answer to fsync: not to be read, or nothing of the kind on this file system.
_UNSYNCABLE = frozenset({errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


@dataclass(frozen=True)
class FileDigest:
    """A finished file: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a failure of the system into the error that names ``path``; ``needed`` bytes were to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            room = f" for {needed} bytes" if needed else ""
            fact = f"{path}: {_FULL[error.errno]}{room} ({_free(path)} free)"
            raise OutputError(fact, "free some space or choose another output folder") from error
        fact = f"{path} cannot be written: {error.strerror}"
        raise OutputError(fact, "check the folder, its permissions and the disk") from error


def _free(path: Path) -> str:
    """Bytes that are free where ``path`` is or would be."""
    with suppress(OSError):
        return str(shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free)
    return "unknown"


class _Partial:
    """The file beside the target; leaving ``with`` before :meth:`commit` removes it."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        self._unsynced = 0
        self._committed = False
        with writing(target):
            self.file = FileIO(self._path, "x+")

    def reserve(self, size: int) -> None:
        """Make the file ``size`` bytes long, allocated where the platform can: a full disk shows up now."""
        with writing(self._target, size):
            try:
                os.posix_fallocate(self.file.fileno(), 0, size)
            except AttributeError:  # macOS, Windows
                self.file.truncate(size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.file.truncate(size)

    def write(self, data: memoryview) -> None:
        """Write all of ``data`` at the file's position."""
        with writing(self._target, len(data)):
            while len(data):
                count = self.file.write(data)
                data = data[count:]
                self._unsynced += count
            if self._unsynced >= _WRITE_BACK_BYTES:
                self._start_write_back()

    def _start_write_back(self) -> None:
        """Let the disk work while we do, so that few pages stay dirty and the last fsync is short."""
        if hasattr(os, "posix_fadvise"):
            # Linux answers "not needed" for dirty pages by writing them, without making us wait.
            start = max(self.file.tell() - self._unsynced, 0)
            os.posix_fadvise(self.file.fileno(), start, self._unsynced, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0

    def read_back(self, digest: Digest, start: int) -> int:
        """Add all from ``start`` on to ``digest``; returns how many bytes."""
        with writing(self._target):
            self.file.seek(start)
            return feed(digest, self.file)

    def commit(self) -> None:
        with writing(self._target):
            os.fsync(self.file.fileno())
            self.file.close()
            self._path.replace(self._target)
            self._committed = True
            sync_folder(self._target.parent)

    def abort(self) -> None:
        """Remove the file, as far as a disk allows that may have failed altogether."""
        with suppress(OSError):
            self.file.close()
        if not self._committed:
            with suppress(OSError):
                self._path.unlink()

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class ShardWriter:
    """Writes one safetensors file, its tensors in any order; for one thread.

    Written in file order, the bytes are hashed on the way; what came out of order is read back at the commit.

    Raises:
        OutputError: the folder cannot be written, or has too little space for the whole file.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._header = header
        self._missing = {entry.name for entry in header.entries}
        self._digest = hashlib.sha256(header.raw)
        self._hashed = header.data_start
        self._partial = _Partial(path)
        try:
            self._partial.reserve(header.file_size)
        except BaseException:  # an interrupt, too, leaves no partial file
            self._partial.abort()
            raise

    def write(self, name: str, data: memoryview) -> None:
        """Write one tensor's bytes; ``data`` is contiguous and of exactly its size.

        Raises:
            KeyError: the header has no such tensor.
            ValueError: the size is another one, or the tensor was written before.
        """
        entry = self._header[name]
        if name not in self._missing:
            raise ValueError(f"tensor {name!r} is written twice")
        if data.nbytes != entry.nbytes:
            raise ValueError(f"{data.nbytes} bytes for the {entry.nbytes} of {name!r}")
        self._missing.remove(name)
        if not entry.nbytes:
            return
        self._partial.file.seek(entry.start)
        in_order = entry.start == self._hashed
        view = data.cast("B")
        for start in range(0, len(view), _WRITE_BYTES):
            chunk = view[start : start + _WRITE_BYTES]
            self._partial.write(chunk)
            if in_order:
                self._digest.update(chunk)
        if in_order:
            self._hashed = entry.stop

    def commit(self) -> FileDigest:
        """Give the file its name, once it is on the disk.

        Raises:
            ValueError: a tensor was not written.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, {min(self._missing)!r} among them")
        # The header goes last: until now the file, though full-size, does not parse.
        self._partial.file.seek(0)
        self._partial.write(memoryview(self._header.raw))
        self._partial.read_back(self._digest, self._hashed)
        self._partial.commit()
        return FileDigest(self._header.file_size, self._digest.hexdigest())

    def abort(self) -> None:
        """Remove the unfinished file; does nothing after a commit."""
        self._partial.abort()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def write_file_atomic(path: Path, data: bytes) -> FileDigest:
    """Write a small file. Raises OutputError."""
    with _Partial(path) as partial:
        partial.write(memoryview(data))
        partial.commit()
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def copy_file_atomic(source: Path, target: Path) -> FileDigest:
    """Copy a file: as a reflink where the file system can, else within the kernel, else through memory.

    Never as a hard link: a later write to the source must not reach the copy. The digest is of the copy.

    Raises:
        CheckpointError: the source cannot be read or changed meanwhile.
        OutputError: the target cannot be written.
    """
    digest = hashlib.sha256()
    with reading(source), open_unbuffered(source) as original, _Partial(target) as partial:
        size = os.fstat(original.fileno()).st_size
        if not _reflink(original, partial.file):
            _copy_in_kernel(original, partial.file)
            while chunk := original.read(_WRITE_BYTES):
                partial.write(memoryview(chunk))
        if partial.read_back(digest, 0) != size:
            raise CheckpointError(f"{source} changed while being copied", "leave the source alone and start again")
        partial.commit()
    return FileDigest(size, digest.hexdigest())


def _reflink(source: FileIO, target: FileIO) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError:
        return False
    return True


def _copy_in_kernel(source: FileIO, target: FileIO) -> None:
    """Copy as far as ``copy_file_range`` goes; it moves both positions, so the caller goes on from there."""
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            while os.copy_file_range(source.fileno(), target.fileno(), _COPY_BYTES):
                pass


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless they are there; durable in either case. Raises OutputError."""
    with writing(folder):
        if not folder.is_dir():
            make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)  # also where a run that was killed had made it


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed and removed in ``folder`` durable, where folders can be synced."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise
