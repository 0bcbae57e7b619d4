"""What building a model without weights must not do: allocate, download, talk, or leave switches turned."""

import gc
import warnings

import pytest
import transformers
from huggingface_hub import constants
from transformers.utils import logging

from pissa_hub.model.skeleton import UnknownModelError, build_skeleton

from .zoo import tiny_model


@pytest.fixture
def config():
    return {**tiny_model("LlamaForCausalLM").config.to_dict(), "architectures": ["LlamaForCausalLM"]}


def switches() -> tuple[bool, bool, int]:
    return gc.isenabled(), constants.HF_HUB_OFFLINE, logging.get_verbosity()


def test_all_parameters_are_on_meta(config):
    skeleton = build_skeleton(config)
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}


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
            build_skeleton(config)
    else:
        build_skeleton(config)
    assert during == [(False, True, logging.CRITICAL)]
    assert switches() == before == (True, False, before[2])
    assert capsys.readouterr().err == ""


def test_unknown_model_type():
    with pytest.raises(UnknownModelError, match="'nonesuch' is unknown to transformers"):
        build_skeleton({"model_type": "nonesuch", "architectures": ["LlamaForCausalLM"]})
