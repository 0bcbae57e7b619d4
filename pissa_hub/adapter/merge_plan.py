"""What becomes of every tensor of a base when an adapter is merged into it. Headers and configs only; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pissa_hub.adapter.config import to_json
from pissa_hub.adapter.merge_places import MergedTensor, find_places
from pissa_hub.adapter.peft_files import Adapter
from pissa_hub.checkpoint.encoding import is_plain
from pissa_hub.checkpoint.header import Header, TensorSpec, build_header, canonical
from pissa_hub.checkpoint.index import INDEX_NAME
from pissa_hub.checkpoint.reader import read_small
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.model.modules import ModelLayout
from pissa_hub.pipeline.planned import WholeShard
from pissa_hub.pipeline.settings import ADAPTER_DTYPES, SOURCE_DTYPE

_NAMES = {stored: name for name, stored in ADAPTER_DTYPES.items()}


@dataclass(frozen=True)
class MergedWeight:
    """A stored tensor that changes; as the stream sees it, see ``pipeline.planned.PlannedWeight``.

    Attributes:
        stored: as the base has it.
        tensors: all that it becomes, of one dtype.
    """

    stored: TensorSpec
    tensors: tuple[MergedTensor, ...]

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def room(self) -> int:
        return max(self.stored.nbytes, sum(tensor.spec.nbytes for tensor in self.tensors))

    @property
    def replaced_by(self) -> list[str]:
        return [tensor.spec.name for tensor in self.tensors]

    factors = ()

    @property
    def added(self) -> list[str]:
        """Names of tensors that the base does not have."""
        return [tensor.spec.name for tensor in self.tensors if tensor.spec.name != self.name]

    @property
    def new_dtypes(self) -> set[str]:
        """safetensors dtypes of the result that the stored tensor does not have."""
        return {tensor.spec.dtype for tensor in self.tensors} - {self.stored.dtype}


MergedShard = WholeShard[MergedWeight]


@dataclass(frozen=True)
class MergePlan:
    """All that follows from headers and configs.

    Attributes:
        checkpoint: the base.
        shards: in name order.
        generated: name -> bytes of config.json and index.
        notes: sentences for whoever uses the result.
    """

    checkpoint: Checkpoint
    shards: tuple[MergedShard, ...] = field(repr=False)
    generated: Mapping[str, bytes] = field(repr=False)
    notes: tuple[str, ...]

    @property
    def weights(self) -> list[MergedWeight]:
        """All that change, in the order of the work."""
        return [weight for shard in self.shards for weight in shard.weights.values()]


def plan_merge(
    checkpoint: Checkpoint, layout: ModelLayout, adapter: Adapter, dtype: str, source_dtypes: Mapping[str, str]
) -> MergePlan:
    """Plan a merge.

    Args:
        checkpoint: a residual base, or the original of a converted adapter.
        layout: its modules.
        adapter: as trained.
        dtype: of the result: ``source``, or one for all of its floating-point tensors.
        source_dtypes: tensor -> safetensors dtype that it had in the original, of those that were decomposed.

    Raises:
        AdapterError: the adapter has something that has no place in the base.
    """
    places = find_places(checkpoint, layout, adapter)
    shards = []
    for shard in checkpoint.shards:
        weights = {}
        for entry in shard.header.entries:
            tensors = places.tensors.get(entry.name, (MergedTensor(entry.spec),))
            weight = _typed(entry.spec, tensors, dtype, source_dtypes)
            if entry.name in places.tensors or weight.new_dtypes:
                weights[entry.name] = weight
        shards.append(MergedShard(shard, _output_header(shard.header, weights), weights))
    weights = {name: weight for shard in shards for name, weight in shard.weights.items()}
    generated = {}
    if checkpoint.config is not None:
        generated["config.json"] = _config(checkpoint, weights, is_untied=places.is_untied)
    if checkpoint.index is not None:
        generated[INDEX_NAME] = _index(checkpoint, shards)
    return MergePlan(checkpoint, tuple(shards), generated, places.notes)


def _typed(
    stored: TensorSpec, tensors: Sequence[MergedTensor], dtype: str, source_dtypes: Mapping[str, str]
) -> MergedWeight:
    """The tensors that a stored one becomes, in the dtype of the result."""
    new = source_dtypes.get(stored.name, stored.dtype) if dtype == SOURCE_DTYPE else ADAPTER_DTYPES[dtype]
    if not is_plain(stored.dtype):
        return MergedWeight(stored, tuple(tensors))
    return MergedWeight(stored, tuple(replace(tensor, spec=replace(tensor.spec, dtype=new)) for tensor in tensors))


def _output_header(source: Header, weights: Mapping[str, MergedWeight]) -> Header:
    """The base's own header where all shapes and dtypes stay."""
    specs: list[TensorSpec] = []
    for entry in source.entries:
        weight = weights.get(entry.name)
        specs += [tensor.spec for tensor in weight.tensors] if weight else [entry.spec]
    if specs == [entry.spec for entry in source.entries]:
        return source
    return build_header(canonical(specs), {**source.metadata, "format": "pt"})


def _config(checkpoint: Checkpoint, weights: Mapping[str, MergedWeight], *, is_untied: bool) -> bytes:
    """config.json as it is, but for the dtype to load and the tie that is no more."""
    config = dict(checkpoint.config or {})
    changes: dict[str, Any] = {}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    dtypes = {dtype for weight in weights.values() for dtype in weight.new_dtypes}
    if len(dtypes) == 1 and config.get(key) != _NAMES[min(dtypes)]:
        changes[key] = _NAMES[min(dtypes)]
    if is_untied:
        changes["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            changes["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    if not changes:
        return read_small(checkpoint.files.path("config.json"))
    return to_json({**config, **changes}, allow_nan=True)


def _index(checkpoint: Checkpoint, shards: Sequence[MergedShard]) -> bytes:
    """The index as it is, unless tensors are added or their sizes change."""
    if all(shard.output is shard.source.header for shard in shards):
        assert checkpoint.index_bytes is not None
        return checkpoint.index_bytes
    added = {name: shard.source.name for shard in shards for weight in shard.weights.values() for name in weight.added}
    total = sum(entry.nbytes for shard in shards for entry in shard.output.entries)
    index: dict[str, Any] = dict(checkpoint.index or {})
    return to_json(
        {
            **index,
            "metadata": {**index.get("metadata", {}), "total_size": total},
            "weight_map": dict(sorted({**index["weight_map"], **added}.items())),
        }
    )
