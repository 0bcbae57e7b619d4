"""One hostile input: how it is made, which command gets it, and the one line that this has to give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]

DECOMPOSE = "decompose source -o out --rank 2"
PLAN = "decompose source --dry-run --rank 2"
CONVERT = "convert adapter --init done -o out"
MERGE = "merge done adapter -o out"
RESTORE = "restore source --init done -o out"
VERIFY = "verify done"
INSPECT = "inspect done"
RECIPE = "recipes hostile.toml"
PUBLISH_MERGED = "publish merged org/name --dry-run"
PUBLISH_LORA = "publish lora org/name --dry-run"


@dataclass(frozen=True)
class Attack:
    """One case of the corpus.

    Attributes:
        name: unique.
        command: arguments, in a folder that holds copies of the sound ones in :attr:`inputs`.
        line: what the line has to hold: of the error or, where the command goes on, of a note, or anything that it
            prints.
        spoil: makes the input hostile, given that folder.
        code: exit code; 0 is a harmless twin, or an attack that gains nothing.
        writes: whether a command that goes on writes ``out``.
        is_slow: takes seconds to make.
    """

    name: str
    command: str
    line: str
    spoil: Spoil
    code: int = 1
    writes: bool = False
    is_slow: bool = False

    @property
    def arguments(self) -> list[str]:
        return self.command.split()

    @property
    def inputs(self) -> list[str]:
        """Folders of ``sound`` that the command or the attack reads."""
        known = ("source", "done", "adapter", "lora", "merged")
        return [name for name in known if name in self.arguments]

    def build(self, sound: Path, folder: Path) -> None:
        """Make the input in a folder that does not exist yet."""
        folder.mkdir()
        for name in self.inputs:
            shutil.copytree(sound / name, folder / name)
        self.spoil(folder)


def store(path: Path, header: Mapping[str, Any] | bytes | str, data: bytes = b"") -> None:
    """Write a safetensors file, whatever its header says."""
    text = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else to_bytes(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def to_bytes(table: Any) -> bytes:
    return json.dumps(table, ensure_ascii=True).encode()


def tensor(start: int, stop: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file of ``size`` bytes, zeros after ``start``, that takes no room."""
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(size)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place; NaN and surrogates may come of it."""
    table = json.loads(path.read_bytes())
    change(table)
    path.write_bytes(to_bytes(table))


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    make(path)


def named(prefix: str, cases: Mapping[str, tuple[str, Spoil]], command: str) -> Iterable[Attack]:
    """Refused cases of one command: name -> (line, spoil)."""
    return [Attack(f"{prefix}: {name}", command, line, spoil) for name, (line, spoil) in cases.items()]
