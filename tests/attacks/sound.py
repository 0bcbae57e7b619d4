"""The sound folders that attacks start from: a tiny checkpoint, and what the commands make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "pissa_manifest.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"
LORA_A = f"base_model.model.{Q_PROJ}.lora_A.weight"
LORA_B = f"base_model.model.{Q_PROJ}.lora_B.weight"

_LAYER = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
    "input_layernorm": (16,),
    "post_attention_layernorm": (16,),
}
_SHAPES = {
    "model.embed_tokens.weight": (20, 16),
    **{f"model.layers.0.{name}.weight": shape for name, shape in _LAYER.items()},
    "model.norm.weight": (16,),
    "lm_head.weight": (20, 16),
}
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "torch_dtype": "float32",
}


def write_sound(folder: Path) -> None:
    """Write ``source``, ``done`` (decomposed), ``adapter`` (trained), ``lora`` (converted) and ``merged``."""
    from pissa_hub import convert, decompose, merge

    source, done, adapter = (folder / name for name in ("source", "done", "adapter"))
    write_source(source)
    decompose(source, done, rank=2, device="cpu")
    shutil.copytree(done / "pissa_init", adapter)
    factors = load_file(adapter / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for factor in factors.values():
        factor *= 1 + 0.1 * torch.rand(factor.shape, generator=generator)
    save_file(factors, adapter / WEIGHTS, {"format": "pt"})
    convert(adapter, done, folder / "lora", device="cpu")
    merge(done, adapter, folder / "merged", device="cpu")


def write_source(folder: Path) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in _SHAPES.items()}
    names = list(tensors)
    shards = dict(zip(SHARDS, (names[:6], names[6:]), strict=True))
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    total = sum(4 * tensor.numel() for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_MODEL))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("Take it.")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
