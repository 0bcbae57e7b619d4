"""What a user asks of ``decompose``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pissa_hub.errors import PlanError
from pissa_hub.factorization.svd import Method, SVDSettings

ADAPTER_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SOURCE_DTYPE = "source"


@dataclass(frozen=True)
class Settings:
    """Options of a decomposition; the defaults are the command line's.

    Attributes:
        method: how factors and base follow from W; see ``factorization.methods``.
        rank: r of every weight that ``rank_pattern`` does not name.
        alpha: lora_alpha; None makes it each weight's own rank, so that the scaling is 1.
        use_rslora: scaling alpha / sqrt(r) instead of alpha / r.
        targets: ``all-linear``, comma-separated names or ``re:REGEX``.
        exclude: names or ``re:REGEX`` to leave out; empty for none.
        rank_pattern: regex of a module name -> rank.
        adapter_dtype: dtype of A and B: float32, bfloat16 or float16.
        residual_dtype: dtype of the base's targeted weights: ``source`` or one of the above.
        svd: ``krylov``, ``full`` or ``randomized``.
        niter: power iterations of ``randomized``.
        tolerance: largest certified loss of energy of ``krylov``.
        seed: of the random start blocks.
    """

    method: Literal["pissa"] = "pissa"
    rank: int = 16
    alpha: float | None = None
    use_rslora: bool = False
    targets: str = "all-linear"
    exclude: str = ""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    adapter_dtype: str = "float32"
    residual_dtype: str = SOURCE_DTYPE
    svd: Method = "krylov"
    niter: int = 4
    tolerance: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises PlanError for a value that no model could fit."""
        _require(self.method == "pissa", f"method {self.method!r}", "use pissa, the only one so far")
        _require(self.rank >= 1, f"rank {self.rank}", "give a positive --rank")
        _require(
            self.alpha is None or 0 < self.alpha < float("inf"),
            f"alpha {self.alpha}",
            "give a positive --alpha",
        )
        _require(
            self.svd in ("krylov", "full", "randomized"),
            f"svd {self.svd!r}",
            "use krylov, full or randomized",
        )
        _require(0 < self.tolerance < 1, f"tolerance {self.tolerance}", "give a --tolerance between 0 and 1")
        _require(0 <= self.niter <= 1000, f"niter {self.niter}", "give --niter from 0 to 1000")
        _require(self.adapter_dtype in ADAPTER_DTYPES, f"dtype {self.adapter_dtype!r}", f"use {_choices()}")
        _require(
            self.residual_dtype in (SOURCE_DTYPE, *ADAPTER_DTYPES),
            f"dtype {self.residual_dtype!r}",
            f"use {SOURCE_DTYPE} or {_choices()}",
        )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Settings:
        """What :meth:`as_dict` gave. Raises PlanError for settings that this version does not know."""
        names = {option.name for option in fields(cls)}
        return cls(**{name: value for name, value in table.items() if name in names and value is not None})

    def scaling(self, rank: int, alpha: float) -> float:
        """s of a weight: what PEFT multiplies B A by."""
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    @property
    def svd_settings(self) -> SVDSettings:
        return SVDSettings(self.svd, self.tolerance, self.niter, self.seed)

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {
            "method": self.method,
            "rank": self.rank,
            "alpha": None if self.alpha is None else float(self.alpha),
            "use_rslora": self.use_rslora,
            "targets": self.targets,
            "exclude": self.exclude,
            "rank_pattern": dict(self.rank_pattern),
            "adapter_dtype": self.adapter_dtype,
            "residual_dtype": self.residual_dtype,
            "svd": self.svd,
            "niter": self.niter if self.svd == "randomized" else None,
            "tolerance": self.tolerance if self.svd == "krylov" else None,
            "iterations": None,
            "seed": self.seed,
        }


def _require(condition: bool, fact: str, remedy: str) -> None:
    if not condition:
        raise PlanError(f"{fact} cannot be used", remedy)


def _choices() -> str:
    return ", ".join(ADAPTER_DTYPES)
