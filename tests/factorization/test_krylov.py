"""H V = V T + F C^T + D, whatever is added to the basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_hub.factorization import krylov
from pissa_hub.factorization.krylov import GramOperator, KrylovBasis, gram
from pissa_hub.factorization.workspace import Workspace
from tests.factorization.matrices import gaussian, low_rank, power_law, with_spectrum


def block(size: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(size, columns, generator=torch.Generator().manual_seed(seed))


def start(weight: Tensor, columns: int = 16, capacity: int = 200, deflation: Tensor | None = None) -> KrylovBasis:
    workspace = Workspace()
    operator = GramOperator(weight, workspace)
    return KrylovBasis(operator, block(operator.size, columns), capacity, workspace, deflation=deflation)


def exact(weight: Tensor) -> Tensor:
    """H in float64."""
    wide = weight.double()
    return wide @ wide.t() if weight.shape[0] < weight.shape[1] else wide.t() @ wide


def check_relation(basis: KrylovBasis, H: Tensor, tolerance: float = 3e-6) -> None:
    """Orthonormal, T = V^T H V, F orthogonal to V, R^T R at least that of the true residual."""
    V, F = basis.rows.t().double(), basis.frontier.double()
    scale = float(torch.linalg.eigvalsh(H)[-1])
    both = torch.cat([V, F], dim=1)
    torch.testing.assert_close(both.t() @ both, torch.eye(both.shape[1], dtype=torch.float64), rtol=0, atol=tolerance)
    torch.testing.assert_close(V.t() @ H @ V, basis.projection, rtol=0, atol=tolerance * scale)
    R = H @ V - V @ basis.projection
    excess = torch.linalg.eigvalsh(basis.residual - R.t() @ R)
    assert float(excess[0]) >= -tolerance * scale * max(float(R.norm()), tolerance * scale)


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_relation_holds_as_the_basis_grows(shape: tuple[int, int]) -> None:
    weight = power_law(*shape, seed=0)
    basis, H = start(weight), exact(weight)
    for steps in range(1, 5):
        basis.expand()
        assert basis.dimension == 16 * steps
        check_relation(basis, H)
    R = H @ basis.rows.t().double() - basis.rows.t().double() @ basis.projection
    torch.testing.assert_close(basis.residual, R.t() @ R, rtol=0, atol=1e-6)


def test_relation_survives_injection() -> None:
    weight = power_law(200, 150, seed=1)
    basis, H = start(weight), exact(weight)
    basis.expand()
    basis.inject(block(150, 5, seed=1))
    assert basis.frontier.shape[1] == 21
    check_relation(basis, H)
    for _ in range(2):
        basis.expand()
        check_relation(basis, H)


def test_injection_of_what_is_there_adds_nothing() -> None:
    basis = start(power_law(200, 150, seed=1))
    basis.expand()
    basis.inject(basis.rows[:7].t().clone() @ torch.eye(7) + basis.frontier[:, :7])
    assert basis.frontier.shape[1] == 16


def test_exhausted_low_rank_stops() -> None:
    """Rank 40 from 16 columns: the whole range is in V after a few blocks, and H produces nothing but noise."""
    weight = low_rank(200, 150, seed=1)
    basis, H = start(weight, capacity=150), exact(weight)
    for _ in range(4):
        if basis.can_expand:
            basis.expand()
    theta = torch.linalg.eigvalsh(basis.projection).flip(0)
    torch.testing.assert_close(theta[:40], torch.linalg.eigvalsh(H).flip(0)[:40], rtol=1e-4, atol=0)


def test_zero_operator_has_no_frontier() -> None:
    basis = start(torch.zeros(60, 50))
    basis.expand()
    assert basis.frontier.shape[1] == 0
    assert not basis.can_expand
    assert not basis.projection.any()
    assert not basis.residual.any()


@pytest.mark.parametrize("outlier", [30.0, 100.0, 300.0, 1000.0])
def test_what_is_dropped_as_noise_stays_in_the_residual(outlier: float) -> None:
    """The first block is all outlier; the rest of what H produced is near rounding, but real."""
    weight = with_spectrum(torch.cat([torch.tensor([outlier]), torch.linspace(1, 0.1, 149)]), 200, 150, seed=1)
    basis, H = start(weight), exact(weight)
    for _ in range(3):
        basis.expand()
    V = basis.rows.t().double()
    R = H @ V - V @ basis.projection
    noise = 1e-6 * outlier**2
    # Along every direction in V, up to rounding of H V itself.
    lengths = torch.linalg.eigvalsh(basis.residual - R.t() @ R)
    assert float(lengths[0]) >= -(2 * float(R.norm()) * noise + noise**2)


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.1])
def test_whatever_counts_as_noise_the_residual_covers_it(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = power_law(200, 150, seed=1)
    monkeypatch.setattr(krylov, "NOISE", noise)
    basis, H = start(weight), exact(weight)
    dropped = False
    for _ in range(4):
        if basis.can_expand:
            basis.expand()
            check_relation(basis, H)
            dropped = dropped or basis.frontier.shape[1] < 16
    assert dropped == (noise > 1e-3)


def test_deflated_space_is_never_entered() -> None:
    weight = power_law(200, 150, seed=2)
    leading = torch.linalg.svd(weight.double())[2][:10].float().contiguous()
    basis = start(weight, deflation=leading)
    for _ in range(4):
        basis.expand()
    torch.testing.assert_close(basis.rows @ leading.t(), torch.zeros(64, 10), rtol=0, atol=2e-6)
    largest = float(torch.linalg.eigvalsh(basis.projection)[-1])
    assert largest == pytest.approx(float(torch.linalg.svdvals(weight.double())[10] ** 2), rel=1e-4)


def test_capacity_is_a_limit() -> None:
    basis = start(gaussian(200, 150, seed=0), capacity=40)
    while basis.can_expand:
        basis.expand()
    assert basis.dimension == 32


def test_operator_uses_the_smaller_side() -> None:
    for shape in ((30, 20), (20, 30)):
        weight = gaussian(*shape, seed=0)
        operator = GramOperator(weight, Workspace())
        assert operator.size == 20
        assert operator.is_transposed == (shape[0] < shape[1])
        x = block(20, 3)
        torch.testing.assert_close(operator.apply(x).double(), exact(weight) @ x.double(), rtol=1e-4, atol=1e-3)


def test_gram_is_float64() -> None:
    columns = torch.tensor([[1.0, 1.0], [1e-5, 0.0]])
    assert gram(columns).dtype == torch.float64
    assert float(torch.linalg.det(gram(columns))) == pytest.approx(1e-10, rel=1e-3)
