"""Seeded matrices of known difficulty, and what float64 says about them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pissa_hub.factorization.svd import TruncatedSVD

Generator = Callable[[int, int, int], Tensor]


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def orthogonal(size: int, columns: int, seed: int) -> Tensor:
    """(size, columns) float64 with orthonormal columns."""
    return torch.linalg.qr(_normal(size, columns, seed))[0]


def with_spectrum(sigma: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    """A fp32 matrix with these singular values, up to rounding, and random singular vectors."""
    left = orthogonal(rows, len(sigma), 2 * seed + 1)
    right = orthogonal(columns, len(sigma), 2 * seed + 2)
    return ((left * sigma.double()) @ right.t()).float()


def _index(rows: int, columns: int) -> Tensor:
    return torch.arange(min(rows, columns), dtype=torch.float64)


def power_law(rows: int, columns: int, seed: int) -> Tensor:
    return with_spectrum((_index(rows, columns) + 1) ** -0.5, rows, columns, seed)


def steep(rows: int, columns: int, seed: int) -> Tensor:
    return with_spectrum((_index(rows, columns) + 1) ** -2.0, rows, columns, seed)


def geometric(rows: int, columns: int, seed: int) -> Tensor:
    """Falls below the resolution of fp32 within the first hundred."""
    return with_spectrum(0.8 ** _index(rows, columns), rows, columns, seed)


def trained(rows: int, columns: int, seed: int) -> Tensor:
    """The slow decay of trained linear layers."""
    i = _index(rows, columns)
    return with_spectrum((i + 1) ** -0.25 * (1 - i / len(i)) ** 0.7, rows, columns, seed)


def trained_bf16(rows: int, columns: int, seed: int) -> Tensor:
    return trained(rows, columns, seed).bfloat16().float()


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    return _normal(rows, columns, seed).float()


def clustered(rows: int, columns: int, seed: int) -> Tensor:
    """Steps of 20 singular values that differ by 1e-4, each step 0.7 of the one before."""
    i = _index(rows, columns)
    return with_spectrum(0.7 ** (i // 20) * (1 - 1e-4 * (i % 20) / 20) + 1e-3, rows, columns, seed)


def low_rank(rows: int, columns: int, seed: int) -> Tensor:
    """Rank 40, up to rounding."""
    return (_normal(rows, 40, 2 * seed) @ _normal(40, columns, 2 * seed + 1)).float()


def exact_low_rank(rows: int, columns: int, seed: int) -> Tensor:
    """Rank 20 exactly: small integers."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (rows, 20), generator=generator)
    return (left @ torch.randint(-3, 4, (20, columns), generator=generator)).float()


def zero(rows: int, columns: int, seed: int) -> Tensor:
    return torch.zeros(rows, columns)


def identity(rows: int, columns: int, seed: int) -> Tensor:
    return torch.eye(rows, columns)


def isometry(rows: int, columns: int, seed: int) -> Tensor:
    return with_spectrum(torch.ones(min(rows, columns)), rows, columns, seed)


def multiple(rows: int, columns: int, seed: int) -> Tensor:
    """100 copies of one singular value, more than any block has columns, then lower ones."""
    i = _index(rows, columns)
    return with_spectrum(torch.where(i < 100, 1.0, 0.5 * 0.99 ** (i - 100)), rows, columns, seed)


def outlier(rows: int, columns: int, seed: int) -> Tensor:
    """One singular value 1e4 times as large as the next."""
    sigma = (_index(rows, columns) + 1) ** -0.3
    sigma[0] = 1e4
    return with_spectrum(sigma, rows, columns, seed)


def massive_column(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian with one column a thousand times as large, as outlier channels are."""
    weight = gaussian(rows, columns, seed)
    weight[:, columns // 3] *= 1e3
    return weight


def tiny(rows: int, columns: int, seed: int) -> Tensor:
    return power_law(rows, columns, seed) * 1e-30


def huge(rows: int, columns: int, seed: int) -> Tensor:
    return power_law(rows, columns, seed) * 1e30


def constant(rows: int, columns: int, seed: int) -> Tensor:
    return torch.full((rows, columns), 0.37)


def one_entry(rows: int, columns: int, seed: int) -> Tensor:
    weight = torch.zeros(rows, columns)
    weight[rows // 2, columns // 3] = -2.5
    return weight


def diagonal(rows: int, columns: int, seed: int) -> Tensor:
    weight = torch.zeros(rows, columns)
    weight.diagonal().copy_(torch.linspace(-1, 3, min(rows, columns)))
    return weight


FAMILIES: dict[str, Generator] = {
    family.__name__: family
    for family in (
        power_law, steep, geometric, trained, trained_bf16, gaussian, clustered, low_rank, exact_low_rank, zero,
        identity, isometry, multiple, outlier, massive_column, tiny, huge, constant, one_entry, diagonal,
    )
}  # fmt: skip


@cache
def matrix(family: str, rows: int, columns: int, seed: int) -> Tensor:
    """The matrix of a family; shared between tests, so never to be written."""
    return FAMILIES[family](rows, columns, seed)


@cache
def singular_values(family: str, rows: int, columns: int, seed: int) -> Tensor:
    """Its singular values, descending, by a float64 SVD."""
    return torch.linalg.svdvals(matrix(family, rows, columns, seed).double())


def true_loss(weight: Tensor, sigma: Tensor, result: TruncatedSVD) -> float:
    """1 - captured / best possible energy, of the factors as returned, in float64; 0 for a zero matrix."""
    best = float((sigma[: len(result.s)] ** 2).sum())
    if best == 0:
        return 0.0
    weight = weight.double()
    # ||W||^2 - ||W - X||^2 = <2 W - X, X>, without the cancellation.
    product = (result.U.cpu().double() * result.s) @ result.Vt.cpu().double()
    return 1 - float(((2 * weight - product) * product).sum()) / best


def true_sigma_error(sigma: Tensor, result: TruncatedSVD) -> float:
    """Largest |s_i - sigma_i| / s_i over the s_i above 1e-6 s_1."""
    visible = result.s > 1e-6 * result.s[0]
    s, exact = result.s[visible], sigma[: len(result.s)][visible]
    return float(((s - exact).abs() / s).max()) if len(s) else 0.0
