"""Adapters of any size without a model: what PiSSA starts from and what training made of it, as PEFT saves them.

python -m benchmarks.adapters OUT --layers 32 --hidden 4096 --intermediate 11008 --rank 128

Writes ``OUT/init`` and ``OUT/trained``. Factors have singular values that fall as (i + 1)^-0.23, and training moved
each entry by a Gaussian of ``--change`` times the factor's own root mean square.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa_hub.checkpoint.header import TensorSpec, build_header
from pissa_hub.checkpoint.writer import ShardWriter

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """Module within a layer -> (out, in)."""
    attention = {f"self_attn.{name}": (hidden, hidden) for name in TARGETS[:4]}
    return {
        **attention,
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def write(out: Path, layers: int, hidden: int, intermediate: int, rank: int, change: float) -> None:
    """Both adapters, a tensor at a time."""
    specs = []
    for layer in range(layers):
        for module, (rows, columns) in shapes(hidden, intermediate).items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            specs += [
                TensorSpec(f"{name}.lora_A.weight", "F32", (rank, columns)),
                TensorSpec(f"{name}.lora_B.weight", "F32", (rows, rank)),
            ]
    header = build_header(specs, {"format": "pt"})
    for folder in (out / "init", out / "trained"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config(rank), indent=2))
    with (
        ShardWriter(out / "init" / "adapter_model.safetensors", header) as before,
        ShardWriter(out / "trained" / "adapter_model.safetensors", header) as after,
    ):
        for spec, (initial, trained) in zip(specs, factors(specs, rank, change), strict=True):
            before.write(spec.name, _bytes(initial))
            after.write(spec.name, _bytes(trained))
        before.commit()
        after.commit()


def factors(specs: list[TensorSpec], rank: int, change: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Initial and trained tensor of each."""
    generator = torch.Generator().manual_seed(0)
    root = torch.arange(1, rank + 1).pow(-0.115)
    for spec in specs:
        along = root[:, None] if spec.shape[0] == rank else root
        initial = torch.randn(spec.shape, generator=generator) * along * max(spec.shape) ** -0.5
        step = torch.randn(spec.shape, generator=generator) * (change * float(initial.square().mean().sqrt()))
        yield initial, initial + step


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).numpy()
    return memoryview(array)


def config(rank: int) -> dict[str, object]:
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--change", type=float, default=0.01)
    options = parser.parse_args()
    write(options.out, options.layers, options.hidden, options.intermediate, options.rank, options.change)


if __name__ == "__main__":
    main()
