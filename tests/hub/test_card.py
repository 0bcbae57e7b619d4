"""The model card: true figures, valid metadata, and a snippet that runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from pissa_hub import decompose

from ..conftest import SHARDED, Factory
from ..helpers import deviation, example_inputs, manifest_of, outputs_of
from ..model.zoo import JUDGES_OWN_WARNINGS

pytestmark = JUDGES_OWN_WARNINGS

COMMIT = "f" * 40


def card_of(source: Path, output: Path, **settings: Any) -> str:
    decompose(source, output, **{"rank": 4, **settings})
    return (output / "README.md").read_text()


def snippet_in(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration", "ViTModel"]
)
def test_snippet_loads_what_computes_what_the_source_computes(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    source, output = tiny_checkpoint(architecture), tmp_path / "out"
    card = card_of(source, output)
    monkeypatch.chdir(output)
    variables: dict[str, Any] = {}
    exec(snippet_in(card), variables)
    model = variables["model"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(manifest_of(output)["weights"])
    assert all(".lora_" in name for name in trainable)
    expected = outputs_of(getattr(transformers, architecture).from_pretrained(source))
    assert deviation(outputs_of(model), expected) < 1e-5
    model(**example_inputs(model.get_base_model()))[0].square().mean().backward()
    learning = [p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if name in trainable]
    assert sum(learning) > 0.9 * len(trainable)


def test_metadata_is_what_the_hub_reads(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tmp_path / "models--org--model" / "snapshots" / COMMIT
    shutil.copytree(tiny_checkpoint(shard_size=SHARDED), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\ntext")
    text = card_of(source, tmp_path / "out")
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert data.base_model == "org/model"
    assert data.license == "apache-2.0"
    assert "pissa" in data.tags
    assert f"`org/model` at commit `{COMMIT}`" in text


def test_local_source_is_not_named(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    text = card_of(source, tmp_path / "out")
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.license is None
    assert "a local checkpoint" in text
    assert source.name not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("license", ["a: b", "[x]", "'q\"", "x" * 3 + " # y", "!!python/object"])
def test_strange_licence_does_not_break_the_metadata(source: Path, tmp_path: Path, license: str) -> None:
    (source / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    data = ModelCard(card_of(source, tmp_path / "out")).data
    assert data.library_name == "transformers"
    assert data.license in (None, license.strip("'\""))


def test_figures_are_the_manifest_s(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    text = card_of(
        tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out", rank_pattern={"k_proj": 2}, exclude="v_proj"
    )
    weights = manifest_of(tmp_path / "out")["weights"]
    deviation = max(weight["reconstruction"]["relative_frobenius"] for weight in weights)
    assert f"at most {deviation:.1e}" in text
    assert f"at most {max(weight['certificate']['energy_loss'] for weight in weights):.1e}" in text
    assert "| rank | 2, 4 |" in text
    assert "`k_proj`" in text
    assert "`v_proj`" not in text
    assert "12 weights" in text
    assert "The base alone is not a usable model" in text
