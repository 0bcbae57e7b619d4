"""What the stream's workers compute: a weight's residual, from its SVD or from factors that are already there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa_hub.checkpoint.encoding import decode
from pissa_hub.checkpoint.header import TORCH_DTYPES, Header
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.factorization.methods import Factors, pissa_factors, subtract
from pissa_hub.factorization.svd import TruncatedSVD, truncated_svd
from pissa_hub.factorization.workspace import Workspace
from pissa_hub.manifest import CertificateRecord, ReconstructionRecord, WeightRecord
from pissa_hub.pipeline.device import described
from pissa_hub.pipeline.plan import WeightPlan
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.stream import Made


class Decomposer:
    """W -> residual, A and B, on one device, with buffers that it keeps from weight to weight."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings = settings
        self._workspace = Workspace()
        self._anchor = torch.empty(0, device=device)

    def __call__(self, weight: WeightPlan, data: memoryview) -> Made:
        stored, rank = weight.stored, weight.target.rank
        matrix = _widened(weight, data, self._workspace, self._anchor)
        svd = truncated_svd(matrix, rank, self._settings.svd_settings, name=stored.name, workspace=self._workspace)
        factors = pissa_factors(svd, weight.scaling, TORCH_DTYPES[weight.lora_A.dtype])
        base = _residual_in(data, weight)
        deviation = subtract(matrix, factors, base, name=stored.name, workspace=self._workspace)
        return Made(
            tensors={stored.name: _bytes(base)},
            adapter=_adapter(weight, factors),
            record=_record(weight, svd, ReconstructionRecord(**asdict(deviation))),
            device=described(self._anchor.device),
        )


class Restorer:
    """W -> residual, with the A and B of an adapter file, on one device."""

    def __init__(self, adapter: Path, header: Header, device: torch.device) -> None:
        self._adapter = adapter
        self._header = header
        self._workspace = Workspace()
        self._anchor = torch.empty(0, device=device)

    def __call__(self, weight: WeightPlan, data: memoryview) -> Made:
        matrix = _widened(weight, data, self._workspace, self._anchor)
        base = _residual_in(data, weight)
        subtract(matrix, self._factors(weight), base, name=weight.stored.name, workspace=self._workspace)
        return Made({weight.stored.name: _bytes(base)}, {})

    def _factors(self, weight: WeightPlan) -> Factors:
        dtype = TORCH_DTYPES[weight.lora_A.dtype]
        with TensorFile(self._adapter, self._header) as adapter:
            A, B = (adapter.read(spec.name).to(self._anchor.device, dtype) for spec in (weight.lora_A, weight.lora_B))
        left, right = (A.t(), B.t()) if weight.is_conv1d else (B, A)
        return Factors(left.contiguous(), right.contiguous(), weight.scaling)


def _widened(weight: WeightPlan, data: memoryview, workspace: Workspace, anchor: Tensor) -> Tensor:
    """The stored weight in fp32, on the device of ``anchor``."""
    matrix = workspace.take("weight", weight.stored.shape, anchor)
    decode(weight.stored, data[: weight.stored.nbytes], matrix)
    return matrix


def _residual_in(data: memoryview, weight: WeightPlan) -> Tensor:
    """The residual's place in the buffer of a weight that has been widened."""
    flat = torch.frombuffer(data, dtype=TORCH_DTYPES[weight.residual_dtype], count=weight.stored.numel)
    return flat.view(weight.stored.shape)


def _adapter(weight: WeightPlan, factors: Factors) -> Mapping[str, memoryview]:
    left, right = factors.left, factors.right
    A, B = (left.t(), right.t()) if weight.is_conv1d else (right, left)
    return {weight.lora_A.name: _bytes(A), weight.lora_B.name: _bytes(B)}


def _record(weight: WeightPlan, svd: TruncatedSVD, reconstruction: ReconstructionRecord) -> WeightRecord:
    certificate = svd.certificate
    return WeightRecord(
        tensor=weight.stored.name,
        module=weight.target.module.name,
        shape=(weight.target.out_features, weight.target.in_features),
        is_transposed=weight.is_conv1d,
        source_dtype=weight.stored.dtype,
        rank=weight.target.rank,
        alpha=weight.target.alpha,
        singular_values=tuple(svd.s.tolist()),
        energy=svd.energy,
        certificate=CertificateRecord(
            certificate.kind,
            certificate.energy_loss,
            certificate.sigma_error if certificate.sigma_error < float("inf") else None,
            certificate.failure_probability,
        ),
        reconstruction=reconstruction,
    )


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; its own memory where they lie so on the CPU."""
    array: Any = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
