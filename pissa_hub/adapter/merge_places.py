"""Where in a base everything that an adapter holds belongs. From headers, but for weights that may be held twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pissa_hub.adapter.peft_files import Adapter, LoraModule
from pissa_hub.checkpoint.encoding import is_plain
from pissa_hub.checkpoint.header import TensorSpec
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.errors import AdapterError
from pissa_hub.model.modules import ModelLayout

_WITH_PEFT = "merge it with PEFT's merge_and_unload"
_ITS_OWN_BASE = "give the base that it was trained on"
_ITS_OWN_CONFIG = "give the config that was saved with these weights"
_TOKENS = ".token_adapter.trainable_tokens_delta"
# Without their tie, other heads would lack more than this weight: a masked one's bias is shared as well.
_CAUSAL_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that were trained by themselves: the adapter's tensor and their indices."""

    stored: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the result: a stored one, changed in the order of the attributes.

    Attributes:
        spec: its own, in the result.
        replacement: the adapter's tensor that takes the place of the stored one.
        rows: embedding rows that are replaced.
        bias_of: module whose ``lora_B`` bias is added, if this is a bias.
        lora: module whose change is added.
        is_transposed: whether it is stored (in, out), as a Conv1D or an embedding is.
    """

    spec: TensorSpec
    replacement: str | None = None
    rows: TokenRows | None = None
    bias_of: LoraModule | None = None
    lora: LoraModule | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class Places:
    """What an adapter changes.

    Attributes:
        tensors: stored tensor of the base -> what becomes of it: itself, and what is written along with it.
        is_untied: whether a weight that two modules shared becomes two.
        notes: sentences for whoever uses the result.
    """

    tensors: Mapping[str, tuple[MergedTensor, ...]] = field(repr=False)
    is_untied: bool
    notes: tuple[str, ...]


def find_places(checkpoint: Checkpoint, layout: ModelLayout, adapter: Adapter) -> Places:
    """Find the place of everything that an adapter holds.

    Args:
        checkpoint: a residual base, or the original of a converted adapter.
        layout: its modules.
        adapter: as trained.

    Raises:
        AdapterError: the adapter has something that has no place in the base.
    """
    for variant in adapter.config.variants:
        if variant != "DoRA":
            raise AdapterError(f"{adapter.folder} uses {variant}", _WITH_PEFT)
    search = _Search(checkpoint, layout, adapter)
    for module in adapter.modules.values():
        search.place_module(module)
    for stored, key in adapter.saved.items():
        if key.endswith(_TOKENS):
            search.place_tokens(stored, key.removesuffix(_TOKENS))
        else:
            search.place_saved(stored, key)
    return search.places()


class _Search:
    """Collects the changes by their keys in memory."""

    def __init__(self, checkpoint: Checkpoint, layout: ModelLayout, adapter: Adapter) -> None:
        self._adapter = adapter
        self._specs = {entry.name: entry.spec for _, entry in checkpoint.tensors()}
        self._tensor_of = {key: tensor for tensor, key in layout.keys.items()}
        self._modules = {module.tensor: module for module in layout.modules}
        self._shared = {f"{name}.weight": module.tensor for module in layout.modules for name in module.tied_with}
        self._changes: dict[str, MergedTensor] = {}
        self._added: dict[str, MergedTensor] = {}
        # Weights whose modules were trained as one.
        self._tied: set[str] = set()

    def place_module(self, module: LoraModule) -> None:
        if module.experts > 1 or module.name.endswith(".base_layer"):
            raise AdapterError(
                f"{module.name} of {self._adapter.folder} adapts fused experts, which cannot be merged here",
                f"{_WITH_PEFT}, or convert it and serve the LoRA",
            )
        key = f"{module.name}.weight"
        tensor = self._tensor(key)
        owner = self._modules.get(tensor)
        is_transposed = module.is_embedding or (owner is not None and owner.kind == "conv1d")
        shape, expected = self._specs[tensor].shape, (module.out_features, module.in_features)
        found = (shape[0], self._specs[tensor].numel // max(shape[0], 1)) if shape else ()
        if found != (expected[::-1] if is_transposed else expected):
            raise self._misfit(module.name, expected, shape)
        if module.magnitude is not None and module.magnitude.numel != module.out_features:
            raise AdapterError(
                f"{module.magnitude.name} in {self._adapter.path} has {module.magnitude.numel} lengths for "
                f"{module.out_features} outputs",
                _ITS_OWN_CONFIG,
            )
        if self._trained_as_one(tensor, key):
            return
        self._change(key, lora=module, is_transposed=is_transposed)
        if module.bias is not None:
            bias = f"{module.name}.bias"
            if bias not in self._tensor_of:
                raise AdapterError(
                    f"{self._adapter.folder} trained a bias of {module.name}, which has none in the base",
                    "keep it as an adapter: no checkpoint of this model can hold it",
                )
            if self._specs[self._tensor_of[bias]].shape != module.bias.shape:
                raise self._misfit(bias, module.bias.shape, self._specs[self._tensor_of[bias]].shape)
            self._change(bias, bias_of=module)

    def place_saved(self, stored: str, key: str) -> None:
        spec = self._adapter.header[stored].spec
        if not is_plain(spec.dtype):
            raise AdapterError(f"{self._adapter.path} holds {stored} as {spec.dtype}", _WITH_PEFT)
        if key not in self._tensor_of and self._is_held_twice(stored, key):
            return
        if key not in self._tensor_of and key not in self._shared:
            # Any tensor may carry it; the first one of floats also has the dtype of the model.
            carrier = next(spec for spec in self._specs.values() if is_plain(spec.dtype))
            self._added[key] = MergedTensor(replace(spec, name=key, dtype=carrier.dtype), replacement=stored)
            return
        shape = self._specs[self._tensor(key)].shape
        if shape != spec.shape:
            remedy = f"{_ITS_OWN_BASE}; if its vocabulary was resized, {_WITH_PEFT}"
            raise self._misfit(key, spec.shape, shape, remedy)
        self._change(key, replacement=stored)
        if self._adapter.config.table.get("ensure_weight_tying"):
            self._tied.add(self._tensor(key))

    def place_tokens(self, stored: str, module: str) -> None:
        key, trained = f"{module}.weight", self._adapter.header[stored].shape
        tensor = self._tensor(key)
        indices = self._adapter.config.table.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(indices, list) or len(indices) != trained[0]:
            raise AdapterError(
                f"{self._adapter.folder} does not say which {trained[0]} tokens of {module} it trained", _ITS_OWN_CONFIG
            )
        shape = self._specs[tensor].shape
        if trained[1:] != shape[1:] or not all(type(row) is int and 0 <= row < shape[0] for row in indices):
            raise AdapterError(f"{self._adapter.folder} trained tokens that {module} lacks in the base", _ITS_OWN_BASE)
        self._change(key, rows=TokenRows(stored, tuple(indices)))
        # PEFT trains the tokens of a tied output head with the embedding's, so the two stay one.
        self._tied.add(tensor)

    def places(self) -> Places:
        """All of it. Raises AdapterError for a shared weight that cannot become several."""
        tensors: dict[str, dict[str, MergedTensor]] = {}
        notes = []
        for key, change in self._changes.items():
            tensor = self._tensor(key)
            made = tensors.setdefault(tensor, {tensor: MergedTensor(self._specs[tensor])})
            made[change.spec.name] = change
        for tensor, made in tensors.items():
            others = [key for key, owner in self._shared.items() if owner == tensor]
            if not others or (tensor in self._tied and len(made) == 1):
                continue
            if len(others) > 1 or not others[0].endswith(_CAUSAL_HEADS):
                raise AdapterError(
                    f"{tensor} is the weight of {' and '.join(others)} too, which was not trained alike",
                    "keep it as an adapter, or train both as one (ensure_weight_tying=True)",
                )
            made.setdefault(others[0], MergedTensor(replace(self._specs[tensor], name=others[0])))
            notes.append(f"{others[0]} is stored by itself now: tie_word_embeddings is false")
        is_untied = bool(notes)
        if self._added:
            carrier = next(name for name, spec in self._specs.items() if is_plain(spec.dtype))
            tensors.setdefault(carrier, {carrier: MergedTensor(self._specs[carrier])}).update(self._added)
            notes += [f"{key} is new: load the result with the class of model that was trained" for key in self._added]
        return Places({tensor: tuple(made.values()) for tensor, made in tensors.items()}, is_untied, tuple(notes))

    def _change(self, key: str, **fields: Any) -> None:
        tensor = self._tensor(key)
        if not is_plain(self._specs[tensor].dtype):
            raise AdapterError(
                f"{tensor} of the base is stored as {self._specs[tensor].dtype}, and {self._adapter.path} changes it",
                "merge it into the unquantised base",
            )
        name = self._tensor_of.get(key, key)
        before = self._changes.get(key) or MergedTensor(replace(self._specs[tensor], name=name))
        self._changes[key] = replace(before, **fields)

    def _tensor(self, key: str) -> str:
        """The stored tensor that a key in memory is loaded from, be it by a tie."""
        tensor = self._tensor_of.get(key) or self._shared.get(key)
        if tensor is None:
            raise AdapterError(f"the base holds no {key}, which {self._adapter.path} changes", _ITS_OWN_BASE)
        return tensor

    def _trained_as_one(self, tensor: str, key: str) -> bool:
        """Whether PEFT tied this module's factors to those of the module that owns the weight."""
        if not self._adapter.config.table.get("ensure_weight_tying"):
            return False
        self._tied.add(tensor)
        return key not in self._tensor_of

    def _is_held_twice(self, stored: str, key: str) -> bool:
        """Whether the adapter has the same values under a key that the base stores: a parameter of two names."""
        spec = self._adapter.header[stored].spec
        twins = [
            other
            for other, other_key in self._adapter.saved.items()
            if other_key in self._tensor_of and self._adapter.header[other].spec == replace(spec, name=other)
        ]
        with TensorFile(self._adapter.path, self._adapter.header) as file:
            content = file.read_bytes(stored) if twins else None
            twin = next((other for other in twins if file.read_bytes(other) == content), None)
        if twin is not None and key in self._shared:
            self._tied.add(self._shared[key])
        return twin is not None

    def _misfit(
        self, name: str, trained: tuple[int, ...], found: tuple[int, ...], remedy: str = _ITS_OWN_BASE
    ) -> AdapterError:
        return AdapterError(f"{name} is {list(trained)} in {self._adapter.path} and {list(found)} in the base", remedy)
