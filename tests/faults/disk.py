"""What a disk may hold after the power went, under the weakest of the usual rules.

Data that was not synced may be there, absent, zeros or torn. What happened in a folder since it was last synced - names
that were made, renamed and removed - may each have reached the disk or not, whatever became of the others.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .operations import Operation, partial_name

_SECTOR = 512
_VARIANTS = ("as it was", "as it became", "zeros", "torn")
# Relative name -> content; None is a folder.
State = dict[str, bytes | None]


@dataclass
class _File:
    durable: bytes = b""
    content: bytearray = field(default_factory=bytearray)

    @property
    def is_synced(self) -> bool:
        return self.durable == self.content

    def variant(self, kind: str, generator: random.Random) -> bytes:
        """What a power cut may leave of it."""
        if kind == "as it was":
            return self.durable
        if kind == "as it became":
            return bytes(self.content)
        if kind == "zeros":
            return bytes(len(self.content))
        old = self.durable.ljust(len(self.content), b"\0")
        starts = range(0, len(self.content), _SECTOR)
        return b"".join(generator.choice((old, self.content))[start : start + _SECTOR] for start in starts)


@dataclass
class _Folder:
    durable: dict[str, _Node] = field(default_factory=dict)
    entries: dict[str, _Node] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)

    def change(self, change: _Change) -> None:
        change.apply(self.entries)
        self.pending.append(change)

    def sync(self) -> None:
        self.durable = dict(self.entries)
        self.pending.clear()

    def crashed(self, kept: Sequence[bool]) -> dict[str, _Node]:
        """What of it is there if only those of the pending changes were kept."""
        entries = dict(self.durable)
        for change, is_kept in zip(self.pending, kept, strict=True):
            if is_kept:
                change.apply(entries)
        return entries


_Node = _File | _Folder


@dataclass(frozen=True)
class _Change:
    """A name of a folder that comes, goes, or takes the place of another."""

    added: str | None = None
    node: _Node | None = None
    removed: str | None = None

    def apply(self, entries: dict[str, _Node]) -> None:
        if self.removed is not None:
            entries.pop(self.removed, None)
        if self.added is not None and self.node is not None:
            entries[self.added] = self.node


class Disk:
    """A folder that begins empty, and what is done in it."""

    def __init__(self, root: Path) -> None:
        self._path = root
        self._root = _Folder()

    def apply(self, operation: Operation) -> None:
        """One operation, as it was recorded."""
        path = operation.path
        if operation.kind == "folder sync":
            folder = self._find(path)
            assert isinstance(folder, _Folder)
            folder.sync()
            return
        if path == self._path:  # which is there
            return
        parent = self._find(path.parent)
        assert isinstance(parent, _Folder)
        if operation.kind == "create":
            parent.change(_Change(path.name, _File()))
        elif operation.kind == "make folder":
            if path.name not in parent.entries:
                parent.change(_Change(path.name, _Folder()))
        elif operation.kind in ("remove", "remove folder"):
            parent.change(_Change(removed=path.name))
        elif operation.kind == "rename":
            assert operation.target is not None
            assert operation.target.parent == path.parent
            parent.change(_Change(operation.target.name, parent.entries[path.name], path.name))
        else:
            self._change_file(parent.entries[path.name], operation)

    def _change_file(self, file: _Node, operation: Operation) -> None:
        assert isinstance(file, _File)
        if operation.kind == "sync":
            file.durable = bytes(file.content)
        elif operation.kind == "write":
            end = operation.offset + len(operation.data)
            file.content.extend(bytes(max(end - len(file.content), 0)))
            file.content[operation.offset : end] = operation.data
        elif operation.kind == "allocate":
            file.content.extend(bytes(max(operation.size - len(file.content), 0)))
        else:
            assert operation.kind == "truncate"
            del file.content[operation.size :]
            file.content.extend(bytes(operation.size - len(file.content)))

    def crashes(self, generator: random.Random, most: int) -> Iterator[State]:
        """States after a power cut now, some of them twice: all, or ``most`` at random where there are more."""
        folders, files = self._nodes()
        switches = sum(len(folder.pending) for folder in folders)
        choices: list[Sequence[bool | str]] = [(True, False)] * switches + [_VARIANTS] * len(files)
        if math.prod(map(len, choices)) <= most:
            picked: Iterator[Sequence[bool | str]] = itertools.product(*choices)
        else:
            picked = ([generator.choice(choice) for choice in choices] for _ in range(most))
        for choice in picked:
            kept, variants = iter(choice[:switches]), choice[switches:]
            entries = {id(folder): folder.crashed([bool(next(kept)) for _ in folder.pending]) for folder in folders}
            contents = {
                id(file): file.variant(str(variant), generator) for file, variant in zip(files, variants, strict=True)
            }
            state: State = {}
            self._lay_out(self._root, PurePosixPath(), entries, contents, state)
            yield state

    def _lay_out(
        self,
        folder: _Folder,
        place: PurePosixPath,
        entries: dict[int, dict[str, _Node]],
        contents: dict[int, bytes],
        state: State,
    ) -> None:
        for name, node in entries[id(folder)].items():
            if isinstance(node, _Folder):
                state[str(place / name)] = None
                self._lay_out(node, place / name, entries, contents, state)
            else:
                state[str(place / name)] = contents.get(id(node), node.durable)

    def _nodes(self) -> tuple[list[_Folder], list[_File]]:
        """All folders that may be there, and all files whose content is in doubt."""
        folders: list[_Folder] = []
        files: dict[int, _File] = {}
        queue = [self._root]
        while queue:
            folder = queue.pop()
            folders.append(folder)
            named = [change.node for change in folder.pending if change.node is not None]
            for node in {id(node): node for node in [*folder.durable.values(), *named]}.values():
                if isinstance(node, _Folder):
                    queue.append(node)
                elif not node.is_synced:
                    files[id(node)] = node
        return folders, list(files.values())

    def _find(self, path: Path) -> _Node:
        node: _Node = self._root
        for part in path.relative_to(self._path).parts:
            assert isinstance(node, _Folder)
            node = node.entries[part]
        return node


def power_cuts(
    operations: Sequence[Operation], root: Path, generator: random.Random, most: int = 64
) -> Iterator[tuple[int, State]]:
    """Distinct states that a power cut may leave, each with the number of operations before it.

    Args:
        operations: as recorded.
        root: folder that they happened in.
        generator: of what is torn and, where there are too many states, which.
        most: states to look at after each operation.
    """
    disk, seen = Disk(root), set()
    for number in range(len(operations) + 1):
        if number:
            disk.apply(operations[number - 1])
        for state in disk.crashes(generator, most):
            key = frozenset((partial_name(name), content) for name, content in state.items())
            if key not in seen:
                seen.add(key)
                yield number, state


def lay_out(state: State, root: Path) -> None:
    """Make a folder of a state."""
    for name, content in state.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
