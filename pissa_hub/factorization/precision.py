"""Which kernels multiply fp32 matrices while a decomposition runs.

Two facts decide. TF32 keeps 10 bits of mantissa, so a caller who switched it on would silently void every
certificate. And on CPUs where PyTorch's BLAS is slow for narrow right-hand sides, oneDNN's own fp32 kernels are
two to three times as fast; PyTorch reaches them through a setting that *permits* bf16, which processors with AMX
take literally. So the setting is tried once on a small product and kept only if the result is fp32-accurate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

# Twenty times the error of an exact-order fp32 product of this size; bf16 inputs miss it by a factor of 200.
_ACCEPTED_RELATIVE_ERROR = 1e-5


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32 on every device, by the fastest CPU kernels that do; restored on exit."""
    with ExitStack() as settings:
        cuda = torch.backends.cuda.matmul
        name = "fp32_precision" if hasattr(cuda, "fp32_precision") else "allow_tf32"
        settings.enter_context(_setting(cuda, name, "ieee" if name == "fp32_precision" else False))
        onednn = _onednn_matmul()
        if onednn is not None:
            fastest = "bf16" if _onednn_is_exact() else "ieee"
            settings.enter_context(_setting(onednn, "fp32_precision", fastest))
        yield


@contextmanager
def _setting(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _onednn_matmul() -> Any:
    """PyTorch's settings of oneDNN's matmul; None where PyTorch has no such settings."""
    return getattr(torch.backends.mkldnn, "matmul", None) if torch.backends.mkldnn.enabled else None


@cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN's "bf16" matmul setting still computes fp32 products in fp32 on this processor."""
    matmul = _onednn_matmul()
    if matmul is None:
        return False
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 256, generator=generator)
    try:
        with _setting(matmul, "fp32_precision", "bf16"):
            products = [left @ torch.randn(256, columns, generator=generator) for columns in (16, 64)]
    except RuntimeError:
        return False
    generator.manual_seed(0)
    exact_left = torch.randn(256, 256, generator=generator).double()
    for product in products:
        exact = exact_left @ torch.randn(256, product.shape[1], generator=generator).double()
        if (product.double() - exact).norm() > _ACCEPTED_RELATIVE_ERROR * exact.norm():
            return False
    return True
