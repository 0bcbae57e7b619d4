"""Buffers that outlive one matrix: a freshly mapped page costs about as much as the arithmetic done on it."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Hands out uninitialised tensors by name and keeps their memory for the next request of that name.

    A name's tensor is valid until the name is taken again. Not thread-safe: one workspace per thread.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape with the device of ``like`` and its dtype unless another is given."""
        key = (name, dtype or like.dtype, like.device)
        size = prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)
            buffer = self._buffers[key] = torch.empty(size, dtype=key[1], device=key[2])
        return buffer[:size].view(shape)
