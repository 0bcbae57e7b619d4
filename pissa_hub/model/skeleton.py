"""config.json -> the transformers model without weights: its modules on the meta device, and who loads it.

Nothing is downloaded and no code of the checkpoint runs: only classes that transformers ships are built.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from pissa_hub.checkpoint.strict_json import paused_gc, shown
from pissa_hub.errors import CheckpointError

# Where several Auto classes load an architecture: the first of these, then any other, and at the very last
# AutoModelForPreTraining, which repeats much of the others.
_PREFERRED_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
)

# PEFT's wrappers for sequence and token classification and question answering are left out on purpose: they
# want a trained copy of the head in the adapter file, and raise KeyError on a bare LoRA.
_TASK_TYPES = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForTextEncoding": "FEATURE_EXTRACTION",
}

# Settings that pick a kernel, a quantiser or a backbone's weights: they may need a package or a download, and
# none of them changes the name of a module.
_IRRELEVANT_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "quantization_config",
        "use_pretrained_backbone",
    }
)


# A model without weights is still made of objects. Shared layers, activations and containers have no tensors, and a
# checkpoint may lack what another part of it repeats.
MODULES_BESIDE_TENSORS = 2000
MODULES_PER_TENSOR = 20
# Of what constructors make lists before there is a module: layers, stages, heads, labels. Not of rows of a table.
MAX_REPEATS = 100_000
_REPEATS = re.compile(r"(num|n)_.*|.*(layer|depth|block|stage|head|expert|label|group|repeat|codebook).*")
_ROWS = re.compile(r".*(position|ctx|vocab|word|embed|param|token).*")


class UnknownModelError(LookupError):
    """transformers has no class of its own for this config; the message says why, as a clause."""


@dataclass(frozen=True)
class Skeleton:
    """A transformers model whose parameters have shapes but no values.

    Attributes:
        model: a ``transformers.PreTrainedModel`` on the meta device, its weights tied as after loading.
        architecture: name of its class.
        auto_class: name in transformers of the class whose ``from_pretrained`` gives this model: an Auto
            class, or the architecture itself where no Auto class leads to it.
        task_type: the PEFT ``TaskType`` whose wrapper runs this model and loads a bare LoRA file, else None.
    """

    model: Any
    architecture: str
    auto_class: str
    task_type: str | None


def build_skeleton(config: Mapping[str, Any], tensors: int) -> Skeleton:
    """Builds the model that a config.json describes, on the meta device.

    The class is the one that an Auto class would load: ``architectures[0]`` where it belongs to the
    ``model_type``, else the ``model_type``'s class with the same kind of head, else its bare model.

    Args:
        config: the parsed file.
        tensors: that the checkpoint holds; a model with very many modules more is not its own.

    Raises:
        UnknownModelError: transformers ships no class for the config.
        CheckpointError: it is of another size than the checkpoint, and would take all memory.
        Exception: whatever transformers raises on a config that it rejects.
    """
    _refuse_excess(config, "config.json")
    most = MODULES_BESIDE_TENSORS + MODULES_PER_TENSOR * tensors
    with paused_gc(), _silent_and_offline(), _at_most(most, f"where the checkpoint holds {tensors} tensors"):
        typed = _typed_config(config)
        model_class, auto_class = _model_class(typed, _architecture(config))
        with torch.device("meta"):
            model = model_class(typed)
            model.tie_weights()  # early releases leave it to from_pretrained
    # PEFT's task wrappers pass `input_ids` on, so a model of images or sound cannot run under one.
    reads_tokens = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return Skeleton(
        model=model,
        architecture=model_class.__name__,
        auto_class=auto_class,
        task_type=_TASK_TYPES.get(auto_class) if reads_tokens else None,
    )


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _typed_config(config: Mapping[str, Any]) -> Any:
    """The config as transformers' class for its ``model_type``, or for its architecture if it has none."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, architecture = config.get("model_type"), _architecture(config)
    if model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
    elif model_type is None and architecture is not None:
        config_class = getattr(getattr(transformers, architecture, None), "config_class", None)
    else:
        config_class = None
    if config_class is None:
        name = (
            f"model_type {shown(str(model_type))}"
            if model_type is not None
            else "config.json without a known model_type"
        )
        code = "is remote code, which is never run" if config.get("auto_map") else "is unknown to transformers"
        raise UnknownModelError(f"{name} {code}")
    return config_class.from_dict(_relevant(config))


def _relevant(value: Any) -> Any:
    """A deep copy of a config value without the settings that do not bear on module names."""
    if isinstance(value, Mapping):
        return {key: _relevant(item) for key, item in value.items() if key not in _IRRELEVANT_KEYS}
    return copy.deepcopy(value)


def _model_class(config: Any, architecture: str | None) -> tuple[Any, str]:
    """The model class for a typed config, and the name of the class to load it with."""
    import transformers
    from transformers.models.auto import modeling_auto

    exact = getattr(transformers, architecture, None) if architecture else None
    if exact is not None and getattr(exact, "config_class", None) is type(config):
        return exact, _auto_class(config.model_type, exact.__name__)

    head = re.search(r"For[A-Z]\w*$", architecture or "")
    for auto_name in (f"AutoModel{head.group()}" if head else "AutoModel", "AutoModel"):
        mapping = getattr(getattr(modeling_auto, auto_name, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found, auto_name
    raise UnknownModelError(f"no class of transformers fits model_type {config.model_type!r}")


def _auto_class(model_type: str, architecture: str) -> str:
    from transformers.models.auto import modeling_auto

    def loads(name: str) -> bool:
        names_by_type = getattr(getattr(modeling_auto, name)._model_mapping, "_model_mapping", {})
        names = names_by_type.get(model_type, ())
        return architecture in ((names,) if isinstance(names, str) else names)

    others = [name for name in vars(modeling_auto) if re.match("AutoModelFor[A-Z]", name)]
    others.sort(key="AutoModelForPreTraining".__eq__)
    return next((name for name in (*_PREFERRED_AUTO_CLASSES, *others) if loads(name)), architecture)


def _refuse_excess(value: Any, name: str) -> None:
    """Raises CheckpointError for a number that would make a constructor fill the memory before it made a module."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_excess(item, str(key))
    elif isinstance(value, list):
        for item in value:
            _refuse_excess(item, name)
    elif isinstance(value, int) and value > MAX_REPEATS and _REPEATS.fullmatch(name) and not _ROWS.fullmatch(name):
        raise _excess(f"{shown(name)} is {value}")


@contextmanager
def _at_most(modules: int, reason: str) -> Iterator[None]:
    """Stops a constructor, on any thread, that makes more modules than that."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > modules:
            raise _excess(f"it describes a model of more than {modules} modules, {reason}")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _excess(fact: str) -> CheckpointError:
    return CheckpointError(f"config.json is of no model: {fact}", "give the config.json of this very checkpoint")


@contextmanager
def _silent_and_offline() -> Iterator[None]:
    """Mutes transformers and refuses the downloads (of kernels) that some constructors attempt."""
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
    try:
        logging.set_verbosity(logging.CRITICAL)
        constants.HF_HUB_OFFLINE = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        constants.HF_HUB_OFFLINE = offline
