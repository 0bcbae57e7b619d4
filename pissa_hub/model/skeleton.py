"""config.json -> the transformers model without weights: its modules on the meta device, and who loads it.

Nothing is downloaded and no code of the checkpoint runs: only classes that transformers ships are built.
"""

import copy
import gc
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

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
        "_experts_implementation",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "quantization_config",
        "use_pretrained_backbone",
    }
)


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


def build_skeleton(config: Mapping[str, Any]) -> Skeleton:
    """Builds the model that a config.json describes, on the meta device.

    The class is the one that an Auto class would load: ``architectures[0]`` where it belongs to the
    ``model_type``, else the ``model_type``'s class with the same kind of head, else its bare model.

    Raises:
        UnknownModelError: transformers ships no class for the config.
        Exception: whatever transformers raises on a config that it rejects.
    """
    with _paused_gc(), _silent_and_offline():
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
        name = f"model_type {model_type!r}" if model_type is not None else "config.json without a known model_type"
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


@contextmanager
def _paused_gc() -> Iterator[None]:
    """Importing transformers makes many long-lived objects; collecting meanwhile is a third of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
