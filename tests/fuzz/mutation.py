"""Mutants of valid documents: nodes of JSON and words of other text replaced, deleted, repeated, inserted and swapped.

A document may have several parts; ``join`` and ``parts_of`` put them together and take them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring, encode_basestring_ascii
from random import Random
from typing import Any

# RFC 7464's record separator: no valid JSON, TOML or YAML holds it.
_SEPARATOR = b"\x1e"
_EDITS = (1, 1, 1, 2, 3, 5)
_LENGTH_BYTES = 8

ODD_NUMBERS = (
    "0", "-0", "-1", "1", "2", "3", "7", "255", "65536", "2147483647", "2147483648", "9007199254740993",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "-9223372036854775809", "1" + "0" * 400,
    "9" * 5000, "0.0", "-0.0", "0.1", "1.0", "1.5", "1e16", "1e308", "1e999", "-1e999", "5e-324", "1e-999",
    "NaN", "Infinity", "-Infinity",
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "a", ".", "..", "../../up", "/etc/passwd", "C:\\x", "a/b", "\x00", "\n", "a\r\nb", "\t", "\x1b[31m",
    "\x7f", "\x85", "\u2028", "\u202e", "\u200b", "\ufeff", "\ud800", "\udcff", "é", "e\u0301", "😀", "١٢", "x" * 300,
    "x" * 5000, "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](https://e.example/x.png)",
    "[x](javascript:a())", "`", "```\n<b>", "|", "---", "\n---\n<b>", "a: b", "# x", "- x", "*a", "&a",
    "!!python/object/apply:os.system ['id']", "yes", "null", "{rank}", "%s", "{}", "$(id)",
    "(a+)+$", "(", "[", "(?i)x", "\\", "re:(", "0", "-1", "1e9",
    "True", "model.safetensors", "lora_A", "base_model.model.", ".lora_A.weight", ".base_layer.weight", "llama",
    "LlamaModel",
)  # fmt: skip
_OTHER_VALUES = ("null", "true", "false", "[]", "{}", "[[]]", "[null]", '{"":{}}', "[0,0]", '{"a":1,"a":2}')
_DEPTHS = (*[1] * 8, *[2] * 8, *[30] * 4, 500, 5000, 100_000)
_WORD = re.compile(r'"(?:[^"\\\n]|\\.)*"|[\w.+-]+|\s+|.', re.DOTALL)

Odd = Callable[[], str]


class _Text(str):
    """JSON as it is to be written: what Python's values cannot say, such as 1e999."""


class _Pairs(list[Any]):
    """An object as [key, value] lists: keys may repeat."""


def join(parts: Sequence[bytes]) -> bytes:
    """One document out of several."""
    return _SEPARATOR.join(parts)


def parts_of(data: bytes, count: int) -> list[bytes]:
    """The parts of a document; those that are missing are empty, too many are the last one's."""
    parts = data.split(_SEPARATOR, count - 1)
    return parts + [b""] * (count - len(parts))


def odd_value(random: Random) -> str:
    """JSON text of a value that parsers stumble over."""
    kind = random.randrange(4)
    if kind == 0:
        return random.choice(ODD_NUMBERS)
    if kind == 1:
        return _written(random.choice(ODD_TEXTS))
    if kind == 2:
        return random.choice(_OTHER_VALUES)
    depth, inner = random.choice(_DEPTHS), random.choice(ODD_NUMBERS)
    return random.choice(("[" * depth + inner + "]" * depth, '{"a":' * depth + inner + "}" * depth))


def mutate(data: bytes, random: Random, odd: Odd | None = None) -> bytes:
    """A few edits of one part of a document.

    Args:
        data: the document.
        random: decides.
        odd: JSON text to put in; :func:`odd_value` where none is given.
    """
    parts = data.split(_SEPARATOR)
    chosen = random.randrange(len(parts))
    parts[chosen] = _edited(parts[chosen], random, odd or (lambda: odd_value(random)))
    return join(parts)


def _edited(part: bytes, random: Random, odd: Odd) -> bytes:
    edits = random.choice(_EDITS)
    length = int.from_bytes(part[:_LENGTH_BYTES], "little")
    if part[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{" and random.random() < 0.6:  # safetensors
        text = _edited(part[_LENGTH_BYTES : _LENGTH_BYTES + length], random, odd)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text + part[_LENGTH_BYTES + length :]
    kind = random.random()
    if kind < 0.7:
        try:
            tree = _parsed(part)
            for _ in range(edits):
                _edit_tree(tree, random, odd)
            return _rendered(tree[0]).encode()
        except (ValueError, RecursionError):
            pass
    for _ in range(edits):
        part = _edit_words(part, random, odd) if kind < 0.85 else _edit_bytes(part, random)
    return part


def _parsed(part: bytes) -> list[Any]:
    """The value in a list, so that it can be replaced itself."""

    def pairs(found: list[tuple[str, Any]]) -> _Pairs:
        return _Pairs([list(pair) for pair in found])

    return [
        json.loads(part, object_pairs_hook=pairs, parse_int=_Text, parse_float=_Text, parse_constant=_Text),
    ]


def _edit_tree(tree: list[Any], random: Random, odd: Odd) -> None:
    slots = _slots(tree)
    holder, position = random.choice(slots)
    value = _value(holder, position)
    kind = random.randrange(9)
    if kind <= 1:
        _put(holder, position, _Text(odd()))
    elif kind == 2 and holder is not tree:
        del holder[position]
    elif kind == 3 and holder is not tree:
        target = random.randrange(len(holder) + 1)
        holder.insert(target, list(holder[position]) if isinstance(holder, _Pairs) else value)
    elif kind == 4 and isinstance(value, list):
        item = _Text(odd())
        entry = [random.choice(ODD_TEXTS), item] if isinstance(value, _Pairs) else item
        value.insert(random.randrange(len(value) + 1), entry)
    elif kind == 5:
        other_holder, other = random.choice(slots)
        taken = _value(other_holder, other)
        if not isinstance(taken, list):  # a container may be the holder's own
            _put(holder, position, taken)
    elif kind == 6 and isinstance(holder, _Pairs):
        keys = [pair[0] for pair in holder]
        holder[position][0] = random.choice([random.choice(ODD_TEXTS), random.choice(keys), f"{keys[position]}x"])
    elif isinstance(value, _Text):
        _put(holder, position, _Text(_other_number(value, random)))
    elif isinstance(value, str):
        cut, odd_text = random.randint(0, len(value)), random.choice(ODD_TEXTS)
        _put(holder, position, random.choice([value[:cut] + odd_text + value[cut:], value[:cut], odd_text + value]))
    else:
        _put(holder, position, random.choice([[value], _Pairs([["a", value]]), _Text(odd())]))


def _slots(tree: list[Any]) -> list[tuple[list[Any], int]]:
    found: list[tuple[list[Any], int]] = []
    waiting: list[list[Any]] = [tree]
    while waiting:
        holder = waiting.pop()
        for position in range(len(holder)):
            found.append((holder, position))
            value = _value(holder, position)
            if isinstance(value, list):
                waiting.append(value)
    return found


def _value(holder: list[Any], position: int) -> Any:
    return holder[position][1] if isinstance(holder, _Pairs) else holder[position]


def _put(holder: list[Any], position: int, value: Any) -> None:
    if isinstance(holder, _Pairs):
        holder[position][1] = value
    else:
        holder[position] = value


def _other_number(text: str, random: Random) -> str:
    try:
        number = int(text)
    except ValueError:
        return random.choice((f"-{text}", "0", f"{text}e99"))
    return str(random.choice((number + 1, number - 1, 2 * number, -number, number + 2**63)))


def _rendered(value: Any) -> str:
    if isinstance(value, _Pairs):
        return "{" + ",".join(f"{_written(key)}:{_rendered(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_rendered, value)) + "]"
    return str(value) if isinstance(value, _Text) else _written(value)


def _written(value: object) -> str:
    """JSON of a plain value; what cannot be printed is escaped."""
    if isinstance(value, str):
        return (encode_basestring if value.isprintable() else encode_basestring_ascii)(value)
    return json.dumps(value)


def _edit_words(part: bytes, random: Random, odd: Odd) -> bytes:
    words = _WORD.findall(part.decode("utf-8", "surrogateescape")) or [""]
    position = random.randrange(len(words))
    kind = random.randrange(6)
    if kind == 0:
        words[position] = odd()
    elif kind == 1:
        words[position] = random.choice(ODD_TEXTS)
    elif kind == 2:
        del words[position]
    elif kind == 3:
        words[position] = random.choice(words)
    else:
        stop = random.randint(position, min(position + 12, len(words)))
        span = words[position:stop]
        target = random.randrange(len(words))
        words[target:target] = span
        if kind == 4:
            del words[position:stop]
    return "".join(words).encode("utf-8", "surrogatepass" if random.random() < 0.1 else "replace")


def _edit_bytes(part: bytes, random: Random) -> bytes:
    data = bytearray(part)
    start = random.randint(0, len(data))
    stop = min(len(data), start + random.choice((1, 1, 1, 4, 64)))
    kind = random.randrange(5)
    if kind == 0 and start < len(data):
        data[start] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[start:stop]
    elif kind == 2:
        data[start:start] = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 8))))
    elif kind == 3:
        data[start:start] = data[start:stop] * random.choice((1, 2, 30))
    else:
        del data[start:]
    return bytes(data)
