"""What building a model without weights must not do: allocate, download, talk, or leave switches turned."""

import gc
import warnings

import pytest
import transformers
from huggingface_hub import constants
from transformers.utils import logging

from pissa_hub.errors import CheckpointError
from pissa_hub.model import skeleton
from pissa_hub.model.skeleton import UnknownModelError, build_skeleton

from .zoo import tiny_model


@pytest.fixture
def config():
    return {**tiny_model("LlamaForCausalLM").config.to_dict(), "architectures": ["LlamaForCausalLM"]}


def switches() -> tuple[bool, bool, int]:
    return gc.isenabled(), constants.HF_HUB_OFFLINE, logging.get_verbosity()


def test_all_parameters_are_on_meta(config):
    built = build_skeleton(config, 100)
    assert {parameter.device.type for parameter in built.model.parameters()} == {"meta"}


@pytest.mark.parametrize("fails", [False, True])
def test_silent_and_offline_while_building_and_only_then(config, fails, monkeypatch, capsys):
    original, during = transformers.LlamaForCausalLM.__init__, []

    def watched(model, *args):
        during.append(switches())
        warnings.warn("from a constructor", stacklevel=1)
        logging.get_logger("transformers.watched").error("from a constructor")
        if fails:
            raise ValueError("no such model")
        original(model, *args)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", watched)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = switches()
    if fails:
        with pytest.raises(ValueError, match="no such model"):
            build_skeleton(config, 100)
    else:
        build_skeleton(config, 100)
    assert during == [(False, True, logging.CRITICAL)]
    assert switches() == before == (True, False, before[2])
    assert capsys.readouterr().err == ""


def test_unknown_model_type():
    with pytest.raises(UnknownModelError, match="'nonesuch' is unknown to transformers"):
        build_skeleton({"model_type": "nonesuch", "architectures": ["LlamaForCausalLM"]}, 100)


def test_a_config_of_another_size_is_refused_before_it_fills_the_memory(config):
    with pytest.raises(CheckpointError, match="'num_hidden_layers' is 1000000000"):
        build_skeleton({**config, "num_hidden_layers": 10**9}, 100)
    with pytest.raises(CheckpointError, match="a model of more than 4000 modules, where the checkpoint holds 100"):
        build_skeleton({**config, "num_hidden_layers": 10**5}, 100)
    assert build_skeleton({**config, "max_position_embeddings": 10**9, "vocab_size": 10**6}, 1).task_type == "CAUSAL_LM"


def test_a_deep_model_is_far_from_the_bound(config):
    deep = build_skeleton({**config, "num_hidden_layers": 100}, 100 * 9)
    assert len(list(deep.model.modules())) < (skeleton.MODULES_BESIDE_TENSORS + skeleton.MODULES_PER_TENSOR * 900) / 4
