"""The element types of the safetensors format, and torch's for them."""

from collections.abc import Mapping

import torch

# In the order of the format's own enum, which decides the layout of a canonical file. A torch dtype is
# named only where its elements are the format's: torch's float4 packs two in one.
_FORMAT: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}

DTYPES: Mapping[str, int] = {name: bits for name, (bits, _) in _FORMAT.items()}
"""Bits per element of every safetensors dtype."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, (_, attribute) in _FORMAT.items()
    if attribute and hasattr(torch, attribute)
}
"""The torch dtype of every safetensors dtype that this torch has one for."""

CANONICAL_ORDER: tuple[str, ...] = tuple(reversed(_FORMAT))
"""The order in which safetensors lays out dtypes in a file: widest first."""
