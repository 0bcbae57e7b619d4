"""Bounds against exact eigenvalues, and the probe against its promised failure frequency."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pissa_hub.factorization.certificate import (
    FAILURE_PROBABILITY,
    PROBE_COLUMNS,
    ROUNDING,
    Probe,
    certify,
    energy_outside,
    inflation,
    relative_loss,
    residual_bounds,
)
from pissa_hub.factorization.krylov import GramOperator, KrylovBasis
from pissa_hub.factorization.workspace import Workspace
from tests.factorization.matrices import gaussian, orthogonal, with_spectrum


class Split:
    """A random H, and V at an angle to its leading eigenvectors, in float64."""

    def __init__(self, size: int, dimension: int, decay: float, angle: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = orthogonal(size, size, seed)
        self.exact = (torch.arange(size, dtype=torch.float64) + 1) ** -decay
        H = (basis * self.exact) @ basis.t()
        tilt = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
        full = torch.linalg.qr(torch.cat([basis[:, :dimension] + angle * tilt, basis], dim=1))[0]
        V, rest = full[:, :dimension], full[:, dimension:size]
        self.projection = V.t() @ H @ V
        residual = H @ V - V @ self.projection
        self.gram = residual.t() @ residual
        self.theta = torch.linalg.eigvalsh(self.projection).flip(0)
        self.mu = float(torch.linalg.eigvalsh(rest.t() @ H @ rest)[-1]) if dimension < size else 0.0
        self.energy = float(self.exact.sum())


splits = st.builds(
    Split,
    size=st.integers(6, 24),
    dimension=st.integers(1, 6),
    decay=st.floats(0, 4),
    angle=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 0.3, 3.0]),
    seed=st.integers(0, 10**6),
)


@given(splits, st.data())
@settings(max_examples=120, deadline=None)
def test_residual_bounds_hold(split: Split, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(split.theta)))
    above = data.draw(st.floats(1, 3))
    bounds = residual_bounds(split.projection, split.gram, split.theta, rank, split.mu * above)
    assert (bounds >= split.exact[:rank] - 1e-12).all()
    assert (split.theta[:rank] <= split.exact[:rank] + 1e-12).all()


def test_residual_bounds_are_tight_near_convergence() -> None:
    split = Split(size=40, dimension=6, decay=2, angle=1e-3, seed=1)
    bounds = residual_bounds(split.projection, split.gram, split.theta, 3, split.mu)
    lost = float((split.exact[:3] - split.theta[:3]).sum())
    assert 0 < lost < float((bounds - split.theta[:3]).sum()) < 10 * lost


def test_residual_bounds_need_all_of_residual_and_gap() -> None:
    """H = [[2, 0.1], [0.1, 1]] and V = e_1, where the bound misses the eigenvalue by its second order only."""
    H = torch.tensor([[2.0, 0.1], [0.1, 1.0]], dtype=torch.float64)
    exact = float(torch.linalg.eigvalsh(H)[-1])
    theta, residual = H[:1, 0], H[1:, :1] ** 2
    assert exact <= float(residual_bounds(H[:1, :1], residual, theta, 1, 1.0)) <= exact + 2e-4
    assert float(residual_bounds(H[:1, :1], 0.9 * residual, theta, 1, 1.0)) < exact
    assert float(residual_bounds(H[:1, :1], residual, theta, 1, 0.9)) < exact


@given(splits, st.data())
@settings(max_examples=80, deadline=None)
def test_energy_outside_bounds_each_and_all(split: Split, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(split.theta)))
    outside = energy_outside(float(split.theta.sum()), split.energy)
    assert (split.theta[:rank] + outside >= split.exact[:rank] - 1e-12).all()
    assert float(split.theta[:rank].sum()) + outside >= float(split.exact[:rank].sum()) - 1e-12


def test_energy_outside_allows_for_rounding_of_the_total() -> None:
    theta = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert energy_outside(float(theta.sum()), 3.0) == pytest.approx(3 * ROUNDING)
    # Ritz values cannot add up to more than the trace, so these are off.
    assert energy_outside(float(theta.sum()), 2.9) == pytest.approx(0.1, rel=1e-3)


# --- the certificate ---


def test_certify_says_what_was_lost() -> None:
    values, upper = torch.tensor([4.0, 1.0]).double(), torch.tensor([4.0, 1.21]).double()
    exact = certify("dense", values, upper, slack=0.0)
    assert exact.energy_loss == pytest.approx(1 - 5 / 5.21)
    assert exact.sigma_error == pytest.approx(0.1)
    assert exact.failure_probability == 0
    rounded = certify("probe", values, upper, 1e-9)
    assert rounded.energy_loss == pytest.approx(1 - 5 / 5.21 + ROUNDING)
    assert rounded.failure_probability == 1e-9
    assert certify("energy", values, upper, best=5.1).energy_loss == pytest.approx(1 - 5 / 5.1 + ROUNDING)


def test_certify_does_not_trust_bounds_below_the_values() -> None:
    values = torch.tensor([4.0, 1.0]).double()
    for certificate in (certify("probe", values, values / 2), certify("energy", values, values, best=1.0)):
        assert certificate.energy_loss >= ROUNDING
        assert certificate.sigma_error >= ROUNDING


def test_small_singular_values_carry_the_rounding_of_the_largest() -> None:
    """fp32 resolves sigma_i^2 to a few eps of sigma_1^2, so a bound that claims more is not believed."""
    values = torch.tensor([1.0, 1e-5]).double()
    assert certify("probe", values, values).sigma_error >= (1 + ROUNDING / 1e-5) ** 0.5 - 1
    assert certify("dense", values, values, slack=0.0).sigma_error == 0


def test_certify_ignores_what_fp32_cannot_resolve() -> None:
    values = torch.tensor([1.0, 1e-14]).double()
    assert certify("dense", values, values + 1e-12, slack=0.0).sigma_error < 1e-11


def test_certify_zero() -> None:
    zero = torch.zeros(3).double()
    assert certify("dense", zero, zero, slack=0.0).energy_loss == 0
    assert certify("energy", zero, zero).sigma_error == 0
    assert relative_loss(zero, zero) == 0


def test_loss_is_capped_at_all() -> None:
    values = torch.tensor([1e-9]).double()
    assert certify("probe", values, torch.tensor([1.0]).double()).energy_loss == 1


# --- the probe ---


def failures(spectrum: Tensor, columns: int, steps: int, probability: float, trials: int) -> float:
    """How often inflated Ritz values of Krylov spaces from Gaussian columns miss the largest eigenvalue, 1.

    H = diag(spectrum), without loss of generality for Gaussian columns.
    """
    size = len(spectrum)
    factor = inflation(columns, steps, size, probability)
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(trials, size, columns, generator=generator, dtype=torch.float64)
    blocks = [space]
    for _ in range(steps - 1):
        blocks.append(torch.linalg.qr(spectrum[:, None] * blocks[-1])[0])
    basis = torch.linalg.qr(torch.cat(blocks, dim=2))[0]
    ritz = torch.linalg.eigvalsh(basis.mT @ (spectrum[:, None] * basis))[:, -1]
    return float((ritz * factor < 1).double().mean())


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(("columns", "steps"), [(1, 1), (1, 3), (2, 2), (4, 1), (8, 2)])
def test_inflation_fails_no_more_often_than_promised(columns: int, steps: int, probability: float) -> None:
    size, trials = 60, 600
    deviation = 4 * math.sqrt(probability * (1 - probability) / trials)
    factor = inflation(columns, steps, size, probability)
    spectra = {
        "one": torch.zeros(size),
        "just missed": torch.full((size,), 0.999 / factor),
        "even": torch.linspace(0, 1 / factor, size),
        "chebyshev": (1 - torch.cos(torch.arange(size) * math.pi / size)) / 2 / factor,
    }
    for name, spectrum in spectra.items():
        spectrum = spectrum.double()
        spectrum[0] = 1
        assert failures(spectrum, columns, steps, probability, trials) <= probability + deviation, name


def test_inflation_is_not_idle() -> None:
    """One eigenvalue against nothing is the worst case for one step: there the promise is used up, nearly."""
    spectrum = torch.zeros(120, dtype=torch.float64)
    spectrum[0] = 1
    assert 0.1 < failures(spectrum, columns=4, steps=1, probability=0.3, trials=2000) <= 0.34


def test_inflation_falls_with_steps_and_columns_and_rises_with_certainty() -> None:
    by_steps = [inflation(16, steps, 4000, 1e-10) for steps in range(1, 11)]
    assert by_steps == sorted(by_steps, reverse=True)
    assert 1 < by_steps[-1] < 1.2
    assert inflation(32, 5, 4000, 1e-10) < inflation(16, 5, 4000, 1e-10) < inflation(16, 5, 4000, 1e-12)
    assert inflation(16, 5, 4000, 1e-10) < inflation(16, 5, 16000, 1e-10)


def start_probe(weight: Tensor, rows: Tensor, seed: int = 0) -> Probe:
    workspace = Workspace()
    noise = torch.randn(weight.shape[1], PROBE_COLUMNS, generator=torch.Generator().manual_seed(seed))
    return Probe(GramOperator(weight, workspace), rows, noise, workspace)


@pytest.mark.parametrize("spectrum", ["flat", "power", "one above"])
def test_probe_bounds_the_complement_at_every_step(spectrum: str) -> None:
    size, dimension = 300, 40
    sigma = {
        "flat": torch.linspace(1, 0.5, size),
        "power": (torch.arange(size) + 1.0) ** -0.5,
        "one above": torch.cat([torch.full((dimension,), 2.0), torch.ones(1), torch.full((259,), 0.1)]),
    }[spectrum]
    weight = with_spectrum(sigma, 320, size, seed=3)
    rows = torch.linalg.svd(weight.double())[2][:dimension].float().contiguous()
    exact = float(torch.linalg.svdvals(weight.double())[dimension] ** 2)
    for seed in range(5):
        probe = start_probe(weight, rows, seed)
        bounds = []
        while not probe.exhausted:
            bounds.append(probe.step())
        assert min(bounds) >= exact
        assert bounds[-1] < 1.2 * exact
        assert bounds[0] > bounds[-1]


def test_probe_finds_what_the_basis_lacks() -> None:
    weight = with_spectrum(torch.cat([torch.tensor([5.0]), torch.full((199,), 0.5)]), 200, 200, seed=1)
    vectors = torch.linalg.svd(weight.double())[2].float()
    probe = start_probe(weight, vectors[1:31].contiguous())
    assert max(probe.step() for _ in range(2)) > 25
    directions = probe.directions()
    assert float((directions.t() @ vectors[0]).norm()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(vectors[1:31] @ directions, torch.zeros(30, PROBE_COLUMNS), rtol=0, atol=1e-5)


def test_probe_of_nothing_and_of_no_complement() -> None:
    zero = start_probe(torch.zeros(60, 50), torch.eye(50)[:10])
    assert zero.step() == 0
    assert zero.exhausted
    assert start_probe(gaussian(60, 50, seed=0), torch.eye(50)).exhausted


def test_probe_spends_its_failure_probability_over_the_steps() -> None:
    """step() may be called until it is good enough, so each step has a share only."""
    weight = gaussian(300, 200, seed=0)
    probe = start_probe(weight, torch.eye(200)[:20])
    first = probe.step()
    workspace = Workspace()
    noise = torch.randn(200, PROBE_COLUMNS, generator=torch.Generator().manual_seed(0))
    basis = KrylovBasis(GramOperator(weight, workspace), noise, 200, workspace, deflation=torch.eye(200)[:20])
    basis.expand()
    ritz = float(torch.linalg.eigvalsh(basis.projection)[-1])
    assert first >= ritz * inflation(PROBE_COLUMNS, 1, 180, FAILURE_PROBABILITY / 10)
