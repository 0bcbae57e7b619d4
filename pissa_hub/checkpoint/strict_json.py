"""JSON from untrusted files: one object, UTF-8, no repeated keys, nothing that is not JSON."""

import json
from collections import Counter
from typing import Any, NoReturn


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object; what :mod:`json` tolerates beyond the standard is refused.

    Raises:
        ValueError: with a one-line clause that fits after the file's name ("repeats the key 'a'").
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be parsed") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def shown(text: str) -> str:
    """``repr`` of an untrusted string, on one line and of bounded length, for messages."""
    text = repr(text[:200])
    return text if len(text) <= 120 else text[:119] + "…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"repeats the key {shown(repeated)}")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")
