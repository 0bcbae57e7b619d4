"""Block Krylov basis of H = M^T M with full reorthogonalisation.

The basis keeps one relation, up to rounding, whatever is added to it::

    H V = V T + F C^T + D    V (n, d) orthonormal, T = V^T H V (d, d), F (n, f) orthonormal and orthogonal to V

V is what has been multiplied by H, F (the frontier) is what comes next, C (d, f) couples the two and D is what was
dropped as noise, of which D^T D is kept block by block. Everything a certificate needs (Ritz values, residuals of Ritz
vectors) follows from T, C and D^T D alone, without another product.

Sources: Golub and Underwood, "The block Lanczos method" (1977); Musco and Musco, arXiv 1504.05477 (block Krylov
against subspace iteration); Stathopoulos and Wu, SIAM J. Sci. Comput. 23 (2002) 2165 (SVQB orthonormalisation).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pissa_hub.factorization.workspace import Workspace

# Directions of a block shorter than this multiple of the block H produced are rounding noise. They are dropped, but
# what is dropped stays in the residual: beside a far larger singular value, noise can be all there is of the next ones.
NOISE = torch.finfo(torch.float32).eps


class GramOperator:
    """H = M^T M as two products, where M is W or W^T, whichever has fewer columns.

    Args:
        weight: W (rows, columns), fp32, contiguous; read, never written.
        workspace: owner of the transposed copy: both narrow products run at full speed only on contiguous rows.
    """

    def __init__(self, weight: Tensor, workspace: Workspace) -> None:
        transposed = workspace.take("transposed", (weight.shape[1], weight.shape[0]), weight)
        transposed.copy_(weight.t())
        self.is_transposed = weight.shape[0] < weight.shape[1]
        self.tall, self.flat = (transposed, weight) if self.is_transposed else (weight, transposed)
        self.size = self.flat.shape[0]
        self._workspace = workspace

    def image(self, block: Tensor) -> Tensor:
        """M X for X (n, b); valid until the next product."""
        out = self._workspace.take("image", (self.tall.shape[0], block.shape[1]), block)
        return torch.mm(self.tall, block, out=out)

    def apply(self, block: Tensor) -> Tensor:
        """H X for X (n, b)."""
        return torch.mm(self.flat, self.image(block))


class KrylovBasis:
    """V, T, F and C of the relation above; V is stored by rows so that it grows in place.

    Args:
        operator: H.
        start: start block (n, b), any scaling; overwritten.
        capacity: most columns that V can get.
        workspace: owner of V's memory, under ``name``.
        deflation: rows (k, n), orthonormal, of a space projected out of H on both sides.
    """

    def __init__(
        self,
        operator: GramOperator,
        start: Tensor,
        capacity: int,
        workspace: Workspace,
        name: str = "basis",
        deflation: Tensor | None = None,
    ) -> None:
        self.operator = operator
        self.capacity = min(capacity, operator.size)
        self.dimension = 0
        self.frontier = start[:, :0]
        self._deflation = deflation
        self._rows = workspace.take(name, (self.capacity, operator.size), start)
        self._projection = torch.zeros((self.capacity, self.capacity), dtype=torch.float64)
        self._coupling = torch.zeros((0, 0), dtype=torch.float64)
        self._dropped: list[tuple[int, Tensor]] = []
        self.inject(start)

    @property
    def can_expand(self) -> bool:
        """Whether there is a frontier and V has room for it."""
        return 0 < self.frontier.shape[1] <= self.capacity - self.dimension

    @property
    def rows(self) -> Tensor:
        """V^T (d, n)."""
        return self._rows[: self.dimension]

    @property
    def projection(self) -> Tensor:
        """T (d, d), fp64, on the CPU."""
        return self._projection[: self.dimension, : self.dimension]

    def inject(self, block: Tensor) -> None:
        """Add directions that H did not produce (n, b) to the frontier, as far as they are new."""
        present = [rows for rows in (self._deflation, self.rows, self.frontier.t()) if rows is not None]
        fresh, _, _, _ = _orthonormalise(present, block, noise=NOISE * float(block.norm()))
        self.frontier = torch.cat([self.frontier, fresh], dim=1)
        coupling = torch.zeros((self.dimension, self.frontier.shape[1]), dtype=torch.float64)
        coupling[:, : self._coupling.shape[1]] = self._coupling
        self._coupling = coupling

    def expand(self) -> None:
        """Move the frontier into V: one product with H and two Gram-Schmidt passes against all of V."""
        old, new = self.dimension, self.dimension + self.frontier.shape[1]
        self._rows[old:new].copy_(self.frontier.t())
        self.dimension = new
        image = self.operator.apply(self.frontier)
        noise = NOISE * float(image.norm())
        present = [self.rows] if self._deflation is None else [self.rows, self._deflation]
        self.frontier, factor, coefficients, dropped = _orthonormalise(present, image, noise)
        if bool(dropped.any()):
            self._dropped.append((old, dropped))
        self._projection[:new, old:new] = coefficients
        self._projection[old:new, :new] = coefficients.t()
        self._coupling = torch.zeros((new, factor.shape[0]), dtype=torch.float64)
        self._coupling[old:new] = factor.t()

    @property
    def residual(self) -> Tensor:
        """R^T R (d, d) of R = H V - V T = F C^T + D, or more than that, fp64, on the CPU.

        The overlaps of what k blocks dropped are not known, so (x_0 + ... + x_k)^2 <= (k + 1) (x_0^2 + ... + x_k^2).
        """
        total = self._coupling @ self._coupling.t()
        for at, dropped in self._dropped:
            total[at : at + len(dropped), at : at + len(dropped)] += dropped
        return total * (1 + len(self._dropped))


def _orthonormalise(present: list[Tensor], block: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """block (n, b) = P^T K + Q B + D with P the rows present, Q (n, k) orthonormal and orthogonal to P.

    Each of two passes projects P out and orthonormalises by the eigenvectors of the Gram matrix (SVQB), which drops
    directions shorter than ``noise`` without a pivoting order. Returns Q, B (k, b), K of the first member of P and
    D^T D (b, b) of what was dropped.
    """
    factor = torch.eye(block.shape[1], dtype=torch.float64)
    coefficients = torch.zeros((present[0].shape[0], block.shape[1]), dtype=torch.float64)
    dropped = torch.zeros_like(factor)
    for _ in range(2):
        for position, rows in enumerate(present):
            along = rows @ block
            block = block.addmm_(rows.t(), along, alpha=-1)
            if position == 0:
                coefficients += along.to("cpu", torch.float64) @ factor
        values, vectors = torch.linalg.eigh(gram(block).cpu())
        keep = values > noise**2
        short = values[~keep].clamp_min(0).sqrt()[:, None] * (vectors[:, ~keep].t() @ factor)
        dropped += short.t() @ short
        lengths, vectors = values[keep].sqrt(), vectors[:, keep]
        block = block @ (vectors / lengths).to(block)
        factor = (vectors * lengths).t() @ factor
        noise = 0.5  # a unit direction that shrank to less than half in the second pass lay within P
    return block, factor, coefficients, dropped


def gaussian(rows: int, columns: int, like: Tensor, *key: object) -> Tensor:
    """Gaussian block (rows, columns) drawn on the CPU from a key and moved to the device of ``like``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(rows, columns, generator=generator).to(like.device)


def gram(block: Tensor) -> Tensor:
    """X^T X in fp64 for X (n, b) fp32: a fp32 Gram matrix loses directions shorter than 3e-4 of the longest."""
    wide = block.double()
    return wide.t() @ wide
