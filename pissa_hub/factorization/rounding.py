"""Differences W - left right, rounded correctly: the same bits on every machine.

A float64 product leaves its last bits to the order of summation, hence to the BLAS, the threads and the device. Its
error has a bound, though, and where both ends of that interval round to the same number, this is the right one whatever
the order was (Ziv, "Fast evaluation of elementary mathematical functions with correctly rounded last bit", 1991). The
few elements that remain are summed in twice the precision, elementwise and in a fixed order.

To fp32 the exact difference is rounded once, to nearest even; to fp16 and bf16 by way of fp32. Zeros are positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa_hub.factorization.workspace import Workspace

# Numbers per step of the exact sums.
_TERMS = 1 << 20


def error_factor(rank: int) -> float:
    """Twice the error of a float64 w - sum_k l_k a_k over |w| + sum_k |l_k a_k|, whatever the order of summation.

    See Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1. Twice, so that the interval around the
    computed value also holds what :func:`exact_differences` finds.
    """
    return (rank + 4) * 2.0**-52


def round_if_sure(difference: Tensor, bound: Tensor, dtype: torch.dtype, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """A float64 difference in ``dtype``, and which of its elements are in doubt.

    Args:
        difference: (rows, columns) float64, moved by ``bound``.
        bound: (rows, 1) float64, twice the error of each element of a row.
        dtype: float32, bfloat16 or float16.
        workspace: gives the result.

    Returns:
        (rows, columns) in ``dtype``, and the (n, 2) indices of the elements that may be a neighbour instead.
    """
    least = _rounded("least", difference.sub_(bound), dtype, workspace)
    most = _rounded("most", difference.add_(bound * 2), dtype, workspace)
    if _same_bits(least, most):
        return most, torch.empty(0, 2, dtype=torch.int64, device=most.device)
    rows = (torch.sub(most, least, out=least).amax(dim=1) > 0).nonzero().view(-1)
    doubts = least[rows].nonzero()
    return most, torch.stack([rows[doubts[:, 0]], doubts[:, 1]], dim=1)


def _rounded(name: str, difference: Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    shape = tuple(difference.shape)
    single = workspace.take(name, shape, difference, torch.float32).copy_(difference).add_(0.0)
    return single if dtype == torch.float32 else workspace.take(name, shape, difference, dtype).copy_(single)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors hold the same bits; compared in the widest integers, which is fastest."""
    a, b = a.view(-1), b.view(-1)
    whole = a.numel() - a.numel() % 4
    return torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64)) and torch.equal(a[whole:], b[whole:])


def exact_differences(weight: Tensor, left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Single elements of W - left right, rounded to fp32.

    Args:
        weight: W (rows, columns) fp32.
        left: (rows, r) float64.
        right: (r, columns) float64 that holds fp32 numbers.
        indices: (n, 2) of the elements.

    Returns:
        (n,) fp32.
    """
    count = max(_TERMS // (4 * left.shape[1]), 1)
    places = (indices[start : start + count].unbind(1) for start in range(0, len(indices), count))
    return torch.cat([_exact_difference(weight[i, j], left[i], right[:, j].t()) for i, j in places])


def _exact_difference(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """w - sum_k left_k right_k, rounded to fp32, for weights (n,), left and right (n, r).

    The products are exact, their pairwise sum carries its own errors along (Ogita, Rump and Oishi, "Accurate sum and
    dot product", 2005), and the last rounding sees both parts of the result.
    """
    rank = left.shape[1]
    head = left.float().double()  # 24 bits, and 29 in the rest: each times 24 bits fits a float64
    terms = left.new_zeros(left.shape[0], 1 << (2 * rank - 1).bit_length())
    terms[:, :rank] = head * right
    terms[:, rank : 2 * rank] = (left - head) * right
    errors = torch.zeros_like(terms)
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms, lost = _two_sum(terms[:, :half], terms[:, half:])
        errors = errors[:, :half] + errors[:, half:] + lost
    difference, lost = _two_sum(weights.double(), -terms[:, 0])
    return _round_to_single(*_two_sum(difference, lost - errors[:, 0]))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and exactly what the rounding lost (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _round_to_single(high: Tensor, low: Tensor) -> Tensor:
    """fp32 of high + low, where high is that sum in float64.

    By way of rounding to odd: ties between two fp32 numbers are even in float64, so nothing beside one moves onto it.
    """
    is_even = (high.view(torch.int64) & 1) == 0
    towards = torch.copysign(torch.full_like(low, float("inf")), low)
    odd = torch.where((low != 0) & is_even, torch.nextafter(high, towards), high)
    return odd.float() + 0.0
