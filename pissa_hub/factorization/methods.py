"""Initial adapter factors and base of the weight-only methods: W -> (A, B, base).

PiSSA (arXiv 2404.02948, section 3): with W = U S V^T, scaling s and the top r triplets, A = sqrt(S_r / s) V_r^T,
B = U_r sqrt(S_r / s) and the base is W - s B A, computed from A and B *as stored*: what their rounding takes from the
product then goes to the base, and only the base's own rounding is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_hub.errors import MatrixError
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.svd import TruncatedSVD
from pissa_hub.factorization.workspace import Workspace

# Elements per step of the residual: small enough to stay in a CPU's cache, large enough to fill a GPU.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 26


@dataclass(frozen=True)
class Factors:
    """Low-rank part of a matrix as it is stored: s left right, in the stored orientation of the weight.

    Attributes:
        left: (rows, r) in the adapter's dtype; lora_B of a Linear, lora_A transposed of a Conv1D.
        right: (r, columns) in the adapter's dtype; lora_A of a Linear, lora_B transposed of a Conv1D.
        scaling: s.
    """

    left: Tensor
    right: Tensor
    scaling: float


@dataclass(frozen=True)
class Deviation:
    """How far base + s left right, as stored and evaluated in fp32, is from W.

    Attributes:
        max_abs: largest absolute deviation of an element.
        relative_frobenius: ||deviation||_F / ||W||_F; 0 for a zero matrix.
    """

    max_abs: float
    relative_frobenius: float


def pissa_factors(svd: TruncatedSVD, scaling: float, dtype: torch.dtype) -> Factors:
    """PiSSA's A and B from the leading triplets, rounded to ``dtype``; B A alone is 1/s of the principal part."""
    root = (svd.s / scaling).sqrt().to(svd.U)
    return Factors((svd.U * root).to(dtype), (svd.Vt * root[:, None]).to(dtype), scaling)


def subtract(weight: Tensor, factors: Factors, out: Tensor, *, name: str, workspace: Workspace) -> Deviation:
    """Store W - s left right in ``out`` and measure what its rounding costs.

    Args:
        weight: W (rows, columns), fp32, on the device that computes.
        factors: as stored.
        out: (rows, columns) in the base's dtype; usually on the CPU.
        name: of the tensor, for errors.
        workspace: buffers to reuse.

    Raises:
        MatrixError: the base or the factors do not fit the range of their dtype.
    """
    meter = _Meter(weight.device)
    with exact_fp32():
        for rows, low_rank in _low_rank_chunks(factors, weight, workspace):
            exact = weight[rows]
            difference = torch.sub(exact, low_rank, out=workspace.take("chunk", tuple(exact.shape), exact))
            stored = difference.to(out.dtype)
            out[rows].copy_(stored)
            meter.add(low_rank.add_(stored).sub_(exact), exact)
    deviation = meter.deviation()
    if not deviation.max_abs < float("inf"):
        if not all(bool(torch.isfinite(factor).all()) for factor in (factors.left, factors.right)):
            raise MatrixError(
                f"the factors of {name} do not fit the range of {factors.left.dtype}",
                "choose a wider --adapter-dtype or another --alpha",
            )
        raise MatrixError(
            f"the residual of {name} does not fit the range of {out.dtype}",
            "choose a wider --residual-dtype",
        )
    return deviation


def deviation_of(weight: Tensor, factors: Factors, base: Tensor, *, workspace: Workspace) -> Deviation:
    """Deviation of base + s left right from W; W and base (rows, columns) fp32."""
    meter = _Meter(weight.device)
    with exact_fp32():
        for rows, low_rank in _low_rank_chunks(factors, weight, workspace):
            meter.add(low_rank.add_(base[rows]).sub_(weight[rows]), weight[rows])
    return meter.deviation()


class _Meter:
    """Largest and root-mean-square deviation over chunks, without a synchronisation per chunk."""

    def __init__(self, device: torch.device) -> None:
        self._largest = torch.zeros((), device=device)
        self._energies = torch.zeros((2,), dtype=torch.float64, device=device)

    def add(self, error: Tensor, exact: Tensor) -> None:
        least, most = torch.aminmax(error)
        self._largest = torch.maximum(self._largest, torch.maximum(-least, most))
        self._energies += torch.stack([energy_of(error), energy_of(exact)])

    def deviation(self) -> Deviation:
        error, energy = self._energies.tolist()
        return Deviation(float(self._largest), (error / energy) ** 0.5 if energy else 0.0)


def energy_of(block: Tensor) -> Tensor:
    """Sum of squares, fp64: in fp32 a sum of millions loses three digits, and squares below 1e-45 vanish."""
    norms: Tensor = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
    return norms.square().sum()


def _low_rank_chunks(factors: Factors, weight: Tensor, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """s left right for a block of rows at a time; each is overwritten by the next."""
    left, right = factors.left.float() * factors.scaling, factors.right.float().contiguous()
    elements = _CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
    height = max(elements // max(weight.shape[1], 1), 1)
    for start in range(0, weight.shape[0], height):
        rows = slice(start, start + height)
        shape = tuple(weight[rows].shape)
        yield rows, torch.mm(left[rows], right, out=workspace.take("product", shape, weight))
