"""pissa_conversion.json: what a converted adapter was made of, for which base, and how exact it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pissa_hub.adapter.config import to_json
from pissa_hub.adapter.peft_files import CONVERSION_NAME
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import AdapterError

FORMAT = "pissa-hub-conversion"
VERSION = 1
_MAX_BYTES = 256 << 20


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
        return to_json({"format": FORMAT, "version": VERSION, **asdict(self)})


def load_conversion(folder: Path) -> ConversionRecord:
    """Read the record of a converted adapter. Raises AdapterError if there is none of this version."""
    path = folder / CONVERSION_NAME
    again = "convert the adapter again"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AdapterError(f"{path} is larger than {_MAX_BYTES} bytes", again)
        table = parse_object(path.read_bytes())
        if (table.pop("format"), table.pop("version")) != (FORMAT, VERSION):
            raise AdapterError(f"{path} is of another version", "use a newer pissa_hub")
        if not all(isinstance(table["base"][key], str | None) for key in ("repo_id", "revision", "license")):
            raise ValueError("has a base that is none")
        return ConversionRecord(
            tool=dict(table["tool"]),
            settings=dict(table["settings"]),
            adapter=_digests(table["adapter"]),
            init=_digest(table["init"]),
            base=dict(table["base"]),
            modules=_modules(table["modules"]),
            notes=tuple(map(str, table["notes"])),
            files=_digests(table["files"]),
        )
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}", again) from None
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
            or any(type(figure) not in (int, float) or not 0 <= figure < math.inf for figure in figures)
        ):
            raise ValueError("has figures of a module that are none")
    if not modules:
        raise ValueError("has no modules")
    return modules


def _digests(table: Mapping[str, Any]) -> dict[str, FileDigest]:
    return {name: _digest(digest) for name, digest in table.items()}


def _digest(table: Mapping[str, Any]) -> FileDigest:
    digest = FileDigest(**table)
    if type(digest.size) is not int or not isinstance(digest.sha256, str):
        raise ValueError("has digests that are none")
    return digest
