"""Adapters of every kind that PEFT trains, each with the checkpoint and the initial state that it started from."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_hub import decompose

from ..conftest import Factory
from ..helpers import deviation, example_inputs, outputs_of
from ..model.zoo import JUDGES_OWN_WARNINGS
from .kinds import RANK, Kind

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# What PEFT says of adapters beside plain ones; a bias has one dimension, which it takes for a shard of a matrix.
PEFTS_OWN_WARNINGS = [
    *JUDGES_OWN_WARNINGS,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter '.*LoRA tensor.* have invalid shape"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]
# The judges' statements about PEFT are true of this version and newer ones; older ones save and merge less.
OLD_PEFT = tuple(map(int, version("peft").split(".")[:2])) < (0, 20)
# What becomes of a parameter that is still zero, such as a fresh lora_B: noise of this root mean square times ``size``.
_FRESH = 0.5


@dataclass(frozen=True)
class Trained:
    """What training left behind.

    Attributes:
        kind: how it was trained.
        source: the original checkpoint.
        auto_class: transformers' class that loads it.
        base: what the adapter belongs to: the residual on disk; None for ``peft``, where it was only in memory.
        init: what to give to convert as ``init``.
        initial: the whole adapter as PEFT saves it before the first step.
        adapter: the trained adapter's own folder.
        expected: outputs of the residual with the trained adapter as saved.
    """

    kind: Kind
    source: Path
    auto_class: str
    base: Path | None
    init: Path
    initial: Path
    adapter: Path
    expected: Tensor


Training = Callable[[Kind], Trained]


def train(kind: Kind, tiny_checkpoint: Factory, folder: Path) -> Trained:
    """Train one adapter of a kind in ``folder``."""
    if OLD_PEFT and kind.config.get("ensure_weight_tying"):
        pytest.skip("this version of PEFT does not tie adapters")
    source = tiny_checkpoint(kind.architecture, **kind.settings)
    torch.manual_seed(0)
    if kind.method == "peft":
        return _train_in_process(kind, source, folder)
    base = folder / "decomposed"
    auto_class = decompose(source, base, **{"rank": RANK, **kind.decompose}).plan.layout.auto_class
    model = _trainable(kind, base, auto_class)
    initial, adapter = _train_and_save(kind, model, folder)
    expected = outputs_of(load(base, adapter, auto_class))
    if kind.dtype == torch.float32 and deviation(expected, outputs_of(model)) > 1e-6:
        reason = "PEFT did not save all that it trained"
        pytest.skip(reason) if OLD_PEFT else pytest.fail(reason)
    return Trained(kind, source, auto_class, base, base, initial, adapter, expected)


def load(base: Path, adapter: Path, auto_class: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """A base with an adapter, as a user loads them."""
    model = getattr(transformers, auto_class).from_pretrained(base)
    return PeftModel.from_pretrained(model, str(adapter), **options)


def dense_updates(adapter: Path) -> dict[str, Tensor]:
    """s B A of every module in an adapter's folder, float64: (out, in), or (experts, out, in).

    An embedding's is (dim, vocabulary), a convolution's (out, in * height * width). Rank and scaling are the config's,
    by PEFT's rules.
    """
    config = json.loads((adapter / CONFIG).read_bytes())
    tensors = load_file(adapter / WEIGHTS)
    updates = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?A(\.weight)?", name)
        if match:
            module = match[1]
            A = tensor.double().flatten(1)
            B = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")].double().flatten(1)
            rank, alpha = (_of_module(config, module, *keys) for keys in (("r", "rank"), ("lora_alpha", "alpha")))
            scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            experts = A.shape[0] // int(rank)
            blocks = torch.einsum("ore,eri->eoi", B.view(len(B), -1, experts), A.view(experts, -1, A.shape[1]))
            updates[module] = scaling * blocks.squeeze(0)
    return updates


def trained_update(trained: Trained) -> dict[str, Tensor]:
    """Delta W = s' B' A' - s B A of every trained module, float64; what training added started from zero."""
    before = dense_updates(trained.initial if trained.base is None else trained.base / "pissa_init")
    return {module: after - before.get(module, 0.0) for module, after in dense_updates(trained.adapter).items()}


def _of_module(config: Mapping[str, Any], module: str, default: str, pattern: str) -> float:
    """``r`` or ``lora_alpha`` of a module: the first pattern that its path ends with, or the config's."""
    owner = module.removesuffix(".base_layer")
    parameters = [name.rpartition(".") for name in config.get("target_parameters") or []]
    path = next((f"{owner}.{leaf}" for parent, _, leaf in parameters if owner.endswith(parent)), module)
    for key, value in (config.get(f"{pattern}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return float(value)
    return float(config[default])


def _trainable(kind: Kind, base: Path, auto_class: str) -> Any:
    """Residual and pissa_init with what the kind adds, which from_pretrained would miss in the file."""
    config = PeftConfig.from_pretrained(str(base / "pissa_init"))
    config.inference_mode = False
    if kind.also:
        config.target_modules = {*config.target_modules, *kind.also}
    for name, value in kind.config.items():
        setattr(config, name, value)
    model = getattr(transformers, auto_class).from_pretrained(base)
    model = get_peft_model(model, config, adapter_name=kind.adapter_name)
    start = get_peft_model_state_dict(model, adapter_name=kind.adapter_name, save_embedding_layers=False)
    start |= load_file(base / "pissa_init" / WEIGHTS)
    set_peft_model_state_dict(model, start, kind.adapter_name)
    return model


def _train_in_process(kind: Kind, source: Path, folder: Path) -> Trained:
    """PEFT's own PiSSA, its initial state saved as LLaMA-Factory and ms-swift do."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model = get_peft_model(model, LoraConfig(**{"r": RANK, "init_lora_weights": "pissa", **kind.decompose}))
    initial, adapter = _train_and_save(kind, model, folder)
    return Trained(kind, source, "AutoModelForCausalLM", None, initial, initial, adapter, outputs_of(model))


def _train_and_save(kind: Kind, model: Any, folder: Path) -> tuple[Path, Path]:
    folders = folder / "initial", folder / "adapter"
    model.save_pretrained(folders[0])
    _take_steps(kind, model) if kind.steps else _add_noise(kind, model)
    model.save_pretrained(folders[1])
    initial, adapter = (path if kind.adapter_name == "default" else path / kind.adapter_name for path in folders)
    if kind.dtype != torch.float32:
        tensors = {name: tensor.to(kind.dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    return initial, adapter


def _take_steps(kind: Kind, model: Any) -> None:
    """AdamW towards random targets."""
    inputs = example_inputs(model.get_base_model())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for _ in range(kind.steps):
        outputs = model(**inputs)[0].flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(outputs, torch.randint(outputs.shape[-1], outputs.shape[:1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def _add_noise(kind: Kind, model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                scale = float(parameter.square().mean().sqrt()) or _FRESH
                parameter.add_(kind.size * scale * torch.randn(parameter.shape, generator=generator))
