"""The tensors of one safetensors file, one at a time, as fp32 or as bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pissa_hub.checkpoint.encoding import decode
from pissa_hub.checkpoint.header import Header, TensorEntry, TensorSpec, read_header
from pissa_hub.checkpoint.reader import ShardReader


class TensorFile:
    """Random access to a file's tensors; for one thread, closed by leaving ``with``.

    Args:
        path: the file.
        header: of the file, where it has been read already.

    Raises:
        HeaderError: the file is malformed.
        CheckpointError: it cannot be read or changes meanwhile.
    """

    def __init__(self, path: Path, header: Header | None = None) -> None:
        self.path = path
        self.header = header or read_header(path)
        self._reader = ShardReader(path, self.header)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def __contains__(self, name: str) -> bool:
        return name in self.header

    def spec(self, name: str) -> TensorSpec:
        return self.header[name].spec

    def read(self, name: str) -> Tensor:
        """The tensor in fp32. Raises MatrixError if its dtype is not plain."""
        entry = self.header[name]
        out = torch.empty(entry.shape)
        decode(entry.spec, self._bytes(entry), out)
        return out

    def read_bytes(self, name: str) -> memoryview:
        """The tensor's bytes as stored."""
        return self._bytes(self.header[name])

    def is_copy(self, other: TensorFile, name: str) -> bool:
        """Whether ``other`` holds the same dtype, shape and bytes under this name."""
        return self.spec(name) == other.spec(name) and self.read_bytes(name) == other.read_bytes(name)

    def _bytes(self, entry: TensorEntry) -> memoryview:
        data = memoryview(bytearray(entry.nbytes))
        self._reader.read_into(entry, data)
        return data
