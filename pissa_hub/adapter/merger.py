"""The arithmetic of a merge, one stored tensor at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa_hub.adapter.merge_places import MergedTensor
from pissa_hub.adapter.merge_plan import MergedWeight
from pissa_hub.adapter.peft_files import Adapter, LoraModule, read_finite
from pissa_hub.checkpoint.encoding import decode, encode
from pissa_hub.checkpoint.header import TORCH_DTYPES
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.errors import MatrixError
from pissa_hub.factorization.methods import Factors, subtract
from pissa_hub.factorization.workspace import Workspace
from pissa_hub.pipeline.stream import Made


class Merger:
    """W_res -> W_res + s B A, or what else the plan says, on one device, with buffers that it keeps."""

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        self._adapter = adapter
        self._workspace = Workspace()
        self._anchor = torch.empty(0, device=device)

    def __call__(self, weight: MergedWeight, data: memoryview) -> Made:
        base = self._workspace.take("base", weight.stored.shape, self._anchor)
        decode(weight.stored, data[: weight.stored.nbytes], base)
        made: dict[str, memoryview] = {}
        with TensorFile(self._adapter.path, self._adapter.header) as adapter:
            for tensor in weight.tensors:
                place, data = data[: tensor.spec.nbytes], data[tensor.spec.nbytes :]
                self._merge(tensor, base if tensor is weight.tensors[-1] else base.clone(), place, adapter)
                made[tensor.spec.name] = place
        return Made(made, {})

    def _merge(self, tensor: MergedTensor, matrix: Tensor, place: memoryview, adapter: TensorFile) -> None:
        """Write the tensor into its place; the matrix, which it is made of, is overwritten."""
        if tensor.replacement is not None:
            matrix = self._read(adapter, tensor.replacement)
        if tensor.rows is not None:
            matrix[list(tensor.rows.indices)] = self._read(adapter, tensor.rows.stored)
        if tensor.bias_of is not None and tensor.bias_of.bias is not None:
            matrix += tensor.bias_of.scaling * self._read(adapter, tensor.bias_of.bias.name)
        if tensor.lora is not None:
            self._add(tensor.lora, matrix, tensor, place, adapter)
            return
        encode(matrix, tensor.spec.dtype, place)
        _require_fit(tensor, place, matrix)

    def _add(
        self, lora: LoraModule, matrix: Tensor, tensor: MergedTensor, place: memoryview, adapter: TensorFile
    ) -> None:
        """Write W + s B A, which is W less it with the opposite scaling: rounded correctly, the same everywhere."""
        plane = matrix.view(matrix.shape[0], -1)
        factors = self._factors(lora, adapter, is_transposed=tensor.is_transposed)
        stored = torch.frombuffer(place, dtype=TORCH_DTYPES[tensor.spec.dtype]).view(plane.shape)
        try:
            out = stored if lora.magnitude is None else plane
            subtract(plane, factors, out, name=tensor.spec.name, workspace=self._workspace)
        except MatrixError:
            raise _too_large(tensor) from None
        if lora.magnitude is not None:
            magnitude = self._read(adapter, lora.magnitude.name).view(-1)
            stored.copy_(_with_magnitude(plane, magnitude, is_transposed=tensor.is_transposed))
            _require_fit(tensor, place, matrix)

    def _factors(self, module: LoraModule, adapter: TensorFile, *, is_transposed: bool) -> Factors:
        A = self._read(adapter, module.lora_A.name).view(module.rank, module.in_features)
        B = self._read(adapter, module.lora_B.name).view(module.out_features, module.rank)
        left, right = (A.t(), B.t()) if is_transposed else (B, A)
        return Factors(left.contiguous(), right.contiguous(), -module.scaling)

    def _read(self, adapter: TensorFile, name: str) -> Tensor:
        return read_finite(adapter, name).to(self._anchor.device)


def _with_magnitude(weight: Tensor, magnitude: Tensor, *, is_transposed: bool) -> Tensor:
    """DoRA (arXiv 2402.09353, equation 5): every output's weights scaled to the length that was trained; in place."""
    norms = torch.linalg.vector_norm(weight, dim=0 if is_transposed else 1, dtype=torch.float64)
    scale = torch.where(norms > 0, magnitude / norms, 0.0).to(weight)
    return weight.mul_(scale if is_transposed else scale[:, None])


def _require_fit(tensor: MergedTensor, place: memoryview, matrix: Tensor) -> None:
    """Raises MatrixError if rounding to the result's dtype made an element infinite."""
    if not tensor.spec.numel:
        return
    stored = torch.frombuffer(place, dtype=TORCH_DTYPES[tensor.spec.dtype])
    if int(torch.isfinite(stored).sum()) != int(torch.isfinite(matrix).sum()):
        raise _too_large(tensor)


def _too_large(tensor: MergedTensor) -> MatrixError:
    return MatrixError(
        f"{tensor.spec.name} is beyond the range of {TORCH_DTYPES[tensor.spec.dtype]} once merged",
        "choose a wider --dtype",
    )
