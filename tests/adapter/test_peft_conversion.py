"""PEFT's own conversion beside ours, kind by kind: where it is right the two agree, where it is not ours is right."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from pissa_hub import convert
from pissa_hub.errors import AdapterError

from ..helpers import deviation, outputs_of
from .kinds import DORA, KINDS, RANK
from .trained import OLD_PEFT, PEFTS_OWN_WARNINGS, WEIGHTS, Trained, Training, dense_updates, load

pytestmark = [pytest.mark.skipif(OLD_PEFT, reason="says what newer versions of PEFT do"), *PEFTS_OWN_WARNINGS]

RIGHT = "right"
# It converts, and the result loads and computes something else.
WRONG = "silently wrong"
# It converts, and PEFT cannot load the result.
UNLOADABLE = "does not load"

RSLORA_WITH_PATTERN = "not supported when using `rank_pattern` or `alpha_pattern`"
# What it says of an adapter with biases: it fails to load the initial one beside it, and then to delete it.
NO_ADAPTER = "Adapter initial does not exist"

# Kind -> what PEFT's conversion makes of it, or what it says when it fails.
TABLE = {
    "plain": RIGHT,
    "after steps of AdamW": RIGHT,
    "alpha": RIGHT,
    "rsLoRA": RIGHT,
    "rank_pattern": RIGHT,
    "rank_pattern and alpha": RIGHT,
    "rsLoRA and rank_pattern": RSLORA_WITH_PATTERN,
    "rsLoRA, rank_pattern and alpha": RSLORA_WITH_PATTERN,
    "listed targets": RIGHT,
    "one layer": RIGHT,
    "regex in the config": RIGHT,
    "dropout": RIGHT,
    "saved in bf16": RIGHT,
    "second adapter": RIGHT,
    "lm_head": RIGHT,
    "GPT-2": RIGHT,
    "BERT": RIGHT,
    "Qwen2": RIGHT,
    "T5": RIGHT,
    "attention of Mixtral": RIGHT,
    "LLaVA": RIGHT,
    "frozen head of a classifier": RIGHT,
    "lora_bias": "Dimension out of range",
    "lora_bias, rsLoRA and rank_pattern": RSLORA_WITH_PATTERN,
    "lora_bias of GPT-2": "Dimension out of range",
    "bias of targets of BERT": NO_ADAPTER,
    "bias of targets of Qwen2": NO_ADAPTER,
    "every bias of BERT": NO_ADAPTER,
    "every bias of GPT-2": NO_ADAPTER,
    "embedding": WRONG,
    "embedding, rsLoRA and rank_pattern": RSLORA_WITH_PATTERN,
    "embedding of another rank": WRONG,
    "embedding of GPT-2": WRONG,
    "tied embedding": WRONG,
    "embedding and output head": WRONG,
    "convolution": RIGHT,
    "whole output head": UNLOADABLE,
    "whole embedding": UNLOADABLE,
    "whole embedding tied to the head": UNLOADABLE,
    "head of Llama": UNLOADABLE,
    "head of BERT": UNLOADABLE,
    "tokens": UNLOADABLE,
    "experts of Mixtral": WRONG,
    "experts of Qwen3, rsLoRA": WRONG,
    "experts of another rank": WRONG,
    "router": RIGHT,
    "router and experts": WRONG,
    "one parameter of the experts": WRONG,
    "PEFT's": RIGHT,
    "PEFT's with rsLoRA": RIGHT,
    "PEFT's of a router": RIGHT,
}
# Random, so that the training process cannot be had again.
UNREPEATABLE = {"PEFT's by few iterations"}


def test_every_kind_is_in_the_table() -> None:
    assert TABLE.keys() == KINDS.keys() - UNREPEATABLE


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if verdict == RIGHT])
def test_where_peft_is_right_ours_is_the_same(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    theirs = pefts_conversion(done, tmp_path)
    assert deviation(outputs_of(loaded(done, theirs)), done.expected) < 1e-5
    assert ours_is_right(done, tmp_path)
    expected, found = dense_updates(theirs), dense_updates(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for module in expected:
        assert (found[module] - expected[module]).norm() < 1e-6 * expected[module].norm()


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if verdict == WRONG])
def test_where_peft_is_silently_wrong_ours_is_right(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    theirs = pefts_conversion(done, tmp_path)
    assert deviation(outputs_of(loaded(done, theirs)), done.expected) > 1e-3
    assert ours_is_right(done, tmp_path)


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if verdict == UNLOADABLE])
def test_where_pefts_result_does_not_load_ours_is_right(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    theirs = pefts_conversion(done, tmp_path)
    with pytest.raises(KeyError):
        loaded(done, theirs)
    assert ours_is_right(done, tmp_path)


@pytest.mark.parametrize("name", [name for name, verdict in TABLE.items() if verdict not in (RIGHT, WRONG, UNLOADABLE)])
def test_where_peft_fails_ours_is_right(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    with pytest.raises((ValueError, IndexError)) as failure:
        pefts_conversion(done, tmp_path)
    assert TABLE[name] in str(failure.value)
    assert ours_is_right(done, tmp_path)


def test_peft_drops_the_magnitude_of_dora_which_ours_refuses(trained: Training, tmp_path: Path) -> None:
    done = trained(DORA)
    theirs = pefts_conversion(done, tmp_path)
    assert deviation(outputs_of(loaded(done, theirs)), done.expected) > 0.1
    with pytest.raises(AdapterError, match="DoRA"):
        convert(done.adapter, done.init, tmp_path / "ours")


def test_pefts_conversion_of_a_folder_with_a_trailing_slash_fails(trained: Training, tmp_path: Path) -> None:
    done = trained(KINDS["plain"])
    shutil.copytree(done.initial, tmp_path / "initial")
    with pytest.raises(ValueError, match="Adapter  does not exist"):
        in_training(done).save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=f"{tmp_path / 'initial'}/"
        )
    convert(f"{done.adapter}/", f"{done.init}/", f"{tmp_path / 'ours'}/")


def pefts_conversion(done: Trained, folder: Path) -> Path:
    """What PEFT converts in the training process. It overwrites the initial folder's config, so that gets a copy."""
    shutil.copytree(done.initial, folder / "initial")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_training(done).save_pretrained(
            folder / "theirs", path_initial_model_for_weight_conversion=str(folder / "initial")
        )
    return folder / "theirs"


def in_training(done: Trained) -> Any:
    """The model as it was when training ended."""
    if done.base is not None:
        return load(done.base, done.adapter, done.auto_class, is_trainable=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(done.source)
    model = get_peft_model(model, LoraConfig(**{"r": RANK, "init_lora_weights": "pissa", **done.kind.decompose}))
    set_peft_model_state_dict(model, load_file(done.adapter / WEIGHTS))
    return model


def loaded(done: Trained, adapter: Path) -> Any:
    """On the original."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(done.source, adapter, done.auto_class)


def ours_is_right(done: Trained, folder: Path) -> bool:
    convert(done.adapter, done.init, folder / "ours")
    return deviation(outputs_of(load(done.source, folder / "ours", done.auto_class)), done.expected) <= 1e-5
