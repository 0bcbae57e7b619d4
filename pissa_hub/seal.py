"""Records that betray their own damage: JSON files that end with the SHA-256 of themselves.

The 64 hex digits of their last key, ``sha256``, are the digest of the file's own bytes with zeros in the place of these
digits. So every byte counts, white space and the order of the keys too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.opening import read_bounded
from pissa_hub.checkpoint.strict_json import parse_object

SEAL = "sha256"
_ZEROS = b"0" * 64
_END = b'"\n}\n'
_MAX_BYTES = 256 << 20
_MAX_DEPTH = 32


def sealed(table: Mapping[str, Any]) -> bytes:
    """The file of a record, whose table has no seal yet."""
    text = json.dumps({**table, SEAL: _ZEROS.decode()}, indent=1, ensure_ascii=False, allow_nan=False)
    return _sealed(f"{text}\n".encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """The table of a record, its seal included, once every byte is known to be as it was written.

    Raises:
        ValueError: with a one-line clause that fits after the file's name.
    """
    try:
        data = read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if data != _sealed(data):
        raise ValueError("was changed or damaged after it was written: its own SHA-256 is another")
    table = parse_object(data)
    level: list[Any] = [table]
    for _ in range(_MAX_DEPTH):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in items if isinstance(item, dict | list)]
    if level:  # writing it again would not end well
        raise ValueError(f"is nested more than {_MAX_DEPTH} deep")
    return table


def _sealed(data: bytes) -> bytes:
    """``data`` with the digits that it has to have."""
    stop = len(data) - len(_END)
    before, after = data[: max(stop - len(_ZEROS), 0)], data[max(stop, 0) :]
    return before + hashlib.sha256(before + _ZEROS + after).hexdigest().encode() + after
