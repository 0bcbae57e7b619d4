"""Checkpoint tensor names -> in-memory modules, the names that PEFT's adapter keys are made of.

Works on names and shapes alone. transformers renames many tensors while it loads them (prefixes, old
layouts, fused experts); its own rules are applied here to a model without weights, see ``skeleton.py``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from pissa_hub.errors import CheckpointError
from pissa_hub.model.skeleton import UnknownModelError, build_skeleton

Kind = Literal["linear", "conv1d", "embedding", "other"]

# Where transformers keeps a classification or span head (PEFT: SEQ_CLS_HEAD_NAMES and qa_outputs).
_TASK_HEADS = ("score", "classifier", "qa_outputs")

# What the fallback goes by: the last part of a name.
_HEAD_LIKE = re.compile(r"lm_head|embed_out|output_layer")
_EMBEDDING_LIKE = re.compile(r".*embed.*|wte|wpe|shared")


@dataclass(frozen=True)
class WeightModule:
    """A stored tensor and the module that owns it in memory.

    Attributes:
        tensor: name in the checkpoint.
        name: path of the owning module, or of the parameter where that is not called ``weight`` (experts).
        kind: 'linear' (stored (out, in)), 'conv1d' (GPT-2's Conv1D, stored (in, out)), 'embedding' (rows,
            dim), or 'other': convolutions, norms, routers, experts, and every weight that is stored in
            another shape than it has in memory (packed) or is recombined while loading (fused).
        shape: as stored.
        is_output_head: belongs to the language-model, classification or span head.
        tied_with: the other names of this very parameter in memory, likewise without ``.weight``.
        what: class of the owning module and, where that alone does not tell, why it is 'other'; for messages.
    """

    tensor: str
    name: str
    kind: Kind
    shape: tuple[int, ...]
    is_output_head: bool = False
    tied_with: tuple[str, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class ModelLayout:
    """The weights of a checkpoint as the modules of the model that loads it.

    Attributes:
        modules: every stored weight that has a place in memory, in the order of the checkpoint. Biases,
            buffers and what the model ignores (quantisation scales, unused heads) are absent.
        architecture: transformers class, e.g. LlamaForCausalLM; None if the model is unknown.
        auto_class: transformers class to load it with, e.g. AutoModelForCausalLM.
        task_type: PEFT ``TaskType`` for adapter_config.json; None where PEFT's plain wrapper serves best.
        note: one sentence for the user if names could not be mapped, else None.
        all_module_names: paths of all modules in memory, stored or not, containers too: what PEFT matches
            ``target_modules`` against.
        keys: stored tensor -> its key in the model's state dict, biases and buffers too, of all that loading does
            not recombine with others and the model does not ignore.
    """

    modules: tuple[WeightModule, ...]
    architecture: str | None
    auto_class: str
    task_type: str | None
    note: str | None
    all_module_names: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)


def resolve_layout(config: Mapping[str, Any] | None, tensors: Mapping[str, tuple[int, ...]]) -> ModelLayout:
    """Finds the in-memory module of every stored weight.

    Args:
        config: the parsed config.json, None if there is none.
        tensors: name -> shape of every tensor of the checkpoint, from its headers.

    Returns:
        the layout. Where transformers has no model for the config, 2-D weights keep their checkpoint names
        and ``note`` says why.

    Raises:
        CheckpointError: the config is of a model so much larger that building it would take all memory.
    """
    if config is None:
        return _layout_by_name(tensors, "there is no config.json")
    try:
        skeleton = build_skeleton(config, len(tensors))
        keys = _memory_keys(skeleton.model, tensors)
        modules = _stored_modules(skeleton.model, tensors, keys)
    except CheckpointError:
        raise
    except UnknownModelError as error:
        return _layout_by_name(tensors, str(error))
    except Exception as error:  # a hostile or merely unusual config can make transformers raise anything
        reason = " ".join("".join(c if c.isprintable() else " " for c in str(error)[:1000]).split())[:200]
        return _layout_by_name(tensors, f"transformers rejects config.json ({type(error).__name__}: {reason})")
    if not modules:
        return _layout_by_name(tensors, f"no tensor has a place in {skeleton.architecture}")
    return ModelLayout(
        modules=modules,
        architecture=skeleton.architecture,
        auto_class=skeleton.auto_class,
        task_type=skeleton.task_type,
        note=None,
        all_module_names=tuple(name for name, _ in skeleton.model.named_modules(remove_duplicate=False) if name),
        keys=_plain_keys(skeleton.model, keys),
    )


def _stored_modules(
    model: Any, tensors: Mapping[str, tuple[int, ...]], keys: Mapping[str, tuple[str, bool]]
) -> tuple[WeightModule, ...]:
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names_of: defaultdict[int, list[str]] = defaultdict(list)
    for key, parameter in parameters.items():
        names_of[id(parameter)].append(_module_name(key))
    heads = _output_heads(model)
    fused_names = {_leaf(_module_name(tensor)) for tensor, (_, converted) in keys.items() if converted}

    found = []
    for tensor, (key, converted) in keys.items():
        if key not in parameters or key.endswith(".bias"):
            continue
        name, owner = _module_name(key), modules[key.rpartition(".")[0]]
        shape, own_shape = tuple(tensors[tensor]), tuple(parameters[key].shape)
        kind, what = _kind(owner), type(owner).__name__
        if converted or name == key:
            kind, what = "other", f"a part of {what}"
        elif shape != own_shape:
            kind, what = "other", f"{what} of shape {list(own_shape)} in memory"
        elif _leaf(name) in fused_names:
            # PEFT translates target names of fused experts wherever they occur, also beside the experts.
            kind, what = "other", f"{what} whose name PEFT takes for the experts'"
        module = WeightModule(
            tensor=tensor,
            name=name,
            kind=kind,
            shape=shape,
            is_output_head=any(name == head or name.startswith(f"{head}.") for head in heads),
            tied_with=tuple(other for other in names_of[id(parameters[key])] if other != name),
            what=what,
        )
        found.append(module)
    return tuple(found)


def _memory_keys(model: Any, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, bool]]:
    """Tensor -> (its key in the model's state dict, whether loading recombines it with others).

    The steps are those of transformers' own loader, ``convert_and_load_state_dict_in_model``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    conversions = get_model_conversion_mapping(model)
    converters = [step for step in conversions if isinstance(step, WeightConverter)]
    renamings = [step for step in conversions if not isinstance(step, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    keys: dict[str, tuple[str, bool]] = {}
    for tensor in sorted(tensors):  # the loader's order: some renamings depend on a key seen before
        key, converter = rename_source_key(tensor, renamings, converters, prefix, state)
        if key not in state and tensor in state:
            key, converter = rename_source_key(tensor, [], [], prefix, state)
        keys[tensor] = (key, converter is not None)
    return {tensor: keys[tensor] for tensor in tensors}


def _plain_keys(model: Any, keys: Mapping[str, tuple[str, bool]]) -> dict[str, str]:
    state = model.state_dict()
    return {tensor: key for tensor, (key, converted) in keys.items() if key in state and not converted}


def _output_heads(model: Any) -> tuple[str, ...]:
    """Paths of the modules that PEFT leaves out of 'all-linear': the LM head, else the classification head.

    PEFT leaves a classification head out only under its SEQ_CLS wrapper, which cannot load a bare LoRA
    file. Here it is left out always: it has too few rows for a rank, and fine-tuning replaces it.
    """
    head = model.get_output_embeddings()
    if head is not None:
        return tuple(name for name, module in model.named_modules() if module is head)
    return tuple(name for name in _TASK_HEADS if getattr(model, name, None) is not None)


def _kind(module: torch.nn.Module) -> Kind:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "other"  # out_proj of torch.nn.MultiheadAttention, which reads the weight past any LoRA layer
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, torch.nn.Embedding) else "other"


def _module_name(key: str) -> str:
    return key.removesuffix(".weight")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _layout_by_name(tensors: Mapping[str, tuple[int, ...]], reason: str) -> ModelLayout:
    """The layout of a model that transformers cannot build: module names are the tensors' names."""
    modules = []
    for tensor, shape in tensors.items():
        if not tensor.endswith(".weight") or len(shape) != 2:
            continue
        name = _module_name(tensor)
        leaf = _leaf(name).lower()
        module = WeightModule(tensor, name, "linear", tuple(shape))
        if _HEAD_LIKE.fullmatch(leaf):
            module = replace(module, is_output_head=True)
        elif _EMBEDDING_LIKE.fullmatch(leaf):
            module = replace(module, kind="embedding")
        modules.append(module)
    return ModelLayout(
        modules=tuple(modules),
        architecture=None,
        auto_class="AutoModel",
        task_type=None,
        note=f"{reason}, so 2-D weights were taken by their checkpoint names",
        all_module_names=tuple(module.name for module in modules),
        keys={tensor: tensor for tensor in tensors},
    )
