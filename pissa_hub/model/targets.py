"""Which weights get an adapter, at which rank, and how adapter_config.json says so. Names and shapes only."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pissa_hub.errors import TargetError
from pissa_hub.model.modules import ModelLayout, WeightModule

ALL_LINEAR = "all-linear"
_REGEX = "re:"
_MAX_SHOWN = 20

_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True)
class Target:
    """A weight to decompose: W (out, in) = residual + alpha / rank * B (out, rank) A (rank, in)."""

    module: WeightModule
    rank: int
    alpha: float

    @property
    def out_features(self) -> int:
        """Rows of W as PEFT sees it; a Conv1D is stored transposed."""
        return self.module.shape[1 if self.module.kind == "conv1d" else 0]

    @property
    def in_features(self) -> int:
        """Columns of W as PEFT sees it."""
        return self.module.shape[0 if self.module.kind == "conv1d" else 1]


def select_targets(
    layout: ModelLayout,
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] | None = None,
    rank: int,
    alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> tuple[Target, ...]:
    """Chooses the weights to decompose, in the order of the checkpoint.

    Args:
        layout: the model.
        targets: 'all-linear' (every Linear and Conv1D but the output head and tied weights); or names, as
            'NAME,NAME' or a sequence, each the path of a module or its last parts; or 're:REGEX', which has
            to match a whole path. A regex picks among Linear and Conv1D only; a name has to be one.
        exclude: names or 're:REGEX' to leave out; '' or None: nothing.
        rank: of every weight that ``rank_pattern`` does not name.
        alpha: of every weight; None: each weight's own rank, that is scaling 1.
        rank_pattern: regex -> rank by PEFT's rule: the path matches ``(.*\\.)?(REGEX)$``, first match wins.

    Raises:
        TargetError: a name, pattern or key matches nothing or is no regex; a target is no Linear or Conv1D,
            or is tied to another weight; a rank is not between 1 and the smaller side of its weight.
    """
    excluded = _excluded_names(layout, exclude)
    wanted = _wanted_names(layout, targets, excluded)
    chosen = [module for module in layout.modules if module.name in wanted - excluded]
    if not chosen:
        raise TargetError("--exclude leaves no weight to decompose", "exclude less or target more")
    ranks = _ranks(chosen, rank, rank_pattern or {})
    return tuple(
        Target(module, own_rank, float(own_rank if alpha is None else alpha))
        for module, own_rank in zip(chosen, ranks, strict=True)
    )


def peft_target_modules(layout: ModelLayout, targets: Sequence[Target]) -> list[str]:
    """PEFT's ``target_modules`` for the targets: the shortest path endings that fit nothing else in memory.

    Returns:
        sorted endings, e.g. ``['k_proj', 'q_proj']``; full paths where no ending tells the targets apart.

    Raises:
        TargetError: a target's full path is also the ending of another module's path.
    """
    chosen = {target.module.name for target in targets}
    in_memory = Counter(ending for name in chosen.union(layout.all_module_names) for ending in _endings(name))
    in_chosen = Counter(ending for name in chosen for ending in _endings(name))
    endings = set()
    for name in chosen:
        ending = next((ending for ending in _endings(name) if in_memory[ending] == in_chosen[ending]), None)
        if ending is None:
            raise TargetError(
                f"PEFT cannot target {name} alone: the path of another module ends with it",
                f"target that one too or --exclude {name}",
            )
        endings.add(ending)
    return sorted(endings)


def peft_patterns(targets: Sequence[Target], rank: int, alpha: float | None) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's ``rank_pattern`` and ``alpha_pattern``: what differs from the config's ``r`` and ``lora_alpha``.

    Args:
        targets: the weights to decompose.
        rank: the config's ``r``.
        alpha: the config's ``lora_alpha``; None: equal to ``rank``.

    Returns:
        (rank_pattern, alpha_pattern), sorted by key. Keys are regexes under PEFT's rule; no target matches
        two of them with different values, so that their order does not matter.
    """
    default_alpha = float(rank if alpha is None else alpha)
    return (
        patterns({target.module.name: target.rank for target in targets}, rank),
        patterns({target.module.name: target.alpha for target in targets}, default_alpha),
    )


def _wanted_names(layout: ModelLayout, targets: str | Sequence[str], excluded: frozenset[str]) -> frozenset[str]:
    """Names of the modules that ``targets`` asks for; only excluded ones may be undecomposable."""
    linear = [module for module in layout.modules if _is_linear(module)]
    if isinstance(targets, str) and targets.strip().lower() == ALL_LINEAR:
        wanted = [module for module in linear if not module.is_output_head and not module.tied_with]
        if not wanted:
            raise TargetError("the checkpoint holds no Linear or Conv1D weight", "name a model that has some")
        return frozenset(module.name for module in wanted)

    matchers = _matchers(targets, "--targets")
    if not matchers:
        raise TargetError("--targets is empty", f"name modules or use {ALL_LINEAR}")
    wanted = []
    for shown, matches in matchers.items():
        found = [module for module in layout.modules if matches(module.name)]
        if shown.startswith(_REGEX):
            found = [module for module in found if _is_linear(module)] or found
        if not found:
            raise _no_match("--targets", shown, matches, layout)
        for module in found:
            if module.name not in excluded:
                _check_decomposable(module)
        wanted += found
    return frozenset(module.name for module in wanted)


def _excluded_names(layout: ModelLayout, exclude: str | Sequence[str] | None) -> frozenset[str]:
    """Names of the modules that ``exclude`` fits; each of its parts has to fit a module, stored or not."""
    containers = {name.rpartition(".")[0] for name in layout.all_module_names}
    leaves = {module.name for module in layout.modules}.union(layout.all_module_names) - containers
    excluded: set[str] = set()
    for shown, matches in _matchers(exclude or "", "--exclude").items():
        found = {name for name in leaves if matches(name)}
        if not found:
            raise _no_match("--exclude", shown, matches, layout)
        excluded |= found
    return frozenset(excluded)


def _matchers(spec: str | Sequence[str], option: str) -> dict[str, Callable[[str], bool]]:
    """What was asked for, as typed -> whether a module path fits it, by PEFT's rules."""
    if isinstance(spec, str) and spec.startswith(_REGEX):
        compiled = _compiled(spec.removeprefix(_REGEX), f"{option} {spec!r}")
        return {spec: lambda name: compiled.fullmatch(name) is not None}

    def ends_with(wanted: str) -> Callable[[str], bool]:
        return lambda name: f".{name}".endswith(f".{wanted}")

    names = (name.strip() for name in (spec.split(",") if isinstance(spec, str) else spec))
    return {name: ends_with(name) for name in names if name}


def _compiled(pattern: str, shown: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{shown} is no valid regex: {error}", "correct it") from error


def _ranks(modules: Sequence[WeightModule], rank: int, rank_pattern: Mapping[str, int]) -> list[int]:
    keys: dict[re.Pattern[str], int] = {}
    for key, value in rank_pattern.items():
        compiled = _compiled(rf"(.*\.)?({key})$", f"--rank-pattern {key!r}")
        if not any(compiled.match(module.name) for module in modules):
            raise TargetError(f"--rank-pattern {key!r} matches no target", _suggestion(key, modules))
        keys[compiled] = value

    ranks = []
    for module in modules:
        own = next((value for key, value in keys.items() if key.match(module.name)), rank)
        if not 1 <= own <= min(module.shape):
            leaf, limit = module.name.rpartition(".")[2], min(module.shape)
            raise TargetError(
                f"rank {own} does not fit {module.tensor} of shape {list(module.shape)}: 1 to {limit} does",
                f"use --rank-pattern {leaf}={limit}, --exclude {leaf} or another --rank",
            )
        ranks.append(own)
    return ranks


def _check_decomposable(module: WeightModule) -> None:
    if module.tied_with:
        fact = f"{module.name} shares its weight with {', '.join(module.tied_with)}, which this would corrupt"
    elif module.kind == "embedding":
        fact = f"{module.name} is an embedding, not a Linear or Conv1D"
    elif module.kind == "other":
        fact = (
            f"{module.name} (tensor {module.tensor}, shape {list(module.shape)})"
            f" is no plain Linear or Conv1D weight but {module.what}"
        )
    else:
        return
    raise TargetError(fact, f"leave it out of --targets or add --exclude {module.name}")


def _no_match(option: str, shown: str, matches: Callable[[str], bool], layout: ModelLayout) -> TargetError:
    for module in layout.modules:
        for name in module.tied_with:
            if matches(name):
                return TargetError(
                    f"{name} shares its weight with {module.name}, which this would corrupt",
                    f"leave it out of {option}",
                )
    linear = [module for module in layout.modules if _is_linear(module)]
    return TargetError(f"{option} {shown!r} matches no weight of the checkpoint", _suggestion(shown, linear))


def _suggestion(wanted: str, modules: Iterable[WeightModule]) -> str:
    """'did you mean ...? there are ...', by the last part of the names."""
    leaves = sorted({module.name.rpartition(".")[2] for module in modules})
    near = difflib.get_close_matches(wanted.removeprefix(_REGEX).rpartition(".")[2], leaves)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    more = ", ..." if len(leaves) > _MAX_SHOWN else ""
    return f"{hint}there are {', '.join(leaves[:_MAX_SHOWN]) or 'no Linear or Conv1D weights'}{more}"


def patterns(values: Mapping[str, _Value], default: _Value) -> dict[str, _Value]:
    """Regex -> value for the names whose value is not the default, one per group with a common ending."""
    values_of = defaultdict(set)
    for name, value in values.items():
        for ending in _endings(name):
            values_of[ending].add(value)
    patterns = {}
    for name, value in values.items():
        if value != default:
            shared = (re.escape(ending) for ending in _endings(name) if len(values_of[ending]) == 1)
            # A full path can be the ending of another one; then only the anchor tells the two apart.
            patterns[next(shared, f"^{re.escape(name)}")] = value
    return dict(sorted(patterns.items()))


def _endings(name: str) -> Iterator[str]:
    """'a.b.c' -> 'c', 'b.c', 'a.b.c'."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def _is_linear(module: WeightModule) -> bool:
    return module.kind in ("linear", "conv1d")
