"""W -> (A, B, base): the base is the exact difference, rounded, on every machine; what is measured is what is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pissa_hub.errors import MatrixError
from pissa_hub.factorization import methods
from pissa_hub.factorization.methods import Deviation, Factors, deviation_of, energy_of, pissa_factors, subtract
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.svd import truncated_svd
from pissa_hub.factorization.workspace import Workspace

from .matrices import power_law

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def split(
    weight: Tensor, dtype: torch.dtype = torch.float32, base_dtype: torch.dtype = torch.float32, scaling: float = 1.0
) -> tuple[Factors, Tensor, Deviation]:
    factors = pissa_factors(truncated_svd(weight, 8), scaling, dtype)
    base = torch.empty(weight.shape, dtype=base_dtype)
    return factors, base, subtract(weight, factors, base, name="w", workspace=Workspace())


@pytest.mark.parametrize("scaling", [1.0, 0.25, 2.0**0.5])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)])
def test_factors_are_the_roots_of_the_principal_part(shape: tuple[int, int], scaling: float) -> None:
    weight = power_law(*shape, seed=0)
    factors, _, _ = split(weight, scaling=scaling)
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    principal = (U[:, :8] * S[:8]) @ Vt[:8]
    assert factors.left.shape == (shape[0], 8)
    assert factors.right.shape == (8, shape[1])
    assert torch.allclose(scaling * factors.left.double() @ factors.right.double(), principal, atol=1e-6)
    for energies in (factors.left.double().square().sum(0), factors.right.double().square().sum(1)):
        assert torch.allclose(energies * scaling, S[:8], rtol=1e-6)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_base_takes_what_rounding_the_factors_leaves(dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    weight = power_law(60, 90, seed=1)
    factors, base, deviation = split(weight, dtype, base_dtype, 0.5)
    assert factors.left.dtype == factors.right.dtype == dtype
    exact = weight.double() - 0.5 * factors.left.double() @ factors.right.double()
    assert torch.equal(base, exact.float().to(base_dtype))
    found = base.double() - exact
    assert deviation.relative_frobenius == pytest.approx(float(found.norm() / weight.double().norm()), rel=1e-6)
    assert deviation.max_abs == pytest.approx(float(found.abs().max()), rel=1e-6)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_blocks_of_rows_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, rows: int, base_dtype: torch.dtype
) -> None:
    weight = power_law(100, 40, seed=2)
    _, whole, expected = split(weight, base_dtype=base_dtype)
    monkeypatch.setattr(methods, "_CPU_CHUNK", rows * 40)
    _, base, deviation = split(weight, base_dtype=base_dtype)
    assert torch.equal(base, whole)
    assert deviation.max_abs == pytest.approx(expected.max_abs, rel=1e-6)
    assert deviation.relative_frobenius == pytest.approx(expected.relative_frobenius, rel=1e-6)


@pytest.mark.parametrize("base_dtype", DTYPES)
def test_base_does_not_depend_on_how_the_product_is_computed(base_dtype: torch.dtype) -> None:
    """Threads, kernels and the order of the r terms, which leaves the exact sum as it is."""
    weight = power_law(512, 640, seed=6)
    factors, base, _ = split(weight, base_dtype=base_dtype, scaling=0.3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = Factors(factors.left[:, order], factors.right[order], 0.3)

    def again(factors: Factors) -> Tensor:
        out = torch.empty_like(base)
        subtract(weight, factors, out, name="w", workspace=Workspace())
        return out

    products = [given.left.double() * 0.3 @ given.right.double() for given in (factors, shuffled)]
    assert not torch.equal(*products)
    assert torch.equal(again(shuffled), base)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(again(factors), base)
    finally:
        torch.set_num_threads(threads)
    with exact_fp32():
        assert torch.equal(again(factors), base)


def test_base_in_place_of_the_weight() -> None:
    weight = power_law(60, 90, seed=7)
    factors, base, expected = split(weight)
    assert subtract(weight, factors, weight, name="w", workspace=Workspace()) == expected
    assert torch.equal(weight, base)


def test_deviation_of_finds_what_subtract_measured_and_more() -> None:
    weight = power_law(60, 90, seed=3)
    factors, base, measured = split(weight, base_dtype=torch.bfloat16)
    again = deviation_of(weight, factors, base, workspace=Workspace())
    assert again.max_abs == pytest.approx(measured.max_abs, rel=1e-9)
    assert again.relative_frobenius == pytest.approx(measured.relative_frobenius, rel=1e-9)
    spoiled = base.float()
    spoiled[59, 89] += 1.0
    assert deviation_of(weight, factors, spoiled, workspace=Workspace()).max_abs == pytest.approx(1.0, rel=1e-2)


def test_zero_matrix() -> None:
    _, base, deviation = split(torch.zeros(20, 30))
    assert deviation == Deviation(0.0, 0.0)
    assert not base.any()
    assert not base.signbit().any()


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-12, 1.0, 1e12, 1e25, 1e35])
def test_deviation_is_relative_at_every_scale(scale: float) -> None:
    """Squares of fp32 values end at 1e-45 and 3e38."""
    deviation = split(power_law(60, 90, seed=4) * scale)[2]
    assert 1e-9 < deviation.relative_frobenius < 2.0**-25
    assert 1e-9 * scale < deviation.max_abs < 1e-6 * scale


def test_energy_of_many_small_entries() -> None:
    block = torch.full((2000, 3000), 1e-3)
    assert float(energy_of(block)) == pytest.approx(6.0, rel=1e-6)


def test_base_out_of_range_is_refused() -> None:
    with pytest.raises(MatrixError, match=r"residual of w does not fit .*float16; choose a wider --residual-dtype"):
        split(power_law(60, 90, seed=5) * 1e7, base_dtype=torch.float16)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16])
def test_factors_out_of_range_are_refused(base_dtype: torch.dtype) -> None:
    with pytest.raises(MatrixError, match=r"factors of w do not fit .*float16; choose a wider --adapter-dtype"):
        split(power_law(60, 90, seed=5), torch.float16, base_dtype, scaling=1e-12)
