"""Certified truncated SVD of one matrix.

The default method grows a block Krylov basis until a *certificate* says that the factors capture all but ``tolerance``
of the energy that the best rank-r factors capture; a float64 eigendecomposition serves where the matrix is small, the
rank large or the spectrum so flat that a basis would not pay. ``full`` and ``randomized`` are what peers offer; they
get the same certificate, so that speed and accuracy can be compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import ceil, log
from typing import Literal

import torch
from torch import Tensor

from pissa_hub.errors import MatrixError
from pissa_hub.factorization.certificate import (
    FAILURE_PROBABILITY,
    PROBE_COLUMNS,
    ROUNDING,
    Certificate,
    Probe,
    certify,
    energy_outside,
    relative_loss,
    residual_bounds,
)
from pissa_hub.factorization.krylov import GramOperator, KrylovBasis, gram
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.workspace import Workspace

Method = Literal["krylov", "full", "randomized"]

# Up to this size a float64 eigendecomposition takes no longer than a basis with its probe.
DENSE_SIZE = 512
# No certificate is tight while mu is above this share of theta_r.
USEFUL_MU = 0.86
# What a probe's bound is above the estimate of mu; corrected when a probe tells.
EXPECTED_EXCESS = 1.04
# Halko et al. (2011), section 4: ten extra columns.
OVERSAMPLING = 10


@dataclass(frozen=True)
class SVDSettings:
    """How singular triplets are computed.

    Attributes:
        method: ``krylov`` (until certified), ``full`` (LAPACK or cuSOLVER, fp32) or ``randomized`` (Halko et al.).
        tolerance: for ``krylov``, the largest certified loss of energy that is accepted.
        niter: for ``randomized``, the number of power iterations.
        seed: of the random start blocks.
    """

    method: Method = "krylov"
    tolerance: float = 1e-5
    niter: int = 4
    seed: int = 0


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


def truncated_svd(
    weight: Tensor,
    rank: int,
    settings: SVDSettings | None = None,
    *,
    name: str = "matrix",
    workspace: Workspace | None = None,
) -> TruncatedSVD:
    """The ``rank`` leading singular triplets of a matrix, with a certificate.

    Deterministic: random blocks are drawn on the CPU from (seed, name, shape), whatever the device; the same bytes
    follow on the same kind of device with the same number of threads.

    Args:
        weight: W (rows, columns), fp32, contiguous, on any device; not changed.
        rank: 1 <= rank <= min(rows, columns).
        settings: method, tolerance, seed.
        name: of the tensor, for errors and for the seed.
        workspace: buffers to reuse between calls.

    Raises:
        MatrixError: the matrix has NaN or Inf, or the rank does not fit.
    """
    settings = settings or SVDSettings()
    workspace = workspace or Workspace()
    if not 1 <= rank <= min(weight.shape):
        raise MatrixError(
            f"rank {rank} does not fit {name} of shape {tuple(weight.shape)}",
            f"choose a rank from 1 to {min(weight.shape)}",
        )
    with exact_fp32():
        scale, energy = _scale_and_energy(weight, name)
        if scale != 1.0:
            weight = weight / scale
        if settings.method == "full":
            result = _full(weight, rank, energy, settings, name, workspace)
        elif settings.method == "randomized":
            result = _randomized(weight, rank, energy, settings, name, workspace)
        elif _dense_pays(weight, rank, settings):
            result = _dense(weight, rank, energy)
        else:
            result = _krylov(weight, rank, energy, settings, name, workspace)
    if scale == 1.0:
        return result
    return TruncatedSVD(result.U, result.s * scale, result.Vt, result.energy, result.certificate, result.products)


def _scale_and_energy(weight: Tensor, name: str) -> tuple[float, float]:
    """A power of two that W is divided by so that no square over- or underflows, and ||W / scale||_F^2."""
    least, most = torch.aminmax(weight)
    largest = max(-float(least), float(most))
    if not largest < float("inf"):
        bad = (~torch.isfinite(weight)).nonzero()
        row, column = bad[0].tolist()
        raise MatrixError(
            f"{name} has {bad.shape[0]} NaN or Inf, the first at [{row}, {column}]",
            "repair the checkpoint or leave the module out with --exclude",
        )
    scale = 1.0
    # H is squared once more in the residual, and summed; the scale and its reciprocal must be normal fp32 numbers.
    if largest and not 1e-4 < largest < 1e4:
        exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent)
        scale = 2.0 ** min(max(exponent, -126), 126)
    # Row by row: a single fp32 sum of millions of squares is off by 1e-3.
    norms = torch.linalg.vector_norm(weight / scale if scale != 1.0 else weight, dim=1)
    return scale, float((norms.double() ** 2).sum())


def _dense_pays(weight: Tensor, rank: int, settings: SVDSettings) -> bool:
    size = min(weight.shape)
    return size <= DENSE_SIZE or 4 * rank >= size or settings.tolerance < 2 * ROUNDING


def _gaussian(rows: int, columns: int, like: Tensor, *key: object) -> Tensor:
    """Gaussian block (rows, columns) drawn on the CPU from a key and moved to the device of ``like``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(rows, columns, generator=generator).to(like.device)


def _dense(weight: Tensor, rank: int, energy: float) -> TruncatedSVD:
    """float64 eigendecomposition of the smaller Gram matrix, then one Rayleigh-Ritz step on W itself."""
    is_transposed = weight.shape[0] < weight.shape[1]
    tall = (weight.t() if is_transposed else weight).double()
    values, vectors = torch.linalg.eigh(tall.t() @ tall)
    right = vectors.flip(1)[:, :rank]
    left = tall @ right
    squares, rotation = _descending_eigh(left.t() @ left)
    # Backward error of a symmetric eigensolver (LAPACK Users' Guide, section 4.7): a modest multiple of eps ||H||.
    error = 10 * tall.shape[1] * torch.finfo(torch.float64).eps * float(values[-1].clamp_min(0))
    certificate = certify("dense", squares.cpu(), squares.cpu() + error, slack=0.0)
    return _assemble(left @ rotation, right @ rotation, squares, energy, certificate, is_transposed, products=0)


@dataclass(frozen=True)
class _Subspace:
    """V^T (d, n), T = V^T H V (d, d) and R^T R (d, d) of R = H V - V T; the small ones fp64 on the CPU."""

    operator: GramOperator
    rows: Tensor
    projection: Tensor
    residual: Tensor

    def bounds(self, theta: Tensor, rank: int, mu: float) -> Tensor:
        return residual_bounds(self.projection, self.residual, theta, rank, mu)

    def loss(self, rank: int, mu: float) -> float:
        """Certified loss at this mu, in fp32: enough to steer by, in half the time."""
        projection, residual = self.projection.float(), self.residual.float()
        theta = torch.linalg.eigvalsh(projection).flip(0)
        if mu >= float(theta[rank - 1]):
            return 1.0
        return relative_loss(theta[:rank], residual_bounds(projection, residual, theta, rank, mu))


def _krylov(
    weight: Tensor, rank: int, energy: float, settings: SVDSettings, name: str, workspace: Workspace
) -> TruncatedSVD:
    """Grow a block Krylov basis until the certificate meets the tolerance; dense where half of the space is not enough.

    Small eigenproblems cost as much as the products, so the loop looks seldom: first when ``mu``, estimated from what
    the last blocks found, is far enough below theta_r for any certificate, then where the loss, which falls by a
    constant factor per block, should meet the tolerance. Only then is a probe worth its products.
    """
    operator = GramOperator(weight, workspace)
    size, target = operator.size, settings.tolerance - 2 * ROUNDING
    key = (settings.seed, name, tuple(weight.shape))
    block = _block_size(rank, weight.device)
    basis = KrylovBasis(operator, _gaussian(size, block, weight, *key, "start"), size // 2, workspace)
    check, mu, excess = 2 * rank + 2 * block, float("inf"), EXPECTED_EXCESS
    floor = _Floor(rank)
    before: tuple[int, float] | None = None
    products = 0
    while basis.can_expand:
        products += 2 * basis.frontier.shape[1]
        basis.expand()
        stalled = basis.frontier.shape[1] == 0
        if stalled and basis.dimension < rank:
            basis.inject(_gaussian(size, block, weight, *key, "refill", basis.dimension))
            continue
        if basis.dimension < check and not stalled:
            continue
        check = basis.dimension + block
        space = _Subspace(operator, basis.rows, basis.projection, basis.residual)
        estimate = excess * _recent(basis, block)
        if floor.is_stale(basis.dimension, estimate) or stalled:
            theta = floor.refresh(basis.projection)
            if energy_outside(theta, energy) <= target * float(theta[:rank].sum()):
                result = _extract(space, rank, energy, None, products)
                if result.certificate.energy_loss <= settings.tolerance:
                    return result
        if estimate > USEFUL_MU * floor.value and not stalled:
            continue
        loss = space.loss(rank, min(mu, estimate))
        if stalled or (loss <= target and estimate < mu):
            noise = _gaussian(size, PROBE_COLUMNS, weight, *key, "probe", basis.dimension)
            probe = Probe(operator, basis.rows, noise, workspace)
            while not probe.exhausted and mu > estimate:
                products += 2 * PROBE_COLUMNS
                mu = min(mu, probe.step())
            if mu > estimate:
                loss = space.loss(rank, mu)
                excess *= mu / estimate if 0 < mu / max(estimate, 1e-300) < 2 else 1.0
            if loss > target and (stalled or mu > 0.98 * floor.value):
                basis.inject(probe.directions())
        if loss <= target:
            result = _extract(space, rank, energy, mu, products)
            if result.certificate.energy_loss <= settings.tolerance:
                return result
        check = basis.dimension + block * _blocks_to_go(before, (basis.dimension, loss), target, block)
        before = (basis.dimension, loss)
    return _dense(weight, rank, energy)


class _Floor:
    """theta_r, which grows towards lambda_r; looked up only when the answer could have changed."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._dimension = 0
        self.value = 0.0

    def is_stale(self, dimension: int, estimate: float) -> bool:
        return self._dimension == 0 or (dimension >= 1.2 * self._dimension and estimate <= 1.1 * self.value)

    def refresh(self, projection: Tensor) -> Tensor:
        """The Ritz values (d,), descending."""
        theta: Tensor = torch.linalg.eigvalsh(projection.float()).flip(0).double().clamp_min(0)
        self._dimension, self.value = projection.shape[0], float(theta[self._rank - 1])
        return theta


def _block_size(rank: int, device: torch.device) -> int:
    """Narrow blocks need fewer products, wide ones run nearer to the peak of the device."""
    if device.type != "cpu":
        return 64 if rank >= 64 else 32
    return 32 if rank >= 32 else 16


def _recent(basis: KrylovBasis, block: int) -> float:
    """What a probe will nearly bound mu by: the last three blocks saw what those before them lacked."""
    return float(torch.linalg.eigvalsh(basis.projection[-3 * block :, -3 * block :])[-1])


def _blocks_to_go(before: tuple[int, float] | None, now: tuple[int, float], target: float, block: int) -> int:
    """Blocks until the loss meets the target, extrapolated from two (dimension, loss)."""
    if before is None or not target < now[1] < before[1] < 1:
        return 1
    rate = log(before[1] / now[1]) / (now[0] - before[0])
    return min(max(ceil(log(now[1] / target) / rate / block), 1), 2)


def _full(
    weight: Tensor, rank: int, energy: float, settings: SVDSettings, name: str, workspace: Workspace
) -> TruncatedSVD:
    """torch.linalg.svd in fp32; enough triplets beyond the rank are kept to certify the leading ones."""
    operator = GramOperator(weight, workspace)
    vectors = torch.linalg.svd(operator.tall, full_matrices=False)[2]
    rows = vectors[: min(2 * rank + PROBE_COLUMNS, operator.size)].contiguous()
    key = (settings.seed, name, tuple(weight.shape))
    return _certified(operator, rows, rank, energy, key, workspace, products=0)


def _randomized(
    weight: Tensor, rank: int, energy: float, settings: SVDSettings, name: str, workspace: Workspace
) -> TruncatedSVD:
    """Subspace iteration with oversampling (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    operator = GramOperator(weight, workspace)
    columns = min(rank + OVERSAMPLING, operator.size)
    key = (settings.seed, name, tuple(weight.shape))
    basis = _gaussian(operator.size, columns, weight, *key, "start")
    for _ in range(settings.niter + 1):
        basis = torch.linalg.qr(operator.apply(basis))[0]
    products = 2 * columns * (settings.niter + 1)
    return _certified(operator, basis.t().contiguous(), rank, energy, key, workspace, products)


def _certified(
    operator: GramOperator,
    rows: Tensor,
    rank: int,
    energy: float,
    key: tuple[object, ...],
    workspace: Workspace,
    products: int,
) -> TruncatedSVD:
    """Rayleigh-Ritz and a certificate, whatever it says, on a subspace that was not chosen by one: rows (d, n)."""
    block = rows.t().contiguous()
    image = operator.apply(block)
    projection = (rows @ image).double()
    projection = (projection + projection.t()) / 2
    remainder = image - block @ projection.float()
    space = _Subspace(operator, rows, projection.cpu(), gram(remainder).cpu())
    probe = Probe(operator, rows, _gaussian(operator.size, PROBE_COLUMNS, rows, *key, "probe"), workspace)
    mu = float("inf")
    while not probe.exhausted:
        mu = min(mu, probe.step())
    products += 2 * rows.shape[0] + 2 * PROBE_COLUMNS * probe.steps
    by_energy = _extract(space, rank, energy, None, products)
    by_probe = _extract(space, rank, energy, mu, products)
    return min(by_energy, by_probe, key=lambda result: result.certificate.energy_loss)


def _extract(space: _Subspace, rank: int, energy: float, mu: float | None, products: int) -> TruncatedSVD:
    """The leading Ritz vectors, re-orthonormalised, and a last Rayleigh-Ritz step with M itself.

    T comes from H, so a small Ritz value carries the rounding of the largest one; M X does not square the condition.
    The difference between the two is what rounding did, and is added to the bounds.

    Args:
        mu: bound of H on the complement of V; None bounds by the energy outside V instead.
    """
    theta, coefficients = _descending_eigh(space.projection)
    outside = energy_outside(theta, energy)
    upper = theta[:rank] + outside if mu is None else space.bounds(theta, rank, mu)
    right = space.rows.t() @ coefficients[:, :rank].to(space.rows)
    values, vectors = torch.linalg.eigh(gram(right))
    right = right @ ((vectors / values.sqrt()) @ vectors.t()).float()
    left = space.operator.image(right)
    squares, rotation = _descending_eigh(gram(left))
    # Twice: the bounds may be too low by it, and the squares too high.
    drift = 2 * (squares.cpu() - theta[:rank]).abs()
    if mu is None:
        best = float((theta[:rank] + drift).sum()) + outside
        certificate = certify("energy", squares.cpu(), upper + drift, best=best)
    else:
        certificate = certify("probe", squares.cpu(), upper + drift, FAILURE_PROBABILITY)
    left, right = left @ rotation.float(), right @ rotation.float()
    return _assemble(left, right, squares, energy, certificate, space.operator.is_transposed, products + rank)


def _assemble(
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


def _descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)
