"""Matrices with the spectrum of trained linear layers, and the true error of factors of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# sigma_i ~ (i + 1)^-decay (1 - i / n)^0.7. In trained models of width 2048 sigma_64 / sigma_1 is about 0.38
# in attention and 0.69 in MLPs, which these decays give. Flat spectra are the hard ones.
ATTENTION_DECAY = 0.23
MLP_DECAY = 0.085
# Root mean square of the entries, as in initialised and trained models.
_ENTRY = 0.02


def spectrum(size: int, decay: float) -> Tensor:
    """(size,) fp32, descending, sigma_1 = 1."""
    index = torch.arange(size, dtype=torch.float64)
    return ((index + 1) ** -decay * (1 - index / size) ** 0.7).float()


def trained_like(rows: int, columns: int, decay: float, generator: torch.Generator) -> Tensor:
    """(rows, columns) fp32 with this spectrum and random singular vectors."""
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator))[0]
    sigma = spectrum(size, decay)
    scale = _ENTRY * sqrt(rows * columns) / float(torch.linalg.vector_norm(sigma))
    weight: Tensor = (left * (sigma * scale)) @ right.t()
    return weight


def singular_values(weight: Tensor) -> Tensor:
    """All (n,), descending, fp64: of the Gram matrix, so off by 1e-15 (sigma_1 / sigma_i)^2 relative."""
    tall = (weight if weight.shape[0] >= weight.shape[1] else weight.t()).double()
    squares: Tensor = torch.linalg.eigvalsh(tall.t() @ tall)
    return squares.flip(0).clamp_min(0).sqrt().cpu()


@dataclass(frozen=True)
class FactorErrors:
    """True errors of rank-r factors.

    Attributes:
        loss: 1 - captured energy / best possible energy of rank r.
        sigma_error: worst |s_i - sigma_i| / sigma_i over i <= r.
    """

    loss: float
    sigma_error: float


def factor_errors(weight: Tensor, left: Tensor, right: Tensor, sigma: Tensor) -> FactorErrors:
    """Errors of ``left @ right`` as the best approximation of its rank.

    Captured energy is ||W||_F^2 - ||W - P||_F^2 = 2 <W, P> - ||P||_F^2 with P = left @ right, in fp64.

    Args:
        weight: W (rows, columns).
        left: (rows, r).
        right: (r, columns).
        sigma: singular values of W, fp64, at least r of them.
    """
    rank = left.shape[1]
    weight, left, right = weight.double(), left.double(), right.double()
    overlap = ((left.t() @ weight) * right).sum()
    own = ((left.t() @ left) * (right @ right.t())).sum()
    best = sigma[:rank].double()
    core = torch.linalg.qr(left)[1] @ torch.linalg.qr(right.t())[1].t()
    found = torch.linalg.svdvals(core).cpu()
    return FactorErrors(
        loss=1 - float(2 * overlap - own) / float((best**2).sum()),
        sigma_error=float(((found - best).abs() / best).max()),
    )
