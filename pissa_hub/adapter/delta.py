"""What training changed: Delta W = s' B' A' - s B A of one weight, as exact low-rank factors.

Both products are of the size of the weight's principal part, and training moves them little: of the naive factors
[B', -B] and [A'; A], as PEFT writes them, a cast to bf16 leaves nothing of a small change. So the difference is taken
where nothing cancels,

    Delta W = (s' B' - s B) A' + s B (A' - A) = L R,

and L R, of rank at most 2r, is brought to its singular value decomposition by a QR of L and of R^T and the SVD of the
small core, all in float64. Equal shares of each singular value make the factors that a cast harms least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pissa_hub.errors import AdapterError


@dataclass(frozen=True)
class Factors:
    """s B A: A (r, in) and B (out, r), fp64."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class Delta:
    """A change as a product: L (out, k) and R (k, in), fp64."""

    left: Tensor
    right: Tensor

    def singular_values(self) -> Tensor:
        """Those of L R, descending (min(k, in, out)), fp64; what is rounding noise of L and R is zero."""
        core = _triangle(self.left) @ _triangle(self.right.t()).t()
        return _without_noise(torch.linalg.svdvals(core), self)

    def truncated(self, rank: int) -> Balanced:
        """The best factors of this rank (Eckart and Young 1936); zeros where L R has fewer directions."""
        Q_left, T_left = torch.linalg.qr(self.left)
        Q_right, T_right = torch.linalg.qr(self.right.t())
        U, s, Vt = torch.linalg.svd(T_left @ T_right.t(), full_matrices=False)
        s = _without_noise(s, self)
        count = min(rank, len(s))
        root = s[:count].sqrt()
        B = self.left.new_zeros(self.left.shape[0], rank)
        A = self.right.new_zeros(rank, self.right.shape[1])
        torch.mm(Q_left, U[:, :count] * root, out=B[:, :count])
        torch.mm(root[:, None] * Vt[:count], Q_right.t(), out=A[:count])
        return Balanced(B, A, float(torch.linalg.vector_norm(s[count:])))


@dataclass(frozen=True)
class Balanced:
    """B (out, r) and A (r, in), fp64: columns and rows orthogonal, the i-th of both of norm sqrt(sigma_i).

    ``tail`` is the Frobenius norm of what the rank leaves out.
    """

    B: Tensor
    A: Tensor
    tail: float

    def stored(self, dtype: torch.dtype, *, name: str) -> tuple[Tensor, Tensor, float]:
        """B and A rounded to ``dtype``, and the Frobenius norm of what they miss of the change, tail and rounding.

        Raises:
            AdapterError: they do not fit the range of the dtype.
        """
        B, A = self.B.to(dtype), self.A.to(dtype)
        if not bool(torch.isfinite(B).all() & torch.isfinite(A).all()):
            raise AdapterError(f"the change of {name} does not fit the range of {dtype}", "choose a wider --dtype")
        return B, A, (self.tail**2 + self._rounding_energy(B, A)) ** 0.5

    def _rounding_energy(self, B: Tensor, A: Tensor) -> float:
        """||B A - (B + E)(A + F)||_F^2 for rounding errors E and F, but for ||E F||^2.

        As B^T B = A A^T = diag(sigma), ||B F||^2 and ||E A||^2 are weighted sums of squares; what is left is their
        inner product, the sum of (B^T E) * (F A^T) elementwise. The tail is orthogonal to both but for second order.
        """
        E, F = B.to(self.B) - self.B, A.to(self.A) - self.A
        energies = self.B.square().sum(0) @ F.square().sum(1) + self.A.square().sum(1) @ E.square().sum(0)
        # Small beside the energies: fp32 will do, with the errors' scale taken out of its range.
        scale_E, scale_F = (float(error.abs().amax().clamp(min=1e-300)) for error in (E, F))
        inner = (self.B.float().t() @ (E / scale_E).float()) * ((F / scale_F).float() @ self.A.float().t())
        return max(float(energies + 2 * scale_E * scale_F * inner.sum(dtype=torch.float64)), 0.0)


def change(trained: Factors, initial: Factors | None) -> Delta:
    """Delta W of a weight; without an initial state, s' B' A' itself."""
    if initial is None:
        return Delta(trained.B * trained.scaling, trained.A)
    before = initial.B * initial.scaling
    return Delta(
        torch.cat([trained.B * trained.scaling - before, before], dim=1),
        torch.cat([trained.A, trained.A - initial.A]),
    )


def product_norm(left: Tensor, right: Tensor) -> float:
    """||L R||_F without L R: the square is the sum of (L^T L) * (R R^T)."""
    square = ((left.t() @ left) * (right @ right.t())).sum()
    return float(square.clamp(min=0).sqrt())


def _triangle(matrix: Tensor) -> Tensor:
    """R of a QR, without the Q."""
    reduced, _ = torch.geqrf(matrix)
    return reduced[: matrix.shape[1]].triu()


def _without_noise(values: Tensor, delta: Delta) -> Tensor:
    """Singular values with those below what float64 resolves of the product set to zero."""
    norms = torch.linalg.vector_norm(delta.left) * torch.linalg.vector_norm(delta.right)
    noise = norms * max(delta.left.shape[0], delta.right.shape[1]) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0)
