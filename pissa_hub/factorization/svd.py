"""Certified truncated SVD of one matrix.

The default method grows a block Krylov basis until a *certificate* says that the factors capture all but ``tolerance``
of the energy that the best rank-r factors capture; a float64 eigendecomposition serves where the matrix is small, the
rank large or the spectrum so flat that a basis would not pay. ``full`` and ``randomized`` are what peers offer; they
get the same certificate, so that speed and accuracy can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pissa_hub.errors import MatrixError
from pissa_hub.factorization.adaptive import adaptive_svd
from pissa_hub.factorization.certificate import FAILURE_PROBABILITY, PROBE_COLUMNS, ROUNDING, Probe, certify
from pissa_hub.factorization.krylov import GramOperator, gaussian, gram
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.rayleigh_ritz import Bound, Subspace, TruncatedSVD, assemble, descending_eigh, extract
from pissa_hub.factorization.workspace import Workspace

__all__ = ["Method", "SVDSettings", "TruncatedSVD", "truncated_svd"]

Method = Literal["krylov", "full", "randomized"]

# Up to this size a float64 eigendecomposition takes no longer than a basis with its probe.
DENSE_SIZE = 512
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
    key = (settings.seed, name, tuple(weight.shape))
    with exact_fp32():
        scale, energy = _scale_and_energy(weight, name)
        scaled = weight if scale == 1.0 else weight / scale
        if settings.method == "full":
            result = _full(scaled, rank, energy, key, workspace)
        elif settings.method == "randomized":
            result = _randomized(scaled, rank, energy, settings.niter, key, workspace)
        elif _dense_pays(weight, rank, settings):
            result = _dense(scaled, rank, energy)
        else:
            found = adaptive_svd(scaled, rank, energy, settings.tolerance, key, workspace)
            result = found or _dense(scaled, rank, energy)
    return replace(result, s=result.s * scale)


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


def _dense(weight: Tensor, rank: int, energy: float) -> TruncatedSVD:
    """float64 eigendecomposition of the smaller Gram matrix, then one Rayleigh-Ritz step on W itself."""
    is_transposed = weight.shape[0] < weight.shape[1]
    tall = (weight.t() if is_transposed else weight).double()
    values, vectors = torch.linalg.eigh(tall.t() @ tall)
    right = vectors.flip(1)[:, :rank]
    left = tall @ right
    squares, rotation = descending_eigh(left.t() @ left)
    # Backward error of a symmetric eigensolver (LAPACK Users' Guide, section 4.7): a modest multiple of eps ||H||.
    error = 10 * tall.shape[1] * torch.finfo(torch.float64).eps * float(values[-1].clamp_min(0))
    certificate = certify("dense", squares.cpu(), squares.cpu() + error, slack=0.0)
    return assemble(left @ rotation, right @ rotation, squares, energy, certificate, is_transposed, products=0)


def _full(weight: Tensor, rank: int, energy: float, key: tuple[object, ...], workspace: Workspace) -> TruncatedSVD:
    """torch.linalg.svd in fp32; enough triplets beyond the rank are kept to certify the leading ones."""
    operator = GramOperator(weight, workspace)
    vectors = torch.linalg.svd(operator.tall, full_matrices=False)[2]
    rows = vectors[: min(2 * rank + PROBE_COLUMNS, operator.size)].contiguous()
    return _certified(operator, rows, rank, energy, key, workspace, products=0)


def _randomized(
    weight: Tensor, rank: int, energy: float, niter: int, key: tuple[object, ...], workspace: Workspace
) -> TruncatedSVD:
    """Subspace iteration with oversampling (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    operator = GramOperator(weight, workspace)
    columns = min(rank + OVERSAMPLING, operator.size)
    basis = gaussian(operator.size, columns, weight, *key, "start")
    for _ in range(niter + 1):
        basis = torch.linalg.qr(operator.apply(basis))[0]
    return _certified(
        operator, basis.t().contiguous(), rank, energy, key, workspace, products=2 * columns * (niter + 1)
    )


def _certified(
    operator: GramOperator,
    rows: Tensor,
    rank: int,
    energy: float,
    key: tuple[object, ...],
    workspace: Workspace,
    products: int,
) -> TruncatedSVD:
    """Rayleigh-Ritz and the better of two certificates, whatever it says, on a subspace that is given: rows (d, n)."""
    block = rows.t().contiguous()
    image = operator.apply(block)
    projection = (rows @ image).double()
    projection = (projection + projection.t()) / 2
    remainder = image - block @ projection.float()
    space = Subspace(operator, rows, projection.cpu(), gram(remainder).cpu())
    probe = Probe(operator, rows, gaussian(operator.size, PROBE_COLUMNS, rows, *key, "probe"), workspace)
    mu = float("inf")
    while not probe.exhausted:
        mu = min(mu, probe.step())
    products += 2 * rows.shape[0] + 2 * PROBE_COLUMNS * probe.steps
    candidates = [extract(space, rank, energy, bound, products) for bound in (None, Bound(mu, FAILURE_PROBABILITY))]
    return min(candidates, key=lambda result: result.certificate.energy_loss)
