"""How far a converted adapter is from the change that it stands for, in float64, as stored and once cast to bf16.

    python -m benchmarks.delta_error ADAPTERS CONVERTED

ADAPTERS holds ``init`` and ``trained``, see ``benchmarks.adapters``. Looks at one module of each kind, the first
layer's, densely. Prints one JSON object: the largest relative Frobenius errors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def products(folder: Path, names: list[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Module -> s B A, fp64; the factors cast to ``dtype`` first if there is one."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in names:
            A, B = (file.get_tensor(f"{name}.lora_{side}.weight") for side in "AB")
            if dtype is not None:
                A, B = A.to(dtype), B.to(dtype)
            found[name] = scaling * (B.double() @ A.double())
    return found


def errors(adapters: Path, converted: Path) -> dict[str, float]:
    """Largest of the first layer's modules."""
    with safe_open(adapters / "init" / "adapter_model.safetensors", framework="pt") as file:
        stems = {key.partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118  # no mapping
    names = sorted(stem for stem in stems if ".layers.0." in stem)
    worst = {"as_stored": 0.0, "in_bf16": 0.0}
    for name in names:  # one at a time: each product is as large as the weight
        after, before = (products(adapters / which, [name], None)[name] for which in ("trained", "init"))
        change = after - before
        for key, dtype in (("as_stored", None), ("in_bf16", torch.bfloat16)):
            error = products(converted, [name], dtype)[name] - change
            worst[key] = max(worst[key], float(error.norm() / change.norm()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delta_error", description=__doc__)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("converted", type=Path)
    options = parser.parse_args()
    print(json.dumps(errors(options.adapters, options.converted)))


if __name__ == "__main__":
    main()
