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
from pissa_hub.factorization.rounding import error_factor, exact_differences, round_if_sure
from pissa_hub.factorization.svd import TruncatedSVD
from pissa_hub.factorization.workspace import Workspace

# Elements per step of the residual: small enough to stay in a CPU's cache, large enough to fill a GPU.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24


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

    def to(self, device: torch.device) -> Factors:
        """The same on a device."""
        return Factors(self.left.to(device), self.right.to(device), self.scaling)


@dataclass(frozen=True)
class Deviation:
    """How far base + s left right is from W, all as stored and evaluated in float64.

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
    """Store W - s left right in ``out``, rounded correctly, and measure what the rounding costs.

    The bytes follow from W, the factors as stored, s and the dtype of ``out`` alone: every machine computes the same
    (see ``factorization.rounding``). The product is that of right with s left as rounded to float64.

    Args:
        weight: W (rows, columns), fp32, on the device that computes.
        factors: as stored, on the same device.
        out: (rows, columns) in the base's dtype; usually on the CPU, may be W itself.
        name: of the tensor, for errors.
        workspace: buffers to reuse.

    Raises:
        MatrixError: the base or the factors do not fit the range of their dtype.
    """
    product = _Product.of(factors)
    if not torch.isfinite(product.bound).all():
        raise MatrixError(
            f"the factors of {name} do not fit the range of {factors.left.dtype}",
            "choose a wider --adapter-dtype or another --alpha",
        )
    meter = _Meter(weight.device)
    for rows, difference in product.differences_from(weight, workspace):
        exact = weight[rows]
        magnitude = torch.maximum(exact.amax(dim=1), -exact.amin(dim=1)) + product.bound[rows]
        error = error_factor(product.rank) * magnitude[:, None]
        stored, doubts = round_if_sure(difference, error, out.dtype, workspace)
        if len(doubts):
            settled = exact_differences(exact, product.left[rows], product.right, doubts)
            stored[doubts[:, 0], doubts[:, 1]] = settled.to(stored.dtype)
        meter.add(difference, stored, exact, workspace)
        out[rows].copy_(stored)
    deviation = meter.deviation()
    if not deviation.max_abs < float("inf"):
        raise MatrixError(
            f"the residual of {name} does not fit the range of {out.dtype}",
            "choose a wider --residual-dtype",
        )
    return deviation


def deviation_of(weight: Tensor, factors: Factors, base: Tensor, *, workspace: Workspace) -> Deviation:
    """Deviation of base + s left right from W; W (rows, columns) fp32 and base of any dtype that it is stored in."""
    meter = _Meter(weight.device)
    for rows, difference in _Product.of(factors).differences_from(weight, workspace):
        meter.add(difference, base[rows], weight[rows], workspace)
    return meter.deviation()


@dataclass(frozen=True)
class _Product:
    """s left right in float64: (rows, r) with s in it, (r, columns), and what bounds each row's elements, (rows,)."""

    left: Tensor
    right: Tensor
    bound: Tensor

    @classmethod
    def of(cls, factors: Factors) -> _Product:
        left, right = factors.left.double() * factors.scaling, factors.right.double().contiguous()
        # By Cauchy and Schwarz; it holds for the sums of the terms' magnitudes, too.
        bound = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=0).max()
        return cls(left, right, bound)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def differences_from(self, weight: Tensor, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
        """W - s left right, float64, for a block of rows at a time; each is overwritten by the next."""
        elements = _CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK
        height = max(elements // max(weight.shape[1], 1), 1)
        for start in range(0, weight.shape[0], height):
            rows = slice(start, start + height)
            exact = weight[rows]
            difference = workspace.take("difference", tuple(exact.shape), exact, torch.float64).copy_(exact)
            yield rows, difference.addmm_(self.left[rows], self.right, alpha=-1)


class _Meter:
    """Largest and root-mean-square deviation over blocks of rows, without a synchronisation per block."""

    def __init__(self, device: torch.device) -> None:
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._energies = torch.zeros((2,), dtype=torch.float64, device=device)

    def add(self, difference: Tensor, stored: Tensor, exact: Tensor, workspace: Workspace) -> None:
        """A block's float64 difference, which is overwritten, what is stored for it, and its part of W."""
        error = difference.sub_(workspace.take("stored", tuple(stored.shape), difference).copy_(stored))
        # Row by row these are several times as fast as aminmax over all.
        largest = torch.maximum(error.amax(dim=1), -error.amin(dim=1)).max()
        self._largest = torch.maximum(self._largest, largest)
        self._energies += torch.stack([energy_of(error), energy_of(exact)])

    def deviation(self) -> Deviation:
        error, energy = self._energies.tolist()
        return Deviation(float(self._largest), (error / energy) ** 0.5 if energy else 0.0)


def energy_of(block: Tensor) -> Tensor:
    """Sum of squares, fp64: in fp32 a sum of millions loses three digits, and squares below 1e-45 vanish."""
    norms: Tensor = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
    return norms.square().sum()
