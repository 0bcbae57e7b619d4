"""Stored tensors <-> fp32 matrices. Plain floating-point storage; quantised storage is refused by name."""

import torch

from pissa_hub.checkpoint.header import DTYPES, TORCH_DTYPES, TensorSpec
from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.errors import MatrixError

PLAIN_DTYPES = ("F32", "BF16", "F16")
"""The safetensors dtypes whose elements are the weight's own values."""


def is_plain(dtype: str) -> bool:
    """Whether a tensor of this safetensors dtype can be decoded and encoded."""
    return dtype in PLAIN_DTYPES


def require_plain(spec: TensorSpec) -> None:
    """Raise MatrixError, naming the tensor, unless it :func:`is_plain`."""
    if is_plain(spec.dtype):
        return
    stored = f"tensor {shown(spec.name)} is stored as {spec.dtype}"
    if DTYPES[spec.dtype] <= 8:
        raise MatrixError(
            f"{stored}: quantised storage is not supported yet",
            "exclude it or start from the unquantised model",
        )
    raise MatrixError(f"{stored}, not as one of {', '.join(PLAIN_DTYPES)}", "exclude it or convert it")


def decode(spec: TensorSpec, data: memoryview, out: torch.Tensor) -> None:
    """Widen the stored bytes of one tensor to fp32, exactly.

    Args:
        spec: the stored tensor.
        data: its bytes, writable (torch asks for it), ``spec.nbytes`` long.
        out: float32, ``spec.numel`` elements, contiguous; overwritten.

    Raises:
        MatrixError: the dtype is not plain.
    """
    require_plain(spec)
    out.view(-1).copy_(_elements(data, spec.dtype))


def encode(matrix: torch.Tensor, dtype: str, out: memoryview) -> None:
    """Round an fp32 matrix to a plain dtype, to nearest even; what exceeds F16's 65504 becomes infinite.

    Args:
        matrix: float32, any shape and strides.
        dtype: one of :data:`PLAIN_DTYPES`.
        out: writable, exactly the bytes of the result in row-major order.
    """
    _elements(out, dtype).view(matrix.shape).copy_(matrix)


def _elements(data: memoryview, dtype: str) -> torch.Tensor:
    """The bytes as a flat tensor that shares their memory."""
    # frombuffer refuses an empty buffer.
    return (
        torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]) if data.nbytes else torch.empty(0, dtype=TORCH_DTYPES[dtype])
    )
