"""Plain tensors to fp32 and back; everything else refused by name."""

import pytest
import torch

from pissa_hub.checkpoint.encoding import decode, encode, is_plain, require_plain
from pissa_hub.checkpoint.header import DTYPES, TORCH_DTYPES, TensorSpec
from pissa_hub.errors import MatrixError

PLAIN = ["F32", "BF16", "F16"]


def stored(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("dtype", PLAIN)
def test_decode_is_exact_and_encode_its_inverse(dtype: str) -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[dtype])
    data = stored(tensor)
    matrix = torch.empty(5, 7)
    decode(TensorSpec("w", dtype, (5, 7)), data, matrix)
    assert torch.equal(matrix, tensor.float())
    again = memoryview(bytearray(len(data)))
    encode(matrix, dtype, again)
    assert again == data


@pytest.mark.parametrize("dtype", PLAIN)
def test_encode_rounds_as_torch_does(dtype: str) -> None:
    matrix = torch.randn(33, 9, generator=torch.Generator().manual_seed(1))
    out = memoryview(bytearray(matrix.numel() * DTYPES[dtype] // 8))
    encode(matrix, dtype, out)
    assert out == stored(matrix.to(TORCH_DTYPES[dtype]))


def test_encode_writes_strided_matrices_in_row_major_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3).T
    out = memoryview(bytearray(24))
    encode(matrix, "F32", out)
    assert list(out.cast("f")) == [0, 3, 1, 4, 2, 5]


def test_scalars_and_empty_tensors() -> None:
    out = memoryview(bytearray(2))
    encode(torch.tensor(1.5), "BF16", out)
    scalar = torch.empty(())
    decode(TensorSpec("s", "BF16", ()), out, scalar)
    assert scalar.item() == 1.5
    nothing = memoryview(bytearray())
    encode(torch.empty(0, 4), "F16", nothing)
    decode(TensorSpec("e", "F16", (0, 4)), nothing, torch.empty(0, 4))


def test_plain_dtypes() -> None:
    assert [name for name in DTYPES if is_plain(name)] == ["F16", "BF16", "F32"]
    require_plain(TensorSpec("w", "BF16", (2, 2)))


def test_quantised_storage_is_refused_by_name() -> None:
    with pytest.raises(MatrixError, match=r"tensor 'layer\.w' is stored as F8_E4M3: quantised storage .*; exclude"):
        decode(TensorSpec("layer.w", "F8_E4M3", (1,)), memoryview(bytearray(1)), torch.empty(1))


def test_wide_storage_is_refused_by_name() -> None:
    with pytest.raises(MatrixError, match=r"'w' is stored as F64, not as one of F32, BF16, F16; exclude"):
        require_plain(TensorSpec("w", "F64", (1,)))
