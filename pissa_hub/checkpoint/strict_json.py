"""JSON from untrusted files: one object, UTF-8, no repeated keys, nothing that is not JSON, and no bombs."""

import gc
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

MAX_VALUES = 20_000_000
"""In one file; three bytes of ``[[],[],...`` become seventy in memory."""
MAX_DIGITS = 100
"""Of an integer: Python takes quadratic time for more, or refuses them in words of its own."""

_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes | memoryview, most_values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse one JSON object; what :mod:`json` tolerates beyond the standard is refused.

    Args:
        data: the text.
        most_values: that it may hold, objects and arrays too.

    Raises:
        ValueError: with a one-line clause that fits after the file's name ("repeats the key 'a'").
    """
    return _object(data, most_values, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def parse_lenient_object(data: bytes | memoryview, most_values: int = MAX_VALUES) -> dict[str, Any]:
    """:func:`parse_object`, as lenient as transformers: NaN, Infinity and repeated keys, of which the last holds."""
    return _object(data, most_values)


@contextmanager
def paused_gc() -> Iterator[None]:
    """While millions of objects are made that stay: the collector would walk them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def shown(text: str) -> str:
    """``repr`` of an untrusted string, on one line and of bounded length, for messages."""
    text = repr(text[:200])
    return text if len(text) <= 120 else text[:119] + "…"


def _object(data: bytes | memoryview, most_values: int, **hooks: Any) -> dict[str, Any]:
    try:
        text = str(data, "utf-8")
        # Every value but the first comes after one of these, which strings may hold as well.
        if sum(map(text.count, ",[{")) > most_values:
            raise ValueError(f"holds more than {most_values} values")
        with paused_gc():
            value = json.loads(text, parse_int=_integer, **hooks)
        if _HALF_CHARACTER.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not valid Unicode") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError("is nested too deeply to be parsed") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"holds an integer of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {shown(text)[1:-1]}, a number too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"repeats the key {shown(repeated)}")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")
