"""How much better the best rank-r factors could be: bounds on the leading eigenvalues of H from a subspace.

With V orthonormal, Ritz values theta, residuals R = H V - V Theta (orthogonal to V), G = R^T R and any mu at least the
largest eigenvalue of H on the complement of V, the inertia of the Schur complement (Haynsworth 1968) gives

    theta_i <= lambda_i(H) <= beta_i = lambda_i(Theta + G / (theta_r - mu))        i <= r, mu < theta_r

(in the basis V itself: the eigenvalues of T + R^T R / (theta_r - mu), so that no eigenvector is needed).

mu is not known, so a probe bounds it: k steps of block Lanczos on the complement from b Gaussian columns. With N the
dimension of the complement, Lanczos polynomials are at least as good as the Chebyshev polynomial that is best against
the worst spectrum (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. 13 (1992) 1094), and the overlap of b Gaussian
columns with one direction follows a Beta distribution, so that with probability at least 1 - p

    mu <= ritz * cosh^2(z / (2k - 1)),    cosh(z)^b = Gamma((b + N)/2) / (Gamma(b/2 + 1) Gamma(N/2) p)

Where the energy left outside V is itself small, it bounds every lambda_i without any probability:
lambda_i <= theta_i + (||W||_F^2 - sum theta), and as sum_{i>r} lambda_i >= sum_{i>r} theta_i, the sum of the leading r
is no farther above that of their theta_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import acosh, cosh, exp, lgamma, log
from typing import Literal

import torch
from torch import Tensor

from pissa_hub.factorization.krylov import GramOperator, KrylovBasis
from pissa_hub.factorization.workspace import Workspace

FAILURE_PROBABILITY = 1e-9
PROBE_COLUMNS = 16
PROBE_STEPS = 16
_EPS = torch.finfo(torch.float32).eps
# fp32 rounding of the factors, of ||W||_F^2 and of the products that measure the captured energy.
ROUNDING = 8 * _EPS

Kind = Literal["dense", "energy", "probe"]


@dataclass(frozen=True)
class Certificate:
    """What is proven about rank-r factors of a matrix with singular values sigma_1 >= sigma_2 >= ...

    Attributes:
        kind: where the bound comes from: ``dense`` (float64 eigendecomposition, backward error), ``energy`` (the energy
            outside the subspace), ``probe`` (random probe of the complement; holds but for ``failure_probability``).
        energy_loss: at least 1 - captured / (sigma_1^2 + ... + sigma_r^2).
        sigma_error: at least |s_i - sigma_i| / s_i for every returned s_i above 1e-6 s_1; lower ones can be noise.
        failure_probability: probability that the bounds do not hold, over the seed.
    """

    kind: Kind
    energy_loss: float
    sigma_error: float
    failure_probability: float


def certify(
    kind: Kind,
    values: Tensor,
    upper: Tensor,
    failure_probability: float = 0.0,
    slack: float = ROUNDING,
    best: float | None = None,
) -> Certificate:
    """Certificate from the squares of the returned singular values and upper bounds of the true ones, both (r,).

    Args:
        kind: how ``upper`` was found.
        values: s_i^2.
        upper: of sigma_i^2.
        failure_probability: of ``upper``.
        slack: rounding of the factors relative to all of their energy: of sigma_1^2, for every sigma_i^2.
        best: upper bound of the sum of sigma_i^2 where one is known that is lower than the sum of ``upper``.
    """
    upper = torch.maximum(upper, values)
    best = max(float(values.sum()), float(upper.sum()) if best is None else best)
    loss = 1 - float(values.sum()) / best + slack if best > 0 else 0.0
    if not float(upper[0]) > 0:
        return Certificate(kind, loss, 0.0, failure_probability)
    visible = values > 1e-12 * values[0]
    ratios = (upper[visible] + slack * upper[0]) / values[visible]
    sigma_error = float(ratios.max()) ** 0.5 - 1 + slack if ratios.numel() else float("inf")
    return Certificate(kind, min(loss, 1.0), sigma_error, failure_probability)


def energy_outside(energy_inside: float, total_energy: float) -> float:
    """trace(H) less the sum of all Ritz values, plus rounding: what a lambda_i or their sum can exceed theirs by.

    Ritz values above the trace show how far rounding has moved them, so that counts as well: sums of equal terms, as
    of a constant matrix, round all in one direction.
    """
    return abs(total_energy - energy_inside) + ROUNDING * total_energy


def residual_bounds(projection: Tensor, residual: Tensor, theta: Tensor, rank: int, mu: float) -> Tensor:
    """Upper bounds (rank,) of lambda_i(H) from T and R^T R (both (d, d)), T's eigenvalues (d,) and mu.

    For mu >= theta_r the weaker lambda_i <= max(theta_i, mu) + ||R||_2 (Weyl) holds and is returned.
    """
    floor = float(theta[rank - 1])
    if mu >= floor:
        weaker: Tensor = theta[:rank].clamp_min(mu) + largest_eigenvalue(residual) ** 0.5
        return weaker
    upper: Tensor = torch.linalg.eigvalsh(projection + residual / (floor - mu)).flip(0)[:rank]
    return upper


def largest_eigenvalue(matrix: Tensor) -> float:
    """Of a positive semidefinite matrix; never below zero."""
    return max(float(torch.linalg.eigvalsh(matrix)[-1]), 0.0)


def relative_loss(values: Tensor, upper: Tensor) -> float:
    """1 - sum(values) / sum(upper); 0 for a zero matrix."""
    best = float(upper.sum())
    return 1 - float(values.sum()) / best if best > 0 else 0.0


def inflation(columns: int, steps: int, size: int, failure_probability: float) -> float:
    """cosh^2(z / (2k - 1)) of the module's third equation for a complement of dimension ``size``."""
    log_cosh = (
        lgamma((columns + size) / 2) - lgamma(columns / 2 + 1) - lgamma(size / 2) - log(failure_probability)
    ) / columns
    return cosh(acosh(exp(log_cosh)) / (2 * steps - 1)) ** 2


class Probe:
    """Upper bounds, sharper with each step, of the largest eigenvalue of H on the complement of V.

    Args:
        operator: H.
        rows: V^T (d, n), orthonormal.
        noise: Gaussian block (n, PROBE_COLUMNS) independent of V; overwritten.
        workspace: owner of the probe's basis.
    """

    def __init__(self, operator: GramOperator, rows: Tensor, noise: Tensor, workspace: Workspace) -> None:
        self._columns = noise.shape[1]
        self._complement = operator.size - rows.shape[0]
        self._basis = KrylovBasis(operator, noise, PROBE_STEPS * self._columns, workspace, name="probe", deflation=rows)
        self.steps = 0

    @property
    def exhausted(self) -> bool:
        """Whether another step could add nothing."""
        return self.steps >= PROBE_STEPS or not self._basis.can_expand

    def step(self) -> float:
        """One more product; returns mu, valid with probability 1 - FAILURE_PROBABILITY over all the steps."""
        if self._basis.can_expand:
            self._basis.expand()
        self.steps += 1
        if self._basis.dimension == 0:
            return 0.0
        largest = largest_eigenvalue(self._basis.projection) * (1 + ROUNDING)
        # An invariant subspace is the Krylov space of every number of steps.
        steps = self.steps if self._basis.frontier.shape[1] else 10 * PROBE_STEPS
        return largest * inflation(self._columns, steps, self._complement, FAILURE_PROBABILITY / PROBE_STEPS)

    def directions(self) -> Tensor:
        """The probe's leading Ritz vectors (n, k): what V lacks most."""
        vectors: Tensor = torch.linalg.eigh(self._basis.projection)[1].flip(1)[:, : self._columns]
        return self._basis.rows.t() @ vectors.to(self._basis.rows)
