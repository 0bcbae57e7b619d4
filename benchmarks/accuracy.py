"""How good a residual base with its initial adapter is, weight by weight, against float64.

    python -m benchmarks.accuracy SOURCE OUT

Prints one JSON object: for one weight of each kind of module, the true loss of energy, the worst relative
error of a singular value, how far W_res + s B A is from W, and what the manifest in OUT, if any, certifies.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.spectra import factor_errors, singular_values

_SUFFIX = ".lora_A.weight"


class Tensors:
    """Tensors of a checkpoint folder by name."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def reference(weight: Tensor, name: str, cache: Path) -> Tensor:
    """Singular values (n,) fp64, computed once per source."""
    known: dict[str, Tensor] = load_file(cache) if cache.exists() else {}
    if name not in known:
        known[name] = singular_values(weight)
        save_file(known, cache)
    return known[name]


def one_of_each_kind(modules: list[str]) -> list[str]:
    """The module in the middle of the model for each last part of the names, such as q_proj."""
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(module.rpartition(".")[2], []).append(module)
    return [same[len(same) // 2] for same in kinds.values()]


def certificates(out: Path) -> dict[str, dict[str, Any]]:
    """Certificates by tensor name; {} where ``out`` is not ours."""
    manifest = out / "pissa_manifest.json"
    if not manifest.is_file():
        return {}
    return {weight["tensor"]: weight["certificate"] for weight in json.loads(manifest.read_text())["weights"]}


def measure(source: Path, out: Path) -> dict[str, Any]:
    """Errors of sampled weights, and the worst certificate of all of them."""
    config = json.loads((out / "pissa_init" / "adapter_config.json").read_text())
    adapter = load_file(out / "pissa_init" / "adapter_model.safetensors")
    proven = certificates(out)
    prefix = "base_model.model."
    modules = [key[len(prefix) : -len(_SUFFIX)] for key in adapter if key.endswith(_SUFFIX)]
    rows = []
    with ExitStack() as stack:
        original, residual = Tensors(source, stack), Tensors(out, stack)
        for module in one_of_each_kind(modules):
            name = f"{module}.weight"
            A, B = (adapter[f"{prefix}{module}.lora_{side}.weight"].double() for side in "AB")
            rank = A.shape[0]
            scaling = config["lora_alpha"] / (sqrt(rank) if config.get("use_rslora") else rank)
            stored = original[name]
            weight = stored.double()
            sigma = reference(weight, name, source.with_name(source.name + ".sigma.safetensors"))
            errors = factor_errors(weight, scaling * B, A, sigma)
            remainder = weight - scaling * (B @ A)
            norm = weight.norm()
            rows.append(
                {
                    "tensor": name,
                    "shape": list(weight.shape),
                    "loss": errors.loss,
                    "sigma_error": errors.sigma_error,
                    "reconstruction": float((remainder - residual[name].double()).norm() / norm),
                    "rounding": float((remainder - remainder.to(stored.dtype).double()).norm() / norm),
                    "certificate": proven.get(name),
                }
            )
    return {"weights": rows, "certified": _worst(list(proven.values()))}


def _worst(proven: list[dict[str, Any]]) -> dict[str, float] | None:
    if not proven:
        return None
    return {key: max(each[key] for each in proven) for key in ("energy_loss", "sigma_error")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with torch.inference_mode():
        print(json.dumps(measure(options.source, options.out)))


if __name__ == "__main__":
    main()
