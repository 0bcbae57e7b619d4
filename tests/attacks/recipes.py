"""Hostile recipes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .case import RECIPE, Attack, named, sparse

NAME = "hostile.toml"
_SOUND = {
    "model": '"org/name"',
    "license": '"mit"',
    "ranks": "[2]",
    "repository": '"name-r{rank}"',
    "expected": "{weights = 1, features = 1, size = 1}",
}


def values(**changes: str) -> Callable[[Path], object]:
    """The sound recipe with other values, TOML each."""
    text = "".join(f"{key} = {value}\n" for key, value in {**_SOUND, **changes}.items())
    return content(text.encode())


def content(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / NAME).write_bytes(data)


_CASES = {
    "not UTF-8": ("is not UTF-8", content(b"\xff\xfe")),
    "no TOML": ("is not valid TOML", content(b"import os; os.system('id')")),
    "16 kB of brackets": ("is not valid TOML", content(b"a = " + b"[" * 16_000)),
    "8,000 tables deep": ("has the unknown key a", content(b"[" + b"a." * 8000 + b"a]")),
    "a gigabyte, sparse": ("is larger than 16384 bytes", lambda folder: sparse(folder / NAME, b"#", 1 << 30)),
    "a pipe": ("is not a regular file", lambda folder: os.mkfifo(folder / NAME)),
    "a device": ("is not a regular file", lambda folder: (folder / NAME).symlink_to("/dev/zero")),
    "a folder": ("cannot be read", lambda folder: (folder / NAME).mkdir()),
    "a dangling link": ("cannot be read", lambda folder: (folder / NAME).symlink_to("nowhere")),
    "an unknown key": ("has the unknown key", values(exec='"os.system"')),
    "a key with escapes": ("has the unknown key", values(**{'"\\u001b[2J"': "1"})),
    "a rank of 5000 digits": ("is", values(ranks=f"[{'9' * 5000}]")),
    "a rank of 16,000 digits": ("is", values(ranks=f"[{'9' * 16_000}]")),
    "a rank that is true": ("not a list of different ranks", values(ranks="[true]")),
    "a negative rank": ("not a list of different ranks", values(ranks="[-1]")),
    "alpha NaN": ("not a positive number", values(alpha="nan")),
    "a path for the model": ("not a Hub id", values(model='"../../etc/passwd"')),
    "a web address for the model": ("not a Hub id", values(model='"https://example.org/a"')),
    "a path for the repository": ("not a repository's name", values(repository='"../{rank}"')),
    "code for the repository": ("not a repository's name", values(repository='"{rank.__class__}"')),
    "escapes in a note": ("not a list of different sentences", values(notes='["\\u001b[2J"]')),
    "a line break in a note": ("not a list of different sentences", values(notes='["a\\nb"]')),
    "a link that is code": ("not an https link", values(license_link='"javascript:alert(1)"')),
    "a regex bomb for targets": ("not targets as of", values(targets='"re:(a|aa)*b"')),
    "a regex bomb to exclude": ("not names or re:REGEX", values(exclude='"re:(([a-z])+.)+x"')),
    "a regex bomb for ranks": ("not a table of ranks", values(rank_pattern="{'(a+)+b' = 2}")),
    "numbers for weights": ("not the number of weights", values(expected="{weights = -1, features = 1, size = 1}")),
}

ATTACKS: tuple[Attack, ...] = (
    *named("recipe", _CASES, RECIPE),
    Attack(
        "followed recipe: a regex bomb",
        f"decompose --recipe {NAME} source -o out",
        "not targets as of",
        values(targets='"re:(a|aa)*b"'),
    ),
    Attack("recipe: sound", RECIPE, "name-r2", values(), code=0),
    Attack("recipe: a path for a name", "recipes ../../etc/passwd", "there is no recipe", lambda folder: None),
)
