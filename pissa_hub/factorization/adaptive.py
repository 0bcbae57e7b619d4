"""A Krylov basis that grows until its certificate meets a tolerance."""

from __future__ import annotations

from math import ceil, log

import torch
from torch import Tensor

from pissa_hub.factorization.certificate import (
    FAILURE_PROBABILITY,
    PROBE_COLUMNS,
    ROUNDING,
    Probe,
    energy_outside,
)
from pissa_hub.factorization.krylov import GramOperator, KrylovBasis, gaussian
from pissa_hub.factorization.rayleigh_ritz import Bound, Subspace, TruncatedSVD, extract
from pissa_hub.factorization.workspace import Workspace

# No certificate is tight while mu is above this share of theta_r.
USEFUL_MU = 0.86
# What a probe's bound is above the estimate of mu; corrected when a probe tells.
EXPECTED_EXCESS = 1.04


def adaptive_svd(
    weight: Tensor, rank: int, energy: float, tolerance: float, key: tuple[object, ...], workspace: Workspace
) -> TruncatedSVD | None:
    """Triplets certified to lose no more than ``tolerance``; None where half of the space is not enough for that.

    Small eigenproblems cost as much as the products, so the loop looks seldom: first when mu, estimated from what the
    last blocks found, is far enough below theta_r for any certificate, then where the loss, which falls by a constant
    factor per block, should meet the tolerance. Only then is a probe worth its products.

    Args:
        weight: W (rows, columns), fp32, its entries far from the limits of fp32.
        rank: r.
        energy: ||W||_F^2.
        tolerance: of the certificate.
        key: of the random blocks.
        workspace: buffers to reuse.
    """
    operator = GramOperator(weight, workspace)
    size, target = operator.size, tolerance - 2 * ROUNDING
    block = _block_size(rank, weight.device)
    basis = KrylovBasis(operator, gaussian(size, block, weight, *key, "start"), size // 2, workspace)
    check = 2 * rank + 2 * block
    bound, excess = Bound(float("inf"), 0.0), EXPECTED_EXCESS
    theta: Tensor | None = None
    before: tuple[int, float] | None = None
    products = 0
    while basis.can_expand:
        products += 2 * basis.frontier.shape[1]
        basis.expand()
        stalled = basis.frontier.shape[1] == 0
        if stalled and basis.dimension < rank:
            basis.inject(gaussian(size, block, weight, *key, "refill", basis.dimension))
            continue
        if basis.dimension < check and not stalled:
            continue
        check = basis.dimension + block
        space = Subspace(operator, basis.rows, basis.projection, basis.residual)
        estimate = excess * _recent(basis, block)
        if theta is None or stalled or _could_suffice(estimate, theta, rank, basis.dimension):
            theta = space.ritz_values()
            outside = energy_outside(float(theta.sum()), energy)
            if outside <= target * float(theta[:rank].sum()):
                result = extract(space, rank, energy, None, products)
                if result.certificate.energy_loss <= tolerance:
                    return result
        floor = float(theta[rank - 1])
        if len(theta) < basis.dimension or (estimate > USEFUL_MU * floor and not stalled):
            continue
        loss = space.loss(theta, rank, min(bound.mu, estimate))
        if stalled or (loss <= target and estimate < bound.mu):
            noise = gaussian(size, PROBE_COLUMNS, weight, *key, "probe", basis.dimension)
            probe = Probe(operator, basis.rows, noise, workspace)
            mu = bound.mu
            while not probe.exhausted and mu > estimate:
                mu = min(mu, probe.step())
            products += 2 * PROBE_COLUMNS * probe.steps
            bound = Bound(mu, bound.failure_probability + FAILURE_PROBABILITY)
            if mu > estimate:
                loss = space.loss(theta, rank, mu)
                excess *= mu / estimate if estimate < mu < 2 * estimate else 1.0
            if loss > target and (stalled or mu > 0.98 * floor):
                basis.inject(probe.directions())
        if loss <= target:
            result = extract(space, rank, energy, bound, products)
            if result.certificate.energy_loss <= tolerance:
                return result
        check = basis.dimension + block * _blocks_to_go(before, (basis.dimension, loss), target, block)
        before = (basis.dimension, loss)
    return None


def _could_suffice(estimate: float, theta: Tensor, rank: int, dimension: int) -> bool:
    """Whether newer Ritz values than theta (d,) could show mu to be low enough: theta_r grows with the dimension."""
    floor = float(theta[rank - 1])
    return estimate <= USEFUL_MU * floor or (dimension >= 1.2 * len(theta) and estimate <= 1.1 * floor)


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
