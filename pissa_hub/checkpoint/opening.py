"""Files that a stranger may have made, opened without waiting for anything and read without trusting their size."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """A regular file, or what a link to one leads to, for reading.

    A pipe, a device or a socket is refused without waiting for whoever is at its other end.

    Raises:
        OSError: there is none, it may not be read, or it is none.
    """
    return open(path, "rb", opener=_open_regular)


def open_unbuffered(path: Path) -> FileIO:
    """:func:`open_regular`, for reads of a caller's own size."""
    return FileIO(path, opener=_open_regular)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a small file.

    Raises:
        OSError: as :func:`open_regular`.
        ValueError: it has more than ``limit`` bytes; a clause that fits after its name.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"is larger than {limit} bytes")
        return file.read(size)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor
