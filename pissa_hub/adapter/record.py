"""pissa_conversion.json: what a converted adapter was made of, for which base, and how exact it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pissa_hub.adapter.peft_files import CONVERSION_NAME
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import AdapterError
from pissa_hub.manifest import file_digest, file_digests
from pissa_hub.seal import read_sealed, sealed

FORMAT = "pissa-hub-conversion"
VERSION = 1


@dataclass(frozen=True)
class ModuleRecord:
    """One converted module.

    Attributes:
        module: its path in memory.
        shape: (out, in) of the change; of an embedding (dim, rows).
        rank: of the result.
        exact_rank: directions that the change has.
        update: ||Delta W||_F / ||s B A||_F against the initial state; None where there is none.
        error: ||Delta W - B A||_F / ||Delta W||_F of the factors as stored; 0 where nothing changed.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    exact_rank: int
    update: float | None
    error: float


@dataclass(frozen=True)
class ConversionRecord:
    """The whole file.

    Attributes:
        tool: name and version.
        settings: what was asked for.
        adapter: name -> digest of the trained adapter's files.
        init: digest of the initial factors.
        base: the original model: repo_id, revision and the digests of its shards, as far as they are known, and
            ``deviation``, the largest relative distance of residual + initial adapter from its weights.
        modules: by name.
        notes: sentences for whoever uses the result.
        files: name -> digest of what was written.
    """

    tool: Mapping[str, str]
    settings: Mapping[str, Any]
    adapter: Mapping[str, FileDigest]
    init: FileDigest
    base: Mapping[str, Any]
    modules: tuple[ModuleRecord, ...] = field(repr=False)
    notes: tuple[str, ...]
    files: Mapping[str, FileDigest]

    @property
    def largest_error(self) -> float:
        return max(module.error for module in self.modules)

    def to_bytes(self) -> bytes:
        return sealed({"format": FORMAT, "version": VERSION, **asdict(self)})


def load_conversion(folder: Path) -> ConversionRecord:
    """Read the record of a converted adapter. Raises AdapterError if there is none of this version."""
    path = folder / CONVERSION_NAME
    again = "convert the adapter again"
    try:
        table = read_sealed(path)
        if (table.pop("format"), table.pop("version")) != (FORMAT, VERSION):
            raise AdapterError(f"{path} is of another version", "use a newer pissa_hub")
        names = [table["base"][key] for key in ("repo_id", "revision", "license")]
        deviation = table["base"]["deviation"]
        if not all(isinstance(name, str | None) for name in names) or not (deviation is None or _is_figure(deviation)):
            raise ValueError("has a base that is none")
        if not all(isinstance(table["settings"][key], str) for key in ("dtype", "for")):
            raise ValueError("has settings that are none")
        file_digests(table["base"]["files"])
        return ConversionRecord(
            tool=dict(table["tool"]),
            settings=dict(table["settings"]),
            adapter=file_digests(table["adapter"]),
            init=file_digest(table["init"]),
            base=dict(table["base"]),
            modules=_modules(table["modules"]),
            notes=tuple(map(str, table["notes"])),
            files=file_digests(table["files"]),
        )
    except ValueError as error:
        raise AdapterError(f"{path} {error}", again) from None
    except (KeyError, TypeError, AttributeError):
        raise AdapterError(f"{path} lacks fields, or has others than a conversion's record", again) from None


def _modules(tables: Any) -> tuple[ModuleRecord, ...]:
    modules = tuple(ModuleRecord(**{**table, "shape": tuple(table["shape"])}) for table in tables)
    for module in modules:
        sizes = (*module.shape, module.rank, module.exact_rank)
        figures = (module.error, 0.0 if module.update is None else module.update)
        if (
            not isinstance(module.module, str)
            or len(module.shape) != 2
            or any(type(size) is not int or size < 0 for size in sizes)
            or not all(map(_is_figure, figures))
        ):
            raise ValueError("has figures of a module that are none")
    if not modules:
        raise ValueError("has no modules")
    return modules


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
