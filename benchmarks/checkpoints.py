"""Llama-shaped bf16 checkpoints with the spectra of trained weights, written shard by shard.

    python -m benchmarks.checkpoints OUT --layers 10

A few orthogonal factorisations serve all layers: each weight is the base matrix of its kind with rows and
columns permuted and their signs flipped at random, which leaves singular values alone and changes vectors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.spectra import ATTENTION_DECAY, MLP_DECAY, trained_like


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model: about 1 GB in bf16 by default."""

    layers: int = 10
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000
    tied: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        tied = "tied" if self.tied else "untied"
        size = f"l{self.layers}-h{self.hidden}-i{self.intermediate}-a{self.heads}.{self.kv_heads}"
        return f"llama-{size}-v{self.vocab}-{tied}-s{self.seed}"

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        keys = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def shards(self, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Tensors in order, a new shard where the next would exceed ``shard_bytes``."""
        shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
        filled = 0
        for name, shape in self.tensors():
            size = 2 * torch.Size(shape).numel()
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, shape))
            filled += size
        return shards


class _Weights:
    """Tensors by name; the base matrices are made on first use."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bases: dict[tuple[tuple[int, ...], float], Tensor] = {}

    def make(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = self._generator(name)
        if "_proj" not in name:
            return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        return self._disguised(self._base(shape, name), generator)

    def _base(self, shape: tuple[int, ...], name: str) -> Tensor:
        """One base for W and W^T: what differs is decided per tensor anyway."""
        decay = ATTENTION_DECAY if "self_attn" in name else MLP_DECAY
        key = (max(shape), min(shape)), decay
        if key not in self._bases:
            self._bases[key] = trained_like(*key[0], decay, self._generator(repr(key)))
        base = self._bases[key]
        return base if tuple(base.shape) == shape else base.t()

    @staticmethod
    def _disguised(base: Tensor, generator: torch.Generator) -> Tensor:
        rows, columns = base.shape
        flips = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in (rows, columns)]
        weight = base[torch.randperm(rows, generator=generator)][:, torch.randperm(columns, generator=generator)]
        return weight.mul_(flips[0][:, None]).mul_(flips[1]).bfloat16().contiguous()

    def _generator(self, key: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def write_checkpoint(folder: Path, shape: Shape, shard_bytes: int = 250_000_000) -> None:
    """Write the checkpoint unless it is there; at most one shard is in memory.

    Raises:
        ValueError: ``folder`` holds something else.
    """
    if folder.exists():
        config = folder / "config.json"
        if config.is_file() and json.loads(config.read_text()) == shape.config():
            return
        raise ValueError(f"{folder} exists and is not this checkpoint; remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights, shards = _Weights(shape.seed), shape.shards(shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: weights.make(name, size) for name, size in shard}
        save_file(tensors, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (partial / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("out", type=Path)
    default = Shape()
    for field in ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab", "seed"):
        parser.add_argument("--" + field.replace("_", "-"), type=int, default=getattr(default, field))
    parser.add_argument("--untied", dest="tied", action="store_false")
    parser.add_argument("--shard-mb", type=int, default=250)
    options = vars(parser.parse_args())
    out, shard_mb = options.pop("out"), options.pop("shard_mb")
    try:
        write_checkpoint(out, Shape(**options), shard_mb * 1_000_000)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
