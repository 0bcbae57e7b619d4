"""The rounded difference against Python's exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pissa_hub.factorization.methods import Factors, subtract
from pissa_hub.factorization.rounding import error_factor, exact_differences, round_if_sure
from pissa_hub.factorization.workspace import Workspace

SINGLES = st.builds(math.ldexp, st.integers(-(2**24), 2**24), st.integers(-30, 0))


def nearest_single(value: Fraction) -> float:
    """fp32, ties to even, found by bisecting what a float64 rounds to."""
    guess = torch.tensor(float(value), dtype=torch.float64).float()
    candidates = {
        float(neighbour)
        for direction in (-math.inf, 0.0, math.inf)
        for neighbour in [torch.nextafter(guess, torch.tensor(direction)) if direction else guess]
    }
    return min(candidates, key=lambda one: (abs(Fraction(one) - value), _bits(one) & 1))


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def difference(weight: Tensor, left: Tensor, right: Tensor, scaling: float, row: int, column: int) -> Fraction:
    """w - sum_k (s l)_k a_k, where s l is rounded to float64."""
    scaled = (left[row].double() * scaling).tolist()
    products = (Fraction(a) * Fraction(b) for a, b in zip(scaled, right[:, column].tolist(), strict=True))
    return Fraction(float(weight[row, column])) - sum(products, Fraction(0))


def base_of(
    weight: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    subtract(weight, Factors(left, right, scaling), out, name="w", workspace=Workspace())
    return out


def exactly(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """All elements by the exact sum alone."""
    places = torch.ones_like(weight).nonzero()
    return exact_differences(weight, left.double(), right.double(), places).view(weight.shape)


@given(st.lists(SINGLES, min_size=7, max_size=7), st.floats(min_value=2.0**-20, max_value=2.0**20))
@settings(max_examples=300, deadline=None)
def test_is_the_nearest_to_the_exact_difference(values: list[float], scaling: float) -> None:
    numbers = torch.tensor(values)
    weight, left, right = numbers[:1].view(1, 1), numbers[1:4].view(1, 3), numbers[4:].view(3, 1)
    expected = nearest_single(difference(weight, left, right, scaling, 0, 0))
    scaled = left.double() * scaling
    assert exactly(weight, scaled, right).item() == expected
    assert base_of(weight, left, right, scaling).item() == expected


@pytest.mark.parametrize("scaling", [1.0, 0.3])
@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_cancellation_down_to_the_last_bits(rank: int, scaling: float) -> None:
    """W is the fp32 product of its factors, so that all of the difference lies beyond fp32 and much beyond float64."""
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(9, rank, generator=generator), torch.randn(rank, 11, generator=generator)
    weight = (left.double() * scaling @ right.double()).float()
    base = base_of(weight, left, right, scaling)
    for row in range(9):
        for column in range(11):
            exact = difference(weight, left, right, scaling, row, column)
            assert base[row, column].item() == nearest_single(exact), (row, column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_even_whatever_the_order_of_the_terms(dtype: torch.dtype) -> None:
    """1 + an odd number of half units, as the sum of terms that cancel; float64 orders differ in their last bits."""
    half = torch.finfo(dtype).eps / 2
    odd = torch.arange(1, 33, 2)
    weight = (1 + 0 * odd[None]).float()
    third = torch.tensor(1 / 3)
    left = torch.stack([third * 2.0**20, third, -third * 2.0**20, -third, torch.tensor(-half)])[None]
    right = torch.ones(5, len(odd))
    right[4] = odd
    expected = torch.tensor([1 + ((n + 1) // 4 * 2) * (2 * half) for n in odd.tolist()], dtype=torch.float64)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 4, 0, 3, 2], [3, 0, 4, 1, 2]):
        base = base_of(weight, left[:, order], right[order], dtype=dtype)
        assert torch.equal(base[0].double(), expected)


@pytest.mark.parametrize(("beside", "expected"), [(-1, 1.0), (0, 1.0), (1, 1 + 2.0**-23)])
def test_beside_a_tie(beside: int, expected: float) -> None:
    """2^-100 decides, which no float64 next to 1 sees."""
    weight = torch.ones(1, 1)
    left = torch.tensor([[-(2.0**-24), -beside * 2.0**-50]])
    right = torch.tensor([[1.0], [2.0**-50]])
    assert base_of(weight, left, right).item() == expected
    assert base_of(weight, -left, -right).item() == expected


def test_only_what_the_error_may_change_is_in_doubt() -> None:
    step = 2.0**-23
    values = torch.tensor([[1.0, 1 + step / 2, 1 + step / 2 + 1e-15, 1 + step / 2 + 1e-12]], dtype=torch.float64)
    bound = torch.tensor([[1e-14]], dtype=torch.float64)
    rounded, doubts = round_if_sure(values.clone(), bound, torch.float32, Workspace())
    assert doubts.tolist() == [[0, 1], [0, 2]]
    assert rounded[0, [0, 3]].tolist() == [1.0, 1 + step]
    assert not round_if_sure(values, bound, torch.bfloat16, Workspace())[1].numel()


@given(st.integers(1, 60), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_error_factor_covers_every_order(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rank, generator=generator), torch.randn(rank, generator=generator)
    weight = torch.randn((), generator=generator)
    exact = difference(weight.view(1, 1), left[None], right[:, None], 1.0, 0, 0)
    products = left.double() * right.double()
    magnitude = float(weight.abs()) + float(products.abs().sum())
    found = float(weight)
    for product in products.tolist():
        found -= product
    assert 2 * abs(Fraction(found) - exact) <= error_factor(rank) * magnitude


def test_zeros_are_positive() -> None:
    """Where both parts cancel, and where the difference lies below the smallest fp32 number."""
    weight = torch.tensor([[-0.0, 0.0, 1.0, 1e-40]])
    base = base_of(weight, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -0.0, 1.0, 1e-40], [1.0, 1.0, 1.0, 1.0]]))
    below = base_of(torch.zeros(1, 1), torch.tensor([[2.0**-76]]), torch.tensor([[2.0**-76]]))
    for zeros in (base, below, exactly(torch.zeros(1, 1), torch.tensor([[2.0**-76]]), torch.tensor([[2.0**-76]]))):
        assert not zeros.any()
        assert not zeros.signbit().any()
