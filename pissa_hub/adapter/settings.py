"""What a user asks of ``convert``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pissa_hub.adapter.initial import is_hub_id
from pissa_hub.checkpoint.header import TORCH_DTYPES
from pissa_hub.errors import PlanError
from pissa_hub.pipeline.settings import ADAPTER_DTYPES

EXACT, AUTO = "exact", "auto"
# Rounding both balanced factors moves their product by this many units of roundoff, relative to its norm.
_ROUNDING_UNITS = 0.6


@dataclass(frozen=True)
class ConversionSettings:
    """What a user asks of ``convert``.

    Attributes:
        rank: ``exact`` (every direction that the change has), a number, or ``auto`` (the fewest within ``max_error``).
        max_error: largest ||Delta W - B A||_F / ||Delta W||_F of a module, for ``auto``.
        dtype: of the result: float32, bfloat16 or float16.
        server: ``peft``, ``vllm``, ``sglang``, ``llama.cpp``, ``tgi`` or ``ollama``.
        base_model: Hub id of the original model, where init does not say it.
    """

    rank: str | int = EXACT
    max_error: float | None = None
    dtype: str = "float32"
    server: str = "peft"
    base_model: str | None = None

    def __post_init__(self) -> None:
        """Raises PlanError for values that do not fit together."""
        if self.dtype not in ADAPTER_DTYPES:
            raise PlanError(f"dtype {self.dtype!r} cannot be used", f"use {', '.join(ADAPTER_DTYPES)}")
        is_known = self.rank >= 1 if isinstance(self.rank, int) else self.rank in (EXACT, AUTO)
        if not is_known:
            raise PlanError(f"rank {self.rank!r} cannot be used", "give --rank exact, auto or a positive number")
        if (self.rank == AUTO) != (self.max_error is not None):
            raise PlanError("--rank auto and --max-error go together", "give both or neither")
        if self.max_error is not None and not self._rounding < self.max_error < 1:
            raise PlanError(
                f"a largest error of {self.max_error} cannot be reached: {self.dtype} rounds by {self._rounding:.1e}",
                "give --max-error below 1 and above that, or a wider --dtype",
            )
        if self.base_model is not None and not is_hub_id(self.base_model):
            raise PlanError(f"base model {self.base_model!r} is no Hub id", "give --base-model as ORG/NAME")

    @property
    def _rounding(self) -> float:
        return _ROUNDING_UNITS * torch.finfo(TORCH_DTYPES[ADAPTER_DTYPES[self.dtype]]).eps / 2

    @property
    def largest_tail(self) -> float:
        """What ``auto`` may leave out of a change, relative, beside rounding."""
        assert self.max_error is not None
        return math.sqrt(self.max_error**2 - self._rounding**2)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "max_error": self.max_error,
            "dtype": self.dtype,
            "for": self.server,
            "base_model": self.base_model,
        }
