"""What LoRA servers accept. The safe export for all but PEFT: one rank, alpha = rank, leaf names, factors alone."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pissa_hub.adapter.peft_files import Adapter
from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.errors import AdapterError

MERGE = "merge it into the residual base and serve that: `pissa-hub merge RESIDUAL ADAPTER -o DIR`"
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Server:
    """One server's rules.

    Attributes:
        name: as ``--for`` takes it.
        is_uniform: whether all modules have to share one rank.
        ranks: the ranks that it takes, ascending; empty: any.
        leaves: the last parts of module paths that it adapts; empty: what the model has.
        embeddings: whether it adapts embeddings and output heads.
        experts: whether it may take fused experts.
        needs_all_layers: whether a kind of module that one layer lacks is dropped from all of them.
        model_types: of config.json, that it serves adapters for; empty: any.
    """

    name: str
    is_uniform: bool = True
    ranks: tuple[int, ...] = ()
    leaves: frozenset[str] = frozenset()
    embeddings: bool = True
    experts: bool = False
    needs_all_layers: bool = False
    model_types: frozenset[str] = frozenset()

    def rank_for(self, needed: int) -> int:
        """The smallest rank that it takes and that holds ``needed``. Raises AdapterError if there is none."""
        if not self.ranks:
            return needed
        found = next((rank for rank in self.ranks if rank >= needed), None)
        if found is None:
            raise AdapterError(
                f"{self.name} takes ranks up to {self.ranks[-1]}, and the exact change has {needed}",
                f"choose --rank {self.ranks[-1]}, or --rank auto with a --max-error",
            )
        return found


_LLAMA_LEAVES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED_LEAVES = frozenset({"qkv_proj", "gate_up_proj"})
_HEADS = frozenset({"embed_tokens", "lm_head"})

SERVERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server("peft", is_uniform=False, experts=True),
        Server("vllm", ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512), experts=True),
        Server("sglang", leaves=_LLAMA_LEAVES | _FUSED_LEAVES | _HEADS),
        Server("llama.cpp"),
        Server("tgi", embeddings=False, needs_all_layers=True),
        Server("ollama", embeddings=False, model_types=frozenset({"llama", "gemma2"})),
    )
}


def find_server(name: str) -> Server:
    """The server of a ``--for``. Raises AdapterError for an unknown one."""
    if name not in SERVERS:
        raise AdapterError(f"server {name!r} is unknown", f"use {', '.join(SERVERS)}")
    return SERVERS[name]


def require_servable(server: Server, adapter: Adapter, base: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse what the server would drop, misread or crash on.

    Args:
        server: its rules.
        adapter: the trained adapter.
        base: the base's config.json; empty where it is not known.

    Returns:
        a sentence for each thing that depends on the server's version or options.

    Raises:
        AdapterError: naming the first thing that it cannot serve, and the way out.
    """
    for variant in adapter.config.variants:
        raise AdapterError(f"{adapter.folder} uses {variant}, which no LoRA can express", MERGE)
    for module in adapter.modules.values():
        if module.magnitude is not None:
            raise AdapterError(f"{adapter.folder} has DoRA magnitudes, which no LoRA can express", MERGE)
    if server.name == "peft":
        return ()
    for fact in _unservable(server, adapter, base):
        raise AdapterError(f"{server.name} {fact}", MERGE)
    return tuple(_doubts(server, adapter, base))


def _unservable(server: Server, adapter: Adapter, base: Mapping[str, Any]) -> Iterator[str]:
    modules, model_type = adapter.modules.values(), str(base.get("model_type") or "")
    if adapter.saved:
        kept = next(iter(adapter.saved.values()))
        yield f"takes lora_A and lora_B alone, and this adapter holds {kept} whole"
    for module in modules:
        leaf = module.name.rpartition(".")[2]
        if module.bias is not None:
            yield f"takes no bias of lora_B, and {module.name} has one"
        if module.is_convolution:
            yield f"adapts no convolutions, and {module.name} is one"
        if module.experts > 1 and not server.experts:
            yield f"does not take fused experts, and {module.name} holds {module.experts}"
        if not server.embeddings and (module.is_embedding or leaf in _HEADS):
            yield f"adapts neither embeddings nor the output head, and {module.name} is one"
        if server.leaves and leaf not in server.leaves:
            yield f"does not adapt {module.name}"
    if server.model_types and model_type and model_type not in server.model_types:
        served = " and ".join(sorted(server.model_types))
        yield f"serves adapters for {served} models, not for {shown(model_type)[1:-1]}"
    if server.needs_all_layers:
        for leaf, layer in _missing_layers(adapter, base).items():
            yield f"drops {leaf} from all layers where layer {layer} lacks it"


def _doubts(server: Server, adapter: Adapter, base: Mapping[str, Any]) -> Iterator[str]:
    modules = adapter.modules.values()
    if any(module.is_embedding or module.name.rpartition(".")[2] in _HEADS for module in modules):
        yield f"embeddings or the output head are adapted: {server.name} takes them for some models only"
    if any(module.experts > 1 for module in modules):
        yield f"fused experts are adapted: {server.name} takes them for some models only"
    if any(re.search(r"\.(gate|router)$", module.name) for module in modules):
        yield f"routers are adapted: {server.name} may leave them out"
    if server.needs_all_layers and _layer_count(base) is None:
        last = max((max(layers) for layers in _layers_of(adapter).values()), default=0)
        yield f"{server.name} drops the modules from all layers if the model has layers beyond {last}"
    elif _missing_layers(adapter, base):
        yield f"some layers lack modules that others have: compare what {server.name} answers with the merged model"
    if server.model_types and not base.get("model_type"):
        yield f"{server.name} serves adapters for {' and '.join(sorted(server.model_types))} models only"


def _missing_layers(adapter: Adapter, base: Mapping[str, Any]) -> dict[str, int]:
    """Leaf name -> the first layer that lacks it, of those that the base has or up to the last that has any module."""
    layers_of = _layers_of(adapter)
    count = _layer_count(base) or 1 + max((max(layers) for layers in layers_of.values()), default=-1)
    first = {
        leaf: next(layer for layer in itertools.count() if layer not in layers) for leaf, layers in layers_of.items()
    }
    return {leaf: layer for leaf, layer in first.items() if layer < count}


def _layer_count(base: Mapping[str, Any]) -> int | None:
    count = base.get("num_hidden_layers")
    return count if isinstance(count, int) else None


def _layers_of(adapter: Adapter) -> dict[str, set[int]]:
    """Leaf name -> the layers that have it."""
    layers_of: dict[str, set[int]] = defaultdict(set)
    for name in adapter.modules:
        layer = _LAYER.search(name)
        if layer:
            layers_of[name.rpartition(".")[2]].add(int(layer[1]))
    return layers_of
