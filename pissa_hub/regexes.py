"""Regexes out of files that a stranger may have written: only such as are done soon, whatever they are matched with."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

from pissa_hub.checkpoint.strict_json import shown

MAX_CHARS = 1000
MAX_REGEXES = 1000
MAX_STEPS = 100_000_000
"""Of all patterns and paths together, by :func:`_steps`."""
MAX_STEPS_EACH = 10_000_000
"""Of one pattern with a path of 80 characters, of which most have fewer."""

# A repeated group may match in exponentially many ways.
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPETITION = re.compile(r"[*+{]")
_ESCAPED = re.compile(r"\\(\W)")


def require_harmless(pattern: str) -> None:
    """Raise ValueError, with a clause that fits after the pattern, for one that is no regex or may take for ever."""
    if (
        len(pattern) > MAX_CHARS
        or _REPEATED_GROUP.search(pattern)
        or _steps({80: 1}, len(_REPETITION.findall(pattern)), _branches(pattern)) > MAX_STEPS_EACH
    ):
        raise ValueError("may take for ever to match")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(_anchored(pattern))
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"is no regex: {error}") from None


class PathPatterns:
    """Values by regexes of module paths. By PEFT's rule a path matches ``(.*\\.)?(KEY)$``, and the first match wins.

    Args:
        values: regex -> value.
        name: of this table, for messages.

    Raises:
        ValueError: there are too many that are more than a name, or one is not harmless.
    """

    def __init__(self, values: Mapping[str, float], name: str) -> None:
        self._values = tuple(values.values())
        self._plain: dict[str, int] = {}
        self._regexes: list[tuple[int, str, re.Pattern[str]]] = []
        for position, key in enumerate(values):
            plain = _ESCAPED.sub(r"\1", key)
            if re.escape(plain) == key:  # thousands of these are nothing but names, and are looked up
                self._plain.setdefault(plain, position)
            elif len(self._regexes) == MAX_REGEXES:
                raise ValueError(f"{name} has more than {MAX_REGEXES} regexes")
            else:
                self._regexes.append((position, key, _harmless_key(key, name)))

    def find(self, path: str, default: float) -> float:
        """The value of a path."""
        parts = path.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts)))
        first = min((self._plain[ending] for ending in endings if ending in self._plain), default=len(self._values))
        for position, _, regex in self._regexes:
            if position > first:
                break
            if regex.match(path):
                first = position
                break
        return default if first == len(self._values) else self._values[first]

    def require_affordable(self, paths: Iterable[str]) -> None:
        """Raise ValueError, with a clause that fits after the patterns, if all paths may take too long to match."""
        lengths = Counter(map(len, paths))
        by_repetitions: Counter[int] = Counter()
        for _, key, _ in self._regexes:
            by_repetitions[len(_REPETITION.findall(key))] += _branches(key)
        if sum(_steps(lengths, *kind) for kind in by_repetitions.items()) > MAX_STEPS:
            raise ValueError("may take for ever to match")


def _harmless_key(key: str, name: str) -> re.Pattern[str]:
    try:
        require_harmless(key)
    except ValueError as error:
        raise ValueError(f"the key {shown(key)} of {name} {error}") from None
    return re.compile(_anchored(key))


def _anchored(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _branches(pattern: str) -> int:
    """More than the ways through all choices together: the most that so many bars give in so many groups."""
    groups = max(pattern.count("("), 1)
    return round(math.pow(1 + pattern.count("|") / groups, groups)) << pattern.count("?")


def _steps(lengths: Mapping[int, int], repetitions: int, branches: int) -> float:
    """More than the steps that patterns of so many repetitions take with paths of these lengths."""
    places = repetitions + 1  # PEFT's own (.*\.)? is one more
    return (
        branches * sum(count * math.pow(length, places) for length, count in lengths.items()) / math.factorial(places)
    )
