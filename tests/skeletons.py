"""Checkpoints of popular models in full size, names, shapes and dtypes as published, without their values.

The files are sparse: a header, and a hole as long as the weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from pissa_hub.checkpoint.header import TensorSpec, build_header

MODELS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "models.json").read_bytes())
"""Recipe -> dtype of the unquantised weights, published number of parameters, and config.json without what has no
bearing on names and shapes."""

SHARD_BYTES = 5_000_000_000
FP8_BLOCK = 128
MXFP4_BLOCK = 32

# In memory -> in the published checkpoint.
_RENAMED = {
    "gemma3": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ],
    "mixtral": [(r"\.mlp\.", ".block_sparse_moe.")],
}
_EXPERT_NAMES = {"mixtral": ("w1", "w3", "w2")}


def write_skeleton(folder: Path, recipe: str, *, dequantized: bool = False) -> dict[str, TensorSpec]:
    """Write the checkpoint that a recipe is for and return its tensors by name.

    Args:
        dequantized: store what the publisher quantised in the dtype of the other weights.
    """
    config = dict(MODELS[recipe]["config"])
    specs = list(_published(recipe))
    if dequantized:
        config.pop("quantization_config", None)
    else:
        specs = [stored for spec in specs for stored in _quantized(spec, config)]
    (folder / "config.json").write_text(json.dumps(config))
    shards = _sharded(sorted(specs, key=lambda spec: spec.name))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        header = build_header(shard, {"format": "pt"})
        (folder / name).write_bytes(header.raw)
        os.truncate(folder / name, header.file_size)
        weight_map |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {spec.name: spec for spec in specs}


def parameters_of(recipe: str) -> int:
    """Number of parameters before quantisation."""
    return sum(spec.numel for spec in _published(recipe))


@cache
def _published(recipe: str) -> tuple[TensorSpec, ...]:
    """Every parameter, experts one by one, before quantisation."""
    return tuple(_parameters_as_published(MODELS[recipe]["config"], MODELS[recipe]["stored_as"]))


def _parameters_as_published(config: dict[str, Any], dtype: str) -> Iterator[TensorSpec]:
    kind = config["model_type"]
    for key, tensor in _parameters(config).items():
        name = key
        for pattern, replacement in _RENAMED.get(kind, ()):
            name = re.sub(pattern, replacement, name)
        stored = [TensorSpec(name, dtype, tuple(tensor.shape))]
        if tensor.dim() == 3 and kind != "gpt_oss":
            gate, up, down = _EXPERT_NAMES.get(kind, ("gate_proj", "up_proj", "down_proj"))
            prefix, _, leaf = name.rpartition(".")
            experts, rows, columns = tensor.shape
            parts = (gate, up) if leaf == "gate_up_proj" else (down,)
            shape = (rows // len(parts), columns)
            stored = [
                TensorSpec(f"{prefix}.{expert}.{part}.weight", dtype, shape)
                for expert in range(experts)
                for part in parts
            ]
        yield from stored
        layers = config.get("num_hidden_layers")
        if config.get("num_nextn_predict_layers") and f".layers.{layers - 1}." in name:
            for spec in stored:
                yield replace(spec, name=spec.name.replace(f".{layers - 1}.", f".{layers}.", 1))
    if config.get("num_nextn_predict_layers"):
        yield from _next_token_layer(config, dtype)


def _parameters(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state of the transformers model on the meta device, tied parameters once."""
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    architecture = settings.pop("architectures", ["DebertaV2Model"])[0]
    typed = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(typed)
    tied = "lm_head.weight" if typed.get_text_config().tie_word_embeddings else None
    return {name: tensor for name, tensor in model.state_dict().items() if name != tied}


def _next_token_layer(config: dict[str, Any], dtype: str) -> Iterator[TensorSpec]:
    """What DeepSeek's multi-token-prediction layer has beside a decoder layer's weights."""
    prefix, hidden, vocabulary = (
        f"model.layers.{config['num_hidden_layers']}",
        config["hidden_size"],
        config["vocab_size"],
    )
    yield TensorSpec(f"{prefix}.eh_proj.weight", dtype, (hidden, 2 * hidden))
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield TensorSpec(f"{prefix}.{norm}.weight", dtype, (hidden,))
    for table in ("embed_tokens", "shared_head.head"):
        yield TensorSpec(f"{prefix}.{table}.weight", dtype, (vocabulary, hidden))


def _quantized(spec: TensorSpec, config: dict[str, Any]) -> list[TensorSpec]:
    """How the publisher stores a parameter."""
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "fp8" and re.search(r"\.(self_attn|mlp)\..*_proj\w*\.weight$", spec.name):
        rows, columns = spec.shape
        grid = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        return [replace(spec, dtype="F8_E4M3"), TensorSpec(f"{spec.name}_scale_inv", "F32", grid)]
    if method == "mxfp4" and len(spec.shape) == 3:
        experts, columns, rows = spec.shape
        grid = (experts, rows, columns // MXFP4_BLOCK)
        blocks = TensorSpec(f"{spec.name}_blocks", "U8", (*grid, MXFP4_BLOCK // 2))
        return [blocks, TensorSpec(f"{spec.name}_scales", "U8", grid)]
    return [spec]


def _sharded(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        if spec.nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards
