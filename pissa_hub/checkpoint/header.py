"""The header of a safetensors file: a strict parser and a byte-exact builder.

A file is ``<u64 little-endian n><n bytes of JSON><data>``. The JSON maps each tensor's name to its dtype,
shape and ``data_offsets`` within the data, and ``__metadata__`` to strings. The tensors tile the data without
hole or overlap.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path, PurePath
from typing import Any

from pissa_hub.checkpoint.dtypes import CANONICAL_ORDER, DTYPES, TORCH_DTYPES
from pissa_hub.checkpoint.opening import open_regular
from pissa_hub.checkpoint.strict_json import parse_object, paused_gc, shown
from pissa_hub.errors import HeaderError

__all__ = [
    "CANONICAL_ORDER",
    "DTYPES",
    "TORCH_DTYPES",
    "Header",
    "TensorEntry",
    "TensorSpec",
    "build_header",
    "canonical",
    "header_bytes",
    "parse_header",
    "read_header",
]

# The format allows 100 MB, which take a gigabyte once parsed. This is room for 80,000 matrices in one file, nearly as
# many as the largest published models have in a hundred, and stays below 100 MB of memory and a second.
MAX_HEADER_BYTES = 25_000_000
MAX_HEADER_TENSORS = 80_000
MAX_HEADER_VALUES = 8 * MAX_HEADER_TENSORS
MAX_NAME_CHARS = 256
MAX_DIMS = 32
LENGTH_BYTES = 8
_REDOWNLOAD = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a stored tensor is: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * DTYPES[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a stored tensor lies: bytes ``start`` to ``stop`` of the file, both absolute."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A whole safetensors header; ``header[name]`` and ``name in header`` look tensors up.

    Attributes:
        entries: the tensors in file order.
        metadata: ``__metadata__``, empty where the file has none.
        data_start: byte at which the first tensor starts.
        file_size: bytes of the whole file.
        raw: the first ``data_start`` bytes of the file, the eight-byte length included.
    """

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    raw: bytes = field(repr=False)

    @cached_property
    def _by_name(self) -> dict[str, TensorEntry]:
        return {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> TensorEntry:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name


def canonical(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The specs in the order in which safetensors itself writes them: widest dtype first, then by name."""
    return sorted(specs, key=lambda spec: (CANONICAL_ORDER.index(spec.dtype), spec.name))


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Header:
    """Lay out a file that holds ``specs`` in the order given; empty ``metadata`` is left out.

    For specs in :func:`canonical` order and at most one metadata key, the bytes are those of ``save_file``;
    with more keys safetensors' own order is random.

    Raises:
        ValueError: two specs share a name.
    """
    specs = tuple(specs)
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("two tensors share a name")
    spans = list(pairwise(accumulate((spec.nbytes for spec in specs), initial=0)))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for spec, span in zip(specs, spans, strict=True):
        table[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    entries = tuple(
        TensorEntry(spec, len(raw) + start, len(raw) + stop) for spec, (start, stop) in zip(specs, spans, strict=True)
    )
    file_size = entries[-1].stop if entries else len(raw)
    return Header(entries, dict(metadata), len(raw), file_size, raw)


def read_header(path: Path) -> Header:
    """Parse the header of a safetensors file and check it against the file's size; no tensor is read.

    Raises:
        HeaderError: one sentence that names the file, the tensor where one is at fault, and the remedy.
    """
    return parse_header(path, *_read_raw(path))


def parse_header(path: PurePath, raw: bytes, file_size: int) -> Header:
    """:func:`read_header`, of a file that lies elsewhere.

    Args:
        path: the file, for messages.
        raw: its first :func:`header_bytes` bytes.
        file_size: bytes of the whole file.

    Raises:
        HeaderError: as :func:`read_header`.
    """
    text = memoryview(raw)[LENGTH_BYTES:]
    if text[:1].tobytes() != b"{":
        raise HeaderError(f"{path}: the header does not begin with '{{'", _REDOWNLOAD)
    if raw.count(b"{") > MAX_HEADER_TENSORS + 2:
        raise HeaderError(f"{path}: the header describes more than {MAX_HEADER_TENSORS} tensors", _REDOWNLOAD)
    try:
        table = parse_object(text, MAX_HEADER_VALUES)
    except ValueError as error:
        raise HeaderError(f"{path}: the header {error}", _REDOWNLOAD) from None
    metadata = _checked_metadata(path, table.pop("__metadata__", {}))
    with paused_gc():
        entries = [_entry(path, name, table.pop(name), len(raw)) for name in list(table)]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_tiling(path, entries, len(raw), file_size)
    return Header(tuple(entries), metadata, len(raw), file_size, raw)


def header_bytes(path: PurePath, start: bytes, file_size: int) -> int:
    """How many bytes at the start of a file its header takes, the eight of its length included.

    Args:
        path: the file, for messages.
        start: its first eight bytes or more.
        file_size: bytes of the whole file.

    Raises:
        HeaderError: there is no header of such a length.
    """
    prefix = start[:LENGTH_BYTES]
    if prefix == b"version ":
        raise HeaderError(f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` there")
    if len(prefix) < LENGTH_BYTES:
        raise HeaderError(f"{path} is too short for a safetensors file ({file_size} bytes)", _REDOWNLOAD)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        fact = f"{path}: a header of {length} bytes is claimed, and at most {MAX_HEADER_BYTES} are read"
        raise HeaderError(fact, "check that it is a safetensors file, or download it again")
    missing = LENGTH_BYTES + length - file_size
    if missing > 0:
        raise HeaderError(f"{path} is truncated: {missing} bytes of its header are missing", _REDOWNLOAD)
    return LENGTH_BYTES + length


def _read_raw(path: Path) -> tuple[bytes, int]:
    """The length and JSON bytes, and the file's size; reads nothing that the file's size does not allow."""
    try:
        if not path.is_file():
            raise HeaderError(f"{path} is not a file", "check the path or download the file again")
        with open_regular(path) as file:
            file_size = os.fstat(file.fileno()).st_size
            length = header_bytes(path, file.read(LENGTH_BYTES), file_size)
            file.seek(0)
            return file.read(length), file_size
    except OSError as error:
        raise HeaderError(f"{path} cannot be read: {error.strerror}", "check the file and its permissions") from error


def _checked_metadata(path: PurePath, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise HeaderError(f"{path}: __metadata__ is not an object", _REDOWNLOAD)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise HeaderError(f"{path}: __metadata__ {shown(key)} is not a string", _REDOWNLOAD)
    return metadata


def _entry(path: PurePath, name: str, fields: Any, data_start: int) -> TensorEntry:
    def refuse(fact: str) -> HeaderError:
        return HeaderError(f"{path}: tensor {shown(name)} {fact}", _REDOWNLOAD)

    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise refuse(f"has a name that is empty, longer than {MAX_NAME_CHARS} or not printable")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, span = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"has the unknown dtype {shown(dtype)}" if isinstance(dtype, str) else "has no dtype name")
    if not _is_naturals(shape) or len(shape) > MAX_DIMS:
        raise refuse(f"has a shape that is not a list of at most {MAX_DIMS} sizes")
    # A zero elsewhere in the shape must not excuse sizes that no library can multiply out.
    if prod(size or 1 for size in shape) >= 2**63:
        raise refuse("has a shape that overflows 63 bits")
    if not _is_naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise refuse("has data_offsets that are not [begin, end]")
    spec = TensorSpec(name, dtype, tuple(shape))
    if spec.numel * DTYPES[dtype] != 8 * (span[1] - span[0]):
        fact = f"spans {span[1] - span[0]} bytes, but {dtype} {shape} takes {spec.numel * DTYPES[dtype] / 8:g}"
        raise refuse(fact)
    return TensorEntry(spec, data_start + span[0], data_start + span[1])


def _is_naturals(value: Any) -> bool:
    # bool is an int to Python, not to the format.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_tiling(path: PurePath, entries: list[TensorEntry], data_start: int, file_size: int) -> None:
    end = data_start
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise HeaderError(f"{path}: tensor {shown(entry.name)} {fault}", _REDOWNLOAD)
        end = entry.stop
    if end > file_size:
        raise HeaderError(f"{path} is truncated: {end - file_size} bytes are missing", _REDOWNLOAD)
    if end < file_size:
        raise HeaderError(f"{path} has {file_size - end} bytes after its last tensor", _REDOWNLOAD)
