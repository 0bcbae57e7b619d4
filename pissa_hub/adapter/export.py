"""The converted adapter's tensors and adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mode
from typing import Any

from pissa_hub.adapter.peft_files import PREFIX, Adapter, LoraModule
from pissa_hub.checkpoint.header import TensorSpec
from pissa_hub.model.targets import patterns

# What selects the modules that PEFT adapts, and what it does beside; kept as PEFT resolved it when it trained them.
_KEPT_FOR_PEFT = (
    "auto_mapping",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)


def module_specs(module: LoraModule, rank: int, dtype: str) -> dict[str, TensorSpec]:
    """The result's tensors of a module, as ``lora_A``, ``lora_B`` and, where it has one, ``bias``.

    Args:
        module: as trained.
        rank: of the result.
        dtype: its safetensors dtype.
    """
    stem, suffix = PREFIX + module.name, "" if module.is_embedding else ".weight"
    side = "lora_embedding_" if module.is_embedding else "lora_"
    rows = rank * module.experts
    specs = {
        "lora_A": TensorSpec(f"{stem}.{side}A{suffix}", dtype, (rows, *module.lora_A.shape[1:])),
        "lora_B": TensorSpec(f"{stem}.{side}B{suffix}", dtype, (module.out_features, rows, *module.lora_B.shape[2:])),
    }
    if module.bias is not None:
        specs["bias"] = TensorSpec(f"{stem}.lora_B.bias", dtype, module.bias.shape)
    return specs


def saved_specs(adapter: Adapter) -> dict[str, TensorSpec]:
    """Stored name -> the result's tensor, of all that the adapter keeps whole."""
    entries = {stored: adapter.header[stored] for stored in adapter.saved}
    return {
        stored: TensorSpec(PREFIX + stored.removeprefix(PREFIX), entry.dtype, entry.shape)
        for stored, entry in entries.items()
    }


def lora_config(
    trained: Mapping[str, Any], ranks: Mapping[str, int], base_model: str | None, *, for_peft: bool
) -> dict[str, Any]:
    """adapter_config.json: the fewest fields that say it all, as old PEFT versions refuse fields that they do not know.

    Args:
        trained: the trained adapter's.
        ranks: module -> rank; lora_alpha is the same, so that the scaling is 1.
        base_model: Hub id of the original model.
        for_peft: whether the target may be selected, and ranks may differ, by patterns.
    """
    rank = mode(sorted(ranks.values()))
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": bool(trained.get("fan_in_fan_out", False)),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in ranks}),
        "task_type": trained.get("task_type"),
        "use_rslora": False,
    }
    if not for_peft:
        return config
    config |= {key: trained[key] for key in _KEPT_FOR_PEFT if trained.get(key)}
    targets = trained.get("target_modules")
    config["target_modules"] = sorted(targets) if isinstance(targets, list) else targets
    of_modules = patterns(ranks, rank)
    return {**config, "rank_pattern": of_modules, "alpha_pattern": of_modules}
