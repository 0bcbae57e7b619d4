"""One process at a time in a folder: locks that the system takes back from whoever dies.

Where there are no such locks (Windows, some network disks), everybody gets them.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.writer import make_folder, writing
from pissa_hub.errors import OutputError

fcntl: Any
try:
    import fcntl
except ImportError:
    fcntl = None

_HELD = frozenset({errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK})
_HOLDER_BYTES = 300


@contextmanager
def locked(path: Path, guarded: Path) -> Iterator[None]:
    """Be the only one between here and the end of ``with`` who holds the lock file ``path``.

    It is made, with its folder, where it is absent, and removed at the end. Whoever deletes it meanwhile, with its
    folder for example, gives the next one leave to enter.

    Args:
        path: of the lock file, which says who holds it.
        guarded: what the lock is for, in messages.

    Raises:
        OutputError: another process holds it, or the file cannot be made.
    """
    if fcntl is None:
        yield
        return
    descriptor = _acquire(path, guarded)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


@contextmanager
def opened_alone(folder: Path) -> Iterator[bool]:
    """Whether nobody else has ``folder`` open in this way, which lasts until the end of ``with``. Raises OSError."""
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _try_lock(descriptor) and _is_at(descriptor, folder)
    finally:
        os.close(descriptor)


def _acquire(path: Path, guarded: Path) -> int:
    """The locked file's descriptor, once ``path`` is that very file."""
    while True:
        make_folder(path.parent)
        with writing(guarded):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # somebody who is through removed the folder in between
                continue
        try:
            if not _try_lock(descriptor):
                fact = f"{guarded} is being written by {_holder(descriptor)}"
                raise OutputError(fact, "wait for it, or stop it and run this command again")
            if _is_at(descriptor, path):
                _sign(descriptor)
                return descriptor
        except BaseException:  # an interrupt, too, leaves no open file
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """For the message of whoever comes next; a full disk is no reason to stop here."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{socket.gethostname()} {os.getpid()}".encode())


def _holder(descriptor: int) -> str:
    """Who signed the file."""
    host, _, process = os.read(descriptor, _HOLDER_BYTES).decode(errors="replace").partition(" ")
    return f"process {process} on {host}" if process.isdecimal() else "another process"


def _try_lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False if another process, or another opening of it, has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True
