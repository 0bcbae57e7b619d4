"""Recipes: how to decompose and publish popular base models, one small TOML file each.

A recipe holds no revision: a run pins the commit that it finds.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.opening import read_bounded
from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.errors import PlanError
from pissa_hub.licenses import has_prefix, terms_of
from pissa_hub.regexes import require_harmless

MAX_BYTES = 16 << 10
MISSING = {
    "fp8-blocks": "reading weights stored as FP8 blocks with scales",
    "safetensors": "a copy in safetensors, since the repository holds pickles only",
}
"""Values of ``needs``: what the model's repository would take to be decomposed as it is."""

_REMEDY = "correct the recipe"
_SUFFIX = ".toml"
_REGEX = "re:"
_MAX_RANK = 1 << 16
_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,80}\{rank\}[\w.-]{0,10}", re.ASCII)
_LINK = re.compile(r"https://[!-~]{1,300}")


@dataclass(frozen=True)
class Expected:
    """What the plan of a recipe comes to.

    Attributes:
        weights: how many are decomposed.
        features: sum of in and out features of these; times the rank, it is the adapter's parameters.
        size: bytes of the source's tensors, and of the residual base's.
    """

    weights: int
    features: int
    size: int


@dataclass(frozen=True)
class Recipe:
    """How to decompose one base model.

    Attributes:
        name: of the recipe, its file's name without ``.toml``.
        model: Hub id ``org/name``.
        license: the Hub's id; ``other`` has ``license_name`` and ``license_link``.
        ranks: worth publishing; the first is the default.
        repository: name of the repository to publish as, with ``{rank}`` in it.
        expected: what the plan comes to.
        gated: whether the Hub asks for consent before a download; None where that is not settled.
        inherits: ids of further licenses whose duties hold, of models that this one was made from.
        alpha: lora_alpha; None makes it each weight's rank.
        targets: as ``decompose --targets``.
        exclude: as ``decompose --exclude``.
        rank_pattern: regex of a module name -> rank.
        needs: a key of :data:`MISSING`, or None where the repository can be decomposed as it is.
        notes: sentences for whoever uses the recipe.
    """

    name: str
    model: str
    license: str
    ranks: tuple[int, ...]
    repository: str
    expected: Expected
    gated: bool | None = None
    license_name: str | None = None
    license_link: str | None = None
    inherits: tuple[str, ...] = ()
    alpha: float | None = None
    targets: str = "all-linear"
    exclude: str = ""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    needs: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of :class:`~pissa_hub.pipeline.settings.Settings` that the recipe decides."""
        return {
            "rank": self.ranks[0],
            "alpha": self.alpha,
            "targets": self.targets,
            "exclude": self.exclude,
            "rank_pattern": dict(self.rank_pattern),
        }

    def repository_name(self, rank: int) -> str:
        """Of the repository that a decomposition of this rank is published as, without its owner."""
        return self.repository.replace("{rank}", str(rank))

    def adapter_size(self, rank: int) -> int:
        """Bytes of the adapter's fp32 tensors."""
        return 4 * rank * self.expected.features

    def remarks(self, settings: Mapping[str, Any], weights: int) -> list[str]:
        """The notes, and what is odd about a plan with these settings and so many weights to decompose."""
        is_own = (settings["targets"], settings["exclude"]) == (self.targets, self.exclude)
        if not is_own or weights == self.expected.weights:
            return [*self.notes]
        odd = f"the plan decomposes {weights} weights, recipe {self.name} expects {self.expected.weights}"
        return [*self.notes, f"{odd}: is this the model that it is for?"]

    def require_source(self) -> str:
        """The Hub id to decompose. Raises PlanError where that is not possible yet."""
        if self.needs is None:
            return self.model
        fact = f"recipe {self.name} needs {MISSING[self.needs]}"
        raise PlanError(fact, f"convert {self.model} to a folder of bf16 or fp32 safetensors and give it as SOURCE")


def list_recipes() -> tuple[Recipe, ...]:
    """The recipes that ship with the package, by name, numbers in numerical order. Raises PlanError."""
    return tuple(load_recipe(path) for path in sorted(_folder().glob(f"*{_SUFFIX}"), key=_natural))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read one recipe.

    Args:
        recipe: name of one that ships with the package, or a ``.toml`` file.

    Raises:
        PlanError: there is no such recipe, or it is not a valid one.
    """
    path = Path(recipe)
    if path.suffix != _SUFFIX:
        path = _folder() / f"{recipe}{_SUFFIX}"
        if not _NAME.fullmatch(str(recipe)) or not path.is_file():
            raise _unknown(str(recipe))
    return parse_recipe(path, _read(path))


def parse_recipe(path: Path, data: bytes) -> Recipe:
    """The recipe in the bytes of ``path``. Raises PlanError, naming the file, for anything but a valid one."""
    if not _NAME.fullmatch(path.stem):
        raise PlanError(
            f"{path}: {shown(path.stem)} is no name for a recipe", "use lower-case letters, digits, - and ."
        )
    values = _checked(path, _toml(path, data), _KEYS, "")
    expected = Expected(**_checked(path, values.pop("expected"), _EXPECTED_KEYS, "expected."))
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    recipe = Recipe(name=path.stem, expected=expected, **{**values, **lists})
    is_other = recipe.license == "other"
    if is_other != (recipe.license_name is not None) or is_other != (recipe.license_link is not None):
        raise PlanError(f"{path}: license_name and license_link go with license = 'other' and only with it", _REMEDY)
    prefix = terms_of((recipe.license, recipe.license_name or "", *recipe.inherits)).name_prefix
    if prefix and not has_prefix(recipe.repository, prefix):
        fact = f"{path}: the license wants a name that starts with {prefix}, and repository is {recipe.repository!r}"
        raise PlanError(fact, _REMEDY)
    return recipe


def _folder() -> Path:
    """``manifests`` of the installed package, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "manifests"
    return installed if installed.is_dir() else package.parent / "manifests"


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)]


def _unknown(name: str) -> PlanError:
    names = [path.stem for path in _folder().glob(f"*{_SUFFIX}")]
    near = difflib.get_close_matches(name.lower(), names)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return PlanError(f"there is no recipe {shown(name)}", f"{hint}`pissa-hub recipes` lists them; a file ends in .toml")


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}", "check the path of the recipe") from error
    except ValueError as error:
        raise PlanError(f"{path} {error}", "check that it is a recipe") from None


def _toml(path: Path, data: bytes) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: dict[str, Any] = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not UTF-8 (byte {error.start})", _REMEDY) from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not valid TOML ({' '.join(str(error).split())[:200]})", _REMEDY) from None
    return table


@dataclass(frozen=True)
class _Key:
    """What a key's value has to be, in words and as a test."""

    what: str
    fits: Callable[[Any], bool]
    required: bool = False


def _checked(path: Path, table: Mapping[str, Any], keys: Mapping[str, _Key], prefix: str) -> dict[str, Any]:
    for name, value in table.items():
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(keys)}"
            raise PlanError(f"{path} has the unknown key {prefix}{shown(name)[1:-1]}", hint)
        if not keys[name].fits(value):
            raise PlanError(f"{path}: {prefix}{name} is {_shown(value)}, not {keys[name].what}", _REMEDY)
    for name, key in keys.items():
        if key.required and name not in table:
            raise PlanError(f"{path} lacks {prefix}{name}, {key.what}", "add it to the recipe")
    return dict(table)


def _shown(value: Any) -> str:
    try:
        return shown(str(value))
    except ValueError:  # Python does not write out thousands of digits
        return "too large a number"


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable() and value == value.strip()


def _is_list(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and 0 < len(value) <= 20 and all(map(is_item, value)) and len(set(value)) == len(value)
    )


def _is_count(limit: int) -> Callable[[Any], bool]:
    # bool is an int to Python, not to TOML.
    return lambda value: type(value) is int and 0 < value <= limit


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_line(key) and _is_harmless(key) and _is_count(_MAX_RANK)(rank) for key, rank in value.items()
    )


def _is_choice(value: Any) -> bool:
    """As of ``decompose --targets``."""
    return _is_line(value) and (not value.startswith(_REGEX) or _is_harmless(value.removeprefix(_REGEX)))


def _is_harmless(pattern: str) -> bool:
    try:
        require_harmless(pattern)
    except ValueError:
        return False
    return True


_KEYS = {
    "model": _Key("a Hub id org/name", _matches(_HUB_ID), True),
    "license": _Key("a license id of the Hub", _matches(_NAME), True),
    "license_name": _Key("a license's name", _matches(_NAME)),
    "license_link": _Key("an https link", _matches(_LINK)),
    "inherits": _Key("a list of license ids of the Hub", _is_list(_matches(_NAME))),
    "gated": _Key("true or false", lambda value: isinstance(value, bool)),
    "ranks": _Key("a list of different ranks", _is_list(_is_count(_MAX_RANK)), True),
    "alpha": _Key("a positive number", lambda value: type(value) in (int, float) and 0 < value < float("inf")),
    "targets": _Key("targets as of decompose --targets", lambda value: _is_choice(value) and bool(value)),
    "exclude": _Key("names or re:REGEX as of decompose --exclude", _is_choice),
    "rank_pattern": _Key("a table of ranks by simple regexes", _is_pattern),
    "repository": _Key("a repository's name with {rank} in it and without its owner", _matches(_REPOSITORY), True),
    "needs": _Key(f"one of {', '.join(MISSING)}", lambda value: isinstance(value, str) and value in MISSING),
    "notes": _Key("a list of different sentences", _is_list(lambda value: _is_line(value) and bool(value))),
    "expected": _Key("a table", lambda value: isinstance(value, dict), True),
}
_EXPECTED_KEYS = {
    "weights": _Key("the number of weights to decompose", _is_count(2**31), True),
    "features": _Key("the sum of their in and out features", _is_count(2**53), True),
    "size": _Key("the bytes of the source's tensors", _is_count(2**53), True),
}
