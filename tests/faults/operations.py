"""Every operation of a process that reaches the disk, named, counted and open to whoever wants to spoil it.

The functions of ``os`` and ``io`` are wrapped from outside; the program knows nothing of it. Names are the same in
every run, such as ``out/model-00002-of-00004.safetensors: rename``. For Linux.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, TextIO

READ = "read"
_UNIQUE = re.compile(r"(\.\d+)?-[0-9a-f]{8}(?=\.partial)")
# Files of a work folder that is being removed: in the order of the disk, so that only their number counts.
_DOOMED = re.compile(r"(?<=/\.pissa\.partial)/.*")


@dataclass(frozen=True)
class Operation:
    """What is to be done.

    Attributes:
        kind: create, allocate, truncate, write, sync, rename, folder sync, make folder, remove, remove folder; or read.
        path: of what, absolute.
        target: of a rename.
        offset: of a write.
        data: of a write.
        size: of an allocation.
    """

    kind: str
    path: Path
    target: Path | None = None
    offset: int = 0
    data: memoryview = field(default=memoryview(b""), repr=False)
    size: int = 0


Before = Callable[[Operation], int | None]
After = Callable[[Operation, int], None]


def partial_name(name: str) -> str:
    """A name without what makes it unique."""
    return _UNIQUE.sub("", name)


class Names:
    """Names of operations that are the same in every run, however its threads take turns.

    A folder is synced for the sake of a name in it: the sync is called after the last that its thread made there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[str, int] = {}
        self._made: dict[tuple[int, Path], Path] = {}

    def name(self, operation: Operation) -> str:
        path = operation.target or operation.path
        if operation.kind in ("rename", "make folder"):
            self._made[get_ident(), path.parent] = path
        elif operation.kind == "folder sync":
            path = self._made.pop((get_ident(), path), path)
        name = f"{_DOOMED.sub('', partial_name(os.path.relpath(path, self._root)))}: {operation.kind}"
        self._seen[name] = self._seen.get(name, 0) + 1
        return name if self._seen[name] == 1 else f"{name} {self._seen[name]}"


class _Watch:
    """Tells of operations below some folders; those of several threads one after the other."""

    def __init__(self, roots: Sequence[Path], before: Before, after: After) -> None:
        self._roots = tuple(f"{root}{os.sep}" for root in roots)
        self._before = before
        self._after = after
        self._lock = Lock()

    def sees(self, path: str) -> bool:
        return f"{path}{os.sep}".startswith(self._roots)

    def do(self, operation: Operation, perform: Callable[[], Any]) -> Any:
        return self.do_some(operation, lambda limit: perform())

    def do_some(self, operation: Operation, perform: Callable[[int | None], Any]) -> Any:
        """:meth:`do`, of what may read or write fewer bytes than it was asked to."""
        if not self.sees(str(operation.path)):
            return perform(None)
        if operation.kind == READ:
            return perform(self._before(operation))
        with self._lock:
            result = perform(self._before(operation))
            self._after(operation, result if isinstance(result, int) else 0)
            return result


def _path_of(file: Any, dir_fd: int | None = None) -> Path:
    """Of a name, or of a descriptor."""
    if isinstance(file, int):
        return Path(f"/proc/self/fd/{file}").readlink()
    base = Path() if dir_fd is None else _path_of(dir_fd)
    return (base / os.fsdecode(os.fspath(file))).absolute()


def _file_type(watch: _Watch) -> type[io.FileIO]:
    """``FileIO`` that tells of what it does."""

    class File(io.FileIO):
        def __init__(self, file: Any, mode: str = "r", closefd: bool = True, opener: Any = None) -> None:
            def perform() -> None:
                io.FileIO.__init__(self, file, mode, closefd, opener)

            self.path = _path_of(file)
            if "r" in mode:
                perform()
            else:
                watch.do(Operation("create", self.path), perform)

        def write(self, data: Any, /) -> int:
            view = memoryview(data).cast("B")
            operation = Operation("write", self.path, offset=self.tell(), data=view)
            written: int = watch.do_some(operation, lambda limit: io.FileIO.write(self, view[:limit]))
            return written

        def truncate(self, size: int | None = None, /) -> int:
            wanted = self.tell() if size is None else size
            result: int = watch.do(
                Operation("truncate", self.path, size=wanted), lambda: io.FileIO.truncate(self, wanted)
            )
            return result

        def readinto(self, buffer: Any, /) -> int:
            view = memoryview(buffer).cast("B")
            operation = Operation(READ, self.path)
            result: int = watch.do_some(operation, lambda limit: io.FileIO.readinto(self, view[:limit]))
            return result

        def read(self, size: int | None = -1, /) -> bytes:
            if size is None or size < 0:
                return self.readall()
            result: bytes = watch.do_some(
                Operation(READ, self.path), lambda limit: io.FileIO.read(self, min(size, limit or size))
            )
            return result

        def readall(self) -> bytes:
            result: bytes = watch.do(Operation(READ, self.path), lambda: io.FileIO.readall(self))
            return result

    return File


def _opener(watch: _Watch, file_type: type[io.FileIO], real: Any) -> Any:
    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if isinstance(file, int) or not watch.sees(str(_path_of(file))):
            return real(file, mode, buffering, *rest, **named)
        raw = file_type(os.fspath(file), mode.replace("b", "").replace("t", ""), True, named.pop("opener", None))
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedReader(raw) if "r" in mode and "+" not in mode else io.BufferedWriter(raw)
        named.pop("closefd", None)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **named)

    return opened


@contextmanager
def watched(roots: Sequence[Path], before: Before, after: After = lambda operation, result: None) -> Iterator[None]:
    """Call ``before`` and ``after`` around every operation in or below ``roots``, until the end of ``with``.

    What ``before`` raises is what the program gets instead; what it returns is the most bytes that are read or written
    now. ``after`` is given how many bytes were written.
    """
    import fcntl

    watch = _Watch(roots, before, after)
    restore: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        restore.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, value)

    def on_path(kind: str, real: Any) -> Any:
        def wrapped(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            extra = named if dir_fd is None else {**named, "dir_fd": dir_fd}
            return watch.do(Operation(kind, _path_of(path, dir_fd)), lambda: real(path, *rest, **extra))

        return wrapped

    def on_rename(real: Any) -> Any:
        def wrapped(source: Any, target: Any, **named: Any) -> Any:
            operation = Operation("rename", _path_of(source), target=_path_of(target))
            return watch.do(operation, lambda: real(source, target, **named))

        return wrapped

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def perform() -> int:
            return real_open(path, flags, mode, dir_fd=dir_fd)

        where = _path_of(path, dir_fd)
        if not flags & os.O_CREAT or where.exists():
            return perform()
        descriptor: int = watch.do(Operation("create", where), perform)
        return descriptor

    def synced(descriptor: int) -> None:
        path = _path_of(descriptor)
        watch.do(Operation("folder sync" if path.is_dir() else "sync", path), lambda: real_fsync(descriptor))

    def allocated(descriptor: int, offset: int, size: int) -> None:
        operation = Operation("allocate", _path_of(descriptor), size=offset + size)
        watch.do(operation, lambda: real_allocate(descriptor, offset, size))

    def written(descriptor: int, data: Any) -> int:
        operation = Operation("write", _path_of(descriptor), data=memoryview(data).cast("B"))
        count: int = watch.do(operation, lambda: real_write(descriptor, data))
        return count

    def copied(source: int, target: int, count: int, *rest: Any) -> int:
        start = os.lseek(target, 0, os.SEEK_CUR)
        content = memoryview(os.pread(source, count, os.lseek(source, 0, os.SEEK_CUR)))
        operation = Operation("write", _path_of(target), offset=start, data=content)
        if not content:
            return real_copy(source, target, count, *rest)
        result: int = watch.do(operation, lambda: real_copy(source, target, count, *rest))
        return result

    def cloned(descriptor: Any, request: int, *rest: Any) -> Any:
        if request == _FICLONE:  # the copy is to be seen as writes
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_ioctl(descriptor, request, *rest)

    real_open, real_fsync, real_allocate, real_write = os.open, os.fsync, os.posix_fallocate, os.write
    real_copy, real_ioctl = os.copy_file_range, fcntl.ioctl
    file_type = _file_type(watch)
    kinds = {"mkdir": "make folder", "unlink": "remove", "remove": "remove", "rmdir": "remove folder"}
    values: dict[str, Any] = {name: on_path(kind, getattr(os, name)) for name, kind in kinds.items()}
    values |= {name: on_rename(getattr(os, name)) for name in ("rename", "replace")}
    values |= {"open": opened, "fsync": synced, "posix_fallocate": allocated, "write": written}
    values |= {"copy_file_range": copied}
    try:
        for name, value in values.items():
            patch(os, name, value)
        patch(fcntl, "ioctl", cloned)
        opener = _opener(watch, file_type, io.open)
        for module in (builtins, io):
            patch(module, "open", opener)
        accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps functions of its own
        for name, value in {**values, "open": opener}.items():
            if accessor is not None and name in accessor.__dict__:
                patch(accessor, name, staticmethod(value))
        for module in [module for name, module in sys.modules.items() if name.startswith("pissa_hub")]:
            for name, value in list(vars(module).items()):
                if value is io.FileIO:
                    patch(module, name, file_type)
        yield
    finally:
        for owner, name, value in reversed(restore):
            setattr(owner, name, value)


_FICLONE = 0x40049409


class Recorder:
    """Writes down all that is done, a line of JSON for each; :func:`recorded` reads it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def after(self, operation: Operation, written: int) -> None:
        table = {
            "kind": operation.kind,
            "path": str(operation.path),
            "target": operation.target and str(operation.target),
            "offset": operation.offset,
            "data": bytes(operation.data[:written]).hex(),
            "size": operation.size,
        }
        self._file.write(json.dumps(table) + "\n")


def recorded(file: Path) -> list[Operation]:
    """What a :class:`Recorder` wrote."""
    tables = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Operation(
            table["kind"],
            Path(table["path"]),
            table["target"] and Path(table["target"]),
            table["offset"],
            memoryview(bytes.fromhex(table["data"])),
            table["size"],
        )
        for table in tables
    ]


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a process.

    Attributes:
        action: a signal's or an error's name: SIGKILL, SIGTERM, SIGINT, ENOSPC, EIO, ...; "short": a third of what
            is to be written is, or so many bytes as some network disks give at a time are read; "none".
        at: number of the operation, from 1, or its name.
        after: rather than before it; of signals.
        lasting: from there on, all that takes space or, of other errors than a full disk, all.
        of_reads: count the reads instead.
    """

    action: str = "none"
    at: int | str = 0
    after: bool = False
    lasting: bool = False
    of_reads: bool = False


_SHORT_READ = 1000
# What a full disk still does.
_FREE_OF_SPACE = ("sync", "folder sync", "remove", "remove folder")


class Spoiler:
    """Carries out a fault, and notes the names of all operations as they begin.

    Args:
        root: that names are relative to.
        fault: what goes wrong.
        log: a line for each operation, such as "operations 1.5 out/config.json: rename", with the time of a counter
            that all processes share.
    """

    def __init__(self, root: Path, fault: Fault, log: TextIO) -> None:
        self._fault = fault
        self._names = Names(root)
        self._log = log
        self._struck = False
        self.operations: list[str] = []
        self.reads: list[str] = []

    def before(self, operation: Operation) -> int | None:
        names = self.reads if operation.kind == READ else self.operations
        names.append(self._names.name(operation))
        kind = "reads" if names is self.reads else "operations"
        self._log.write(f"{kind} {time.perf_counter()} {names[-1]}\n")
        if self._fault.of_reads == (operation.kind == READ) and not self._fault.after:
            return self._act(operation, names)
        return None

    def after(self, operation: Operation, written: int) -> None:
        if self._fault.after:
            self._act(operation, self.operations)

    def _act(self, operation: Operation, names: Sequence[str]) -> int | None:
        fault = self._fault
        strikes = fault.at in (len(names), names[-1]) or (fault.lasting and self._struck)
        if fault.action == "none" or not strikes:
            return None
        self._struck = True
        if fault.action == "short":
            return _SHORT_READ if operation.kind == READ else max(len(operation.data) // 3, 1)
        if fault.action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault.action))
            return None
        code = getattr(errno, fault.action)
        if fault.lasting and code in (errno.ENOSPC, errno.EDQUOT) and operation.kind in _FREE_OF_SPACE:
            return None
        raise OSError(code, os.strerror(code), str(operation.path))
