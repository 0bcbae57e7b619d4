"""From a subspace to certified singular triplets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_hub.factorization.certificate import (
    Certificate,
    certify,
    energy_outside,
    relative_loss,
    residual_bounds,
)
from pissa_hub.factorization.krylov import GramOperator, gram


@dataclass(frozen=True)
class TruncatedSVD:
    """W ~ U diag(s) Vt, descending, with the largest entry of each row of Vt positive.

    Attributes:
        U: (rows, r) fp32.
        s: (r,) float64, on the CPU.
        Vt: (r, columns) fp32.
        energy: captured share of ||W||_F^2, in 0..1; 1 for a zero matrix.
        certificate: what is proven about the triplets.
        products: number of columns that were multiplied by W or W^T, as a measure of work; 0 for dense methods.
    """

    U: Tensor
    s: Tensor
    Vt: Tensor
    energy: float
    certificate: Certificate
    products: int


@dataclass(frozen=True)
class Subspace:
    """A subspace V of the columns of M, with what a certificate needs to know of H = M^T M on it.

    Attributes:
        operator: H.
        rows: V^T (d, n), orthonormal.
        projection: T = V^T H V (d, d), fp64, on the CPU.
        residual: R^T R (d, d) of R = H V - V T, fp64, on the CPU.
    """

    operator: GramOperator
    rows: Tensor
    projection: Tensor
    residual: Tensor

    def ritz_values(self) -> Tensor:
        """Eigenvalues of T (d,), descending, in fp32: enough to steer by, in half the time."""
        values: Tensor = torch.linalg.eigvalsh(self.projection.float()).flip(0).double().clamp_min(0)
        return values

    def loss(self, theta: Tensor, rank: int, mu: float) -> float:
        """Certified loss, for Ritz values (d,) and a bound mu of H on the complement of V; to steer by."""
        if mu >= float(theta[rank - 1]):
            return 1.0
        upper = residual_bounds(self.projection.float(), self.residual.float(), theta, rank, mu)
        return relative_loss(theta[:rank], upper)


@dataclass(frozen=True)
class Bound:
    """What is known of H on the complement of V: at most ``mu``, but for a probability of failure."""

    mu: float
    failure_probability: float


def extract(space: Subspace, rank: int, energy: float, bound: Bound | None, products: int) -> TruncatedSVD:
    """The leading Ritz vectors, re-orthonormalised, and a last Rayleigh-Ritz step with M itself.

    T comes from H, so a small Ritz value carries the rounding of the largest one; M X does not square the condition.
    The difference between the two is what rounding did, and is added to the bounds. fp32 is enough for the
    coefficients of Ritz vectors: an error of theirs costs its square in energy.

    Args:
        space: d >= rank.
        rank: r.
        energy: ||W||_F^2.
        bound: on the complement of V; None bounds by the energy outside V instead.
        products: columns multiplied so far.
    """
    coefficients = torch.linalg.eigh(space.projection.float())[1].flip(1)[:, :rank]
    wide = coefficients.double()
    theta = ((space.projection @ wide) * wide).sum(0) / wide.square().sum(0)
    right = space.rows.t() @ coefficients.to(space.rows)
    values, vectors = torch.linalg.eigh(gram(right))
    right = right @ ((vectors / values.sqrt()) @ vectors.t()).float()
    left = space.operator.image(right)
    squares, rotation = descending_eigh(gram(left))
    # Twice: the bounds may be too low by it, and the squares too high.
    drift = 2 * (squares.cpu() - theta).abs()
    if bound is None:
        outside = energy_outside(space.projection.trace().item(), energy)
        best = float((theta + drift).sum()) + outside
        certificate = certify("energy", squares.cpu(), theta + outside + drift, best=best)
    else:
        upper = residual_bounds(space.projection, space.residual, theta, rank, bound.mu)
        certificate = certify("probe", squares.cpu(), upper + drift, bound.failure_probability)
    left, right = left @ rotation.float(), right @ rotation.float()
    return assemble(left, right, squares, energy, certificate, space.operator.is_transposed, products + rank)


def assemble(
    left: Tensor,
    right: Tensor,
    squares: Tensor,
    energy: float,
    certificate: Certificate,
    is_transposed: bool,
    products: int,
) -> TruncatedSVD:
    """Triplets of W from M X = left (rows, r), with orthogonal columns, and X = right (n, r)."""
    s = squares.clamp_min(0).sqrt()
    # By its own length, not by s: where s is lost in rounding, the two differ by any factor.
    lengths = torch.linalg.vector_norm(left, dim=0, dtype=torch.float64)
    left = torch.where(lengths > 0, left / lengths, 0.0)
    U, V = (right, left) if is_transposed else (left, right)
    signs = torch.gather(V, 0, V.abs().argmax(dim=0, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    captured = min(float(squares.sum()) / energy, 1.0) if energy > 0 else 1.0
    return TruncatedSVD(
        (U * signs).float().contiguous(),
        s.cpu(),
        (V * signs).float().t().contiguous(),
        captured,
        certificate,
        products,
    )


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)
