"""What training changed, as factors: exact, optimal at every rank, honest about rounding, and free of cancellation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_hub.adapter.delta import Delta, Factors, change, product_norm
from pissa_hub.errors import AdapterError

SHAPES = [(48, 32), (32, 48), (40, 40), (9, 40), (40, 9), (9, 9), (1, 30), (30, 1)]
RANK = 6


def pair(rows: int, columns: int, update: float = 0.01, *, seed: int = 0) -> tuple[Factors, Factors]:
    """Trained and initial factors; training moved them by ``update`` of their size. Another scaling each."""
    generator = torch.Generator().manual_seed(seed)
    A, dA = torch.randn(2, RANK, columns, generator=generator, dtype=torch.float64)
    B, dB = torch.randn(2, rows, RANK, generator=generator, dtype=torch.float64)
    # As stored: fp32 numbers.
    A, B = A.float().double(), B.float().double()
    after = Factors((A + update * dA).float().double(), (B + update * dB).float().double(), 1.0)
    return after, Factors(A, B, 1.0)


def dense(after: Factors, before: Factors) -> Tensor:
    return after.scaling * after.B @ after.A - before.scaling * before.B @ before.A


def error_of(B: Tensor, A: Tensor, exact: Tensor) -> float:
    return float((B.double() @ A.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scalings", [(1.0, 1.0), (0.5, 2.0), (2**0.5, 2**0.5)])
def test_change_is_the_difference_of_both_products(shape: tuple[int, int], scalings: tuple[float, float]) -> None:
    after, before = (
        Factors(factors.A, factors.B, scaling) for factors, scaling in zip(pair(*shape), scalings, strict=True)
    )
    delta, exact = change(after, before), dense(after, before)
    assert torch.allclose(delta.left @ delta.right, exact, rtol=0, atol=1e-13 * float(exact.abs().max()))
    found, expected = delta.singular_values(), torch.linalg.svdvals(exact)
    assert len(found) == min(2 * RANK, *shape)
    assert torch.allclose(found, expected[: len(found)], rtol=1e-10, atol=1e-12 * float(expected[0]))


def test_without_an_initial_state_the_change_is_all_of_it() -> None:
    after, _ = pair(20, 30)
    delta = change(Factors(after.A, after.B, 3.0), None)
    assert torch.allclose(delta.left @ delta.right, 3.0 * after.B @ after.A)
    assert int((delta.singular_values() > 0).sum()) == RANK


@pytest.mark.parametrize("update", [1.0, 1e-2, 1e-4, 1e-6])
def test_small_changes_do_not_cancel(update: float) -> None:
    """fp32 cannot subtract the products; float64 could to 1e-16 / update, and nothing has to."""
    after, before = pair(200, 150, update)
    exact = dense(after, before)
    B, A, error = change(after, before).truncated(2 * RANK).stored(torch.float32, name="w")
    assert error_of(B, A, exact) < 1e-7 + 1e-15 / update
    assert error / float(exact.norm()) == pytest.approx(error_of(B, A, exact), rel=0.05, abs=1e-15 / update)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("update", [0.1, 1e-3])
def test_a_cast_costs_its_rounding_whatever_the_size_of_the_change(
    dtype: torch.dtype, allowed: float, update: float
) -> None:
    after, before = pair(300, 200, update)
    exact = dense(after, before)
    B, A, error = change(after, before).truncated(2 * RANK).stored(dtype, name="w")
    assert B.dtype == A.dtype == dtype
    assert error_of(B, A, exact) < allowed
    assert error / float(exact.norm()) == pytest.approx(error_of(B, A, exact), rel=0.02)
    naive_B, naive_A = torch.cat([after.B, -before.B], dim=1).to(dtype), torch.cat([after.A, before.A]).to(dtype)
    assert error_of(naive_B, naive_A, exact) > 5 * error_of(B, A, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 12, 40])
def test_every_rank_is_the_best_and_knows_what_it_leaves_out(shape: tuple[int, int], rank: int) -> None:
    after, before = pair(*shape)
    exact = dense(after, before)
    sigma = torch.linalg.svdvals(exact)
    balanced = change(after, before).truncated(rank)
    assert balanced.B.shape == (shape[0], rank)
    assert balanced.A.shape == (rank, shape[1])
    best = float(sigma[rank:].norm())
    assert float((balanced.B @ balanced.A - exact).norm()) == pytest.approx(best, rel=1e-6, abs=1e-12 * float(sigma[0]))
    assert balanced.tail == pytest.approx(best, rel=1e-6, abs=1e-12 * float(sigma[0]))


def test_both_factors_share_the_singular_values() -> None:
    after, before = pair(60, 50)
    balanced = change(after, before).truncated(2 * RANK)
    sigma = change(after, before).singular_values()
    for gram in (balanced.B.t() @ balanced.B, balanced.A @ balanced.A.t()):
        assert torch.allclose(gram, torch.diag(sigma), atol=1e-12 * float(sigma[0]))


@pytest.mark.parametrize("moved", ["A", "B"])
def test_directions_that_did_not_change_are_not_counted(moved: str) -> None:
    after, before = pair(60, 50)
    after = Factors(after.A if moved == "A" else before.A, after.B if moved == "B" else before.B, 1.0)
    assert int((change(after, before).singular_values() > 0).sum()) == RANK


def test_nothing_trained_is_exactly_zero() -> None:
    _, before = pair(60, 50)
    delta = change(before, before)
    assert not delta.singular_values().any()
    B, A, error = delta.truncated(2).stored(torch.float16, name="w")
    assert not B.any()
    assert not A.any()
    assert error == 0


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
def test_figures_hold_at_any_scale(scale: float) -> None:
    after, before = pair(50, 40)
    after, before = (Factors(factors.A * scale, factors.B * scale, 1.0) for factors in (after, before))
    exact = dense(after, before)
    B, A, error = change(after, before).truncated(2 * RANK).stored(torch.float32, name="w")
    assert error_of(B, A, exact) < 1e-7
    assert error / float(exact.norm()) == pytest.approx(error_of(B, A, exact), rel=0.05)


def test_factors_beyond_a_dtype_are_refused() -> None:
    delta = Delta(torch.full((4, 1), 1e6, dtype=torch.float64), torch.full((1, 4), 1e6, dtype=torch.float64))
    with pytest.raises(AdapterError, match=r"the change of q_proj does not fit the range of torch\.float16"):
        delta.truncated(1).stored(torch.float16, name="q_proj")
    delta.truncated(1).stored(torch.bfloat16, name="q_proj")


def test_norm_of_a_product() -> None:
    left, right = torch.randn(30, 4, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    assert product_norm(left, right) == pytest.approx(float((left @ right).norm()))
