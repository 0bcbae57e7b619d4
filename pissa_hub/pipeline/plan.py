"""The whole job, known from headers and config.json before a weight is read: pure, no file is written.

Every output header is part of the plan, so shards can be written as streams, keep the source's names and tensor order,
and a run that was killed finds by the plan's digest what it may carry on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pissa_hub import __version__
from pissa_hub.checkpoint.encoding import require_plain
from pissa_hub.checkpoint.header import Header, TensorSpec, build_header, canonical
from pissa_hub.checkpoint.index import INDEX_NAME
from pissa_hub.checkpoint.reader import read_small
from pissa_hub.checkpoint.source import Checkpoint, Shard
from pissa_hub.manifest import lora_names
from pissa_hub.model.modules import ModelLayout
from pissa_hub.model.targets import Target, peft_patterns, peft_target_modules, select_targets
from pissa_hub.pipeline.planned import WholeShard
from pissa_hub.pipeline.settings import ADAPTER_DTYPES, SOURCE_DTYPE, Settings

ADAPTER_FOLDER = "pissa_init"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class WeightPlan:
    """One weight to decompose.

    Attributes:
        target: module, rank and alpha.
        stored: name, dtype and shape in the source.
        residual_dtype: safetensors dtype of the base's weight.
        lora_A: what the adapter stores for A, (rank, in).
        lora_B: what the adapter stores for B, (out, rank).
        scaling: s of W = W_res + s B A.
    """

    target: Target
    stored: TensorSpec
    residual_dtype: str
    lora_A: TensorSpec
    lora_B: TensorSpec
    scaling: float

    @property
    def name(self) -> str:
        return self.target.module.name

    @property
    def replaced_by(self) -> tuple[str]:
        return (self.stored.name,)

    @property
    def factors(self) -> tuple[str, str]:
        return self.lora_A.name, self.lora_B.name

    @property
    def is_conv1d(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.target.module.kind == "conv1d"

    @property
    def room(self) -> int:
        """Bytes of the buffer that the weight is read into and the residual is written from."""
        return max(self.stored.nbytes, replace(self.stored, dtype=self.residual_dtype).nbytes)


# ``adapter`` is None where a shard holds no target.
ShardPlan = WholeShard[WeightPlan]


@dataclass(frozen=True)
class Plan:
    """What ``decompose`` will do.

    Attributes:
        checkpoint: the source.
        settings: what was asked for.
        layout: modules in memory and the classes that load them.
        shards: in name order.
        adapter: header of the finished ``adapter_model.safetensors``.
        generated: name -> bytes of the files that follow from the plan alone: configs and index.
    """

    checkpoint: Checkpoint
    settings: Settings
    layout: ModelLayout = field(repr=False)
    shards: tuple[ShardPlan, ...] = field(repr=False)
    adapter: Header = field(repr=False)
    generated: Mapping[str, bytes] = field(repr=False)

    @property
    def weights(self) -> list[WeightPlan]:
        return [weight for shard in self.shards for weight in shard.weights.values()]

    @property
    def input_bytes(self) -> int:
        return sum(shard.source.header.file_size for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        """Bytes of the finished folder's shards and adapter."""
        return sum(shard.output.file_size for shard in self.shards) + self.adapter.file_size

    def disk_bytes(self, finished: frozenset[str] = frozenset()) -> int:
        """Most bytes on disk at once, less what the ``finished`` shards already take."""
        shards = [shard for shard in self.shards if shard.name not in finished]
        parts = sum(shard.adapter.file_size for shard in shards if shard.adapter)
        carried = sum(self.checkpoint.files.size(name) for name in self.checkpoint.other_files)
        return sum(shard.output.file_size for shard in shards) + parts + self.adapter.file_size + carried

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of everything that decides the output but the weights' values and the machine."""
        shards = [
            [
                shard.name,
                _sha256(shard.source.header.raw),
                shard.source.header.file_size,
                _sha256(shard.output.raw),
            ]
            for shard in self.shards
        ]
        weights = [
            [weight.stored.name, weight.target.module.name, weight.target.rank, weight.scaling]
            for weight in self.weights
        ]
        generated = {name: _sha256(data) for name, data in self.generated.items()}
        whole = [
            __version__,
            self.settings.as_dict(),
            shards,
            weights,
            generated,
            self.checkpoint.other_files,
        ]
        return _sha256(json.dumps(whole, sort_keys=True).encode())


def make_plan(checkpoint: Checkpoint, layout: ModelLayout, settings: Settings) -> Plan:
    """Plan a decomposition.

    Raises:
        TargetError: targets, patterns or ranks do not fit the model.
        MatrixError: a target is stored in a way that cannot be decomposed.
    """
    targets = select_targets(
        layout,
        targets=settings.targets,
        exclude=settings.exclude,
        rank=settings.rank,
        alpha=settings.alpha,
        rank_pattern=settings.rank_pattern,
    )
    shards = plan_shards(checkpoint, targets, settings)
    weights = [weight for shard in shards for weight in shard.weights.values()]
    adapter = build_header(canonical(spec for weight in weights for spec in (weight.lora_A, weight.lora_B)), _METADATA)
    generated = {f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME}": _adapter_config(layout, targets, settings)}
    if checkpoint.config is not None:
        generated["config.json"] = model_config(checkpoint, weights)
    if checkpoint.index is not None:
        generated[INDEX_NAME] = index_bytes(checkpoint, shards)
    return Plan(checkpoint, settings, layout, shards, adapter, generated)


def plan_shards(checkpoint: Checkpoint, targets: Iterable[Target], settings: Settings) -> tuple[ShardPlan, ...]:
    """What becomes of every shard. Raises MatrixError for a target that cannot be decomposed as it is stored."""
    by_tensor = {target.module.tensor: target for target in targets}
    return tuple(_plan_shard(shard, by_tensor, settings) for shard in checkpoint.shards)


def _plan_shard(shard: Shard, by_tensor: Mapping[str, Target], settings: Settings) -> ShardPlan:
    weights = {
        entry.name: _plan_weight(entry.spec, by_tensor[entry.name], settings)
        for entry in shard.header.entries
        if entry.name in by_tensor
    }
    specs = [
        replace(entry.spec, dtype=weights[entry.name].residual_dtype) if entry.name in weights else entry.spec
        for entry in shard.header.entries
    ]
    factors = [spec for weight in weights.values() for spec in (weight.lora_A, weight.lora_B)]
    return ShardPlan(
        source=shard,
        output=_output_header(shard.header, specs),
        weights=weights,
        adapter=build_header(factors, _METADATA) if factors else None,
    )


def _plan_weight(stored: TensorSpec, target: Target, settings: Settings) -> WeightPlan:
    require_plain(stored)
    dtype = ADAPTER_DTYPES[settings.adapter_dtype]
    name_A, name_B = lora_names(target.module.name)
    residual = settings.residual_dtype
    return WeightPlan(
        target=target,
        stored=stored,
        residual_dtype=stored.dtype if residual == SOURCE_DTYPE else ADAPTER_DTYPES[residual],
        lora_A=TensorSpec(name_A, dtype, (target.rank, target.in_features)),
        lora_B=TensorSpec(name_B, dtype, (target.out_features, target.rank)),
        scaling=settings.scaling(target.rank, target.alpha),
    )


def _output_header(source: Header, specs: list[TensorSpec]) -> Header:
    """The source's header where nothing changes; its order unless a new dtype would misalign what follows."""
    if specs == [entry.spec for entry in source.entries]:
        return source if "format" in source.metadata else build_header(specs, {**source.metadata, **_METADATA})
    return build_header(canonical(specs), {**source.metadata, **_METADATA})


def _adapter_config(layout: ModelLayout, targets: tuple[Target, ...], settings: Settings) -> bytes:
    """The fewest fields that say it all: old PEFT versions refuse fields that they do not know."""
    alpha = float(settings.rank if settings.alpha is None else settings.alpha)
    rank_pattern, alpha_pattern = peft_patterns(targets, settings.rank, settings.alpha)
    return _json(
        {
            "base_model_name_or_path": None,
            "bias": "none",
            "fan_in_fan_out": any(target.module.kind == "conv1d" for target in targets),
            "inference_mode": True,
            # Anything else makes PEFT decompose the residual once more.
            "init_lora_weights": True,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": settings.rank,
            "rank_pattern": rank_pattern,
            "alpha_pattern": {key: int(value) if value.is_integer() else value for key, value in alpha_pattern.items()},
            "target_modules": peft_target_modules(layout, targets),
            "task_type": layout.task_type,
            "use_rslora": settings.use_rslora,
        }
    )


def model_config(checkpoint: Checkpoint, weights: Iterable[WeightPlan]) -> bytes:
    """config.json as stored, unless loading would round the residuals to the dtype that it names."""
    config = dict(checkpoint.config or {})
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    changed = {weight.residual_dtype for weight in weights if weight.residual_dtype != weight.stored.dtype}
    loaded_as = ADAPTER_DTYPES.get(str(config.get(key)))
    if loaded_as == "F32" or changed <= {loaded_as}:
        return read_small(checkpoint.files.path("config.json"))
    return _json({**config, key: "float32"})


def index_bytes(checkpoint: Checkpoint, shards: Sequence[ShardPlan]) -> bytes:
    """The index as stored, unless a changed dtype changes its total size."""
    if all(shard.output.file_size == shard.source.header.file_size for shard in shards):
        assert checkpoint.index_bytes is not None
        return checkpoint.index_bytes
    total = sum(entry.nbytes for shard in shards for entry in shard.output.entries)
    index: dict[str, Any] = dict(checkpoint.index or {})
    return _json({**index, "metadata": {**index.get("metadata", {}), "total_size": total}})


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
