"""adapter_config.json of a LoRA: what it says, checked, and the scaling that it gives a module."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.opening import read_bounded
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.errors import AdapterError
from pissa_hub.regexes import PathPatterns

CONFIG_NAME = "adapter_config.json"
MAX_BYTES = 16 << 20
MAX_VALUES = 500_000
# Each is compared with every module.
MAX_TARGET_PARAMETERS = 1000
_SAVE_AGAIN = "save the adapter again with PEFT's save_pretrained"
# Of ranks and alphas; what lies beyond is no one's, and would overflow.
_LARGEST = 2**31

# Variants of LoRA whose forward pass is not W x + s B A x; any value but a false one means that it is in use.
_NOT_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int for index in value)


def _is_table(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_text(key) and of(inner) for key, inner in value.items())


# What a field other than null has to be, of those that are read or written again.
_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("base_model_name_or_path", "bias", "task_type"), _is_text),
    **dict.fromkeys(("modules_to_save", "target_parameters"), _is_texts),
    **dict.fromkeys(
        ("exclude_modules", "layers_pattern", "target_modules"), lambda value: _is_text(value) or _is_texts(value)
    ),
    **dict.fromkeys(
        ("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_rslora"), lambda value: isinstance(value, bool)
    ),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), lambda value: _is_table(value, lambda _: True)),
    "auto_mapping": lambda value: _is_table(value, lambda inner: inner is None or _is_text(inner)),
    "layers_to_transform": lambda value: type(value) is int or _is_indices(value),
    "trainable_token_indices": lambda value: _is_indices(value) or _is_table(value, _is_indices),
}


@dataclass(frozen=True)
class LoraConfig:
    """The fields that decide what an adapter computes.

    Attributes:
        rank, alpha: ``r`` and ``lora_alpha`` of modules that no pattern names.
        use_rslora: scaling alpha / sqrt(r) instead of alpha / r.
        rank_pattern, alpha_pattern: regex of a module's path -> value, by PEFT's rule; the first match wins.
        variants: names of what it uses that is no plain LoRA, such as DoRA.
        table: the whole file.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    variants: tuple[str, ...]
    table: Mapping[str, Any] = field(repr=False)

    def rank_of(self, module: str) -> int:
        """r of a module by its path."""
        return int(self._ranks.find(module, self.rank))

    def scaling_of(self, module: str) -> float:
        """s of a module by its path: what PEFT multiplies B A by."""
        rank, alpha = self.rank_of(module), self._alphas.find(module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def require_affordable(self, modules: Iterable[str]) -> None:
        """Raise ValueError if a pattern is no regex, or all may take too long to match with these paths."""
        modules = list(modules)
        self._ranks.require_affordable(modules)
        self._alphas.require_affordable(modules)

    @cached_property
    def _ranks(self) -> PathPatterns:
        return PathPatterns(self.rank_pattern, "rank_pattern")

    @cached_property
    def _alphas(self) -> PathPatterns:
        return PathPatterns(self.alpha_pattern, "alpha_pattern")

    @property
    def initialisation(self) -> str | None:
        """A PiSSA initialisation that PEFT did in-process, such as ``pissa_niter_4``; else None."""
        value = self.table.get("init_lora_weights")
        return value if isinstance(value, str) and value.startswith("pissa") else None

    @property
    def target_parameters(self) -> list[str]:
        """Parameters, such as fused experts, that are adapted by themselves."""
        return self.table.get("target_parameters") or []


def read_config(folder: Path) -> LoraConfig:
    """Read the adapter_config.json of a folder.

    Raises:
        AdapterError: there is none, it is malformed, or of another method than LoRA.
    """
    path = folder / CONFIG_NAME
    try:
        table = parse_object(read_bounded(path, MAX_BYTES), MAX_VALUES)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}", "check the folder and its permissions") from None
    except ValueError as error:
        raise AdapterError(f"{path} {error}", _SAVE_AGAIN) from None
    if table.get("peft_type") != "LORA":
        raise AdapterError(f"{path} describes {_shortly(table.get('peft_type'))}, not a LORA", "give a LoRA adapter")
    try:
        return _parsed(table)
    except (KeyError, ValueError) as error:
        raise AdapterError(f"{path} has fields that no LoRA has ({error})", _SAVE_AGAIN) from None


def to_json(table: Mapping[str, Any], *, allow_nan: bool = False) -> bytes:
    """A config or record as the bytes of its file; config.json of published models holds Infinity."""
    return (json.dumps(table, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n").encode()


def _parsed(table: Mapping[str, Any]) -> LoraConfig:
    for name, is_valid in _FIELDS.items():
        value = table.get(name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{name} is {_shortly(value)}")
    patterns = {name: table.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    if len(table.get("target_parameters") or ()) > MAX_TARGET_PARAMETERS:
        raise ValueError(f"target_parameters has more than {MAX_TARGET_PARAMETERS} names")
    config = LoraConfig(
        rank=_rank(table["r"], "r"),
        alpha=_alpha(table["lora_alpha"], "lora_alpha"),
        use_rslora=bool(table.get("use_rslora")),
        rank_pattern={key: _rank(value, key) for key, value in patterns["rank_pattern"].items()},
        alpha_pattern={key: _alpha(value, key) for key, value in patterns["alpha_pattern"].items()},
        variants=tuple(name for key, name in _NOT_LORA.items() if table.get(key)),
        table=table,
    )
    config.require_affordable(())
    return config


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} is {_shortly(value)}")
    return value


def _alpha(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 1 / _LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} is {_shortly(value)}")
    return float(value)


def _shortly(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
