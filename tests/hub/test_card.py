"""The model cards: true figures, metadata that the Hub takes, nothing that a name could break, snippets that run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from hypothesis import given
from hypothesis import strategies as st

from pissa_hub import convert, decompose, merge, restore
from pissa_hub.adapter.record import load_conversion
from pissa_hub.hub.card import lora_card
from pissa_hub.hub.card_data import code, front_matter, prose, source_metadata
from pissa_hub.hub.publish import publish

from ..conftest import SHARDED, Factory
from ..helpers import ADAPTER, ROOT, deviation, example_inputs, manifest_of, outputs_of, run_python
from ..model.zoo import JUDGES_OWN_WARNINGS
from .publishing import BASE, CARD, CLIENT_S_OWN_WARNINGS, decomposed, logged_in, put_base, trained_adapter

pytestmark = [*JUDGES_OWN_WARNINGS, *CLIENT_S_OWN_WARNINGS]

COMMIT = "f" * 40
CLIENT = int(huggingface_hub.__version__.partition(".")[0])


def card_of(source: Path, output: Path, **settings: Any) -> str:
    decompose(source, output, **{"rank": 4, **settings})
    return (output / "README.md").read_text()


def snippets_in(card: str) -> list[str]:
    found: list[str] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return found


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration", "ViTModel"]
)
def test_snippets_load_and_train_what_computes_what_the_source_computes(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    source, output = tiny_checkpoint(architecture), tmp_path / "out"
    load, train = snippets_in(card_of(source, output))
    monkeypatch.chdir(output)
    variables: dict[str, Any] = {}
    exec(load, variables)
    model = variables["model"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(manifest_of(output)["weights"])
    assert all(".lora_" in name for name in trainable)
    expected = outputs_of(getattr(transformers, architecture).from_pretrained(source))
    assert deviation(outputs_of(model), expected) < 1e-5
    exec(train, variables)
    model(**example_inputs(model.get_base_model()))[0].square().mean().backward()
    variables["optimizer"].step()
    variables["schedule"].step()
    learning = [p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if name in trainable]
    assert sum(learning) > 0.9 * len(trainable)


def test_metadata_is_what_the_hub_reads(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tmp_path / "models--org--model" / "snapshots" / COMMIT
    shutil.copytree(tiny_checkpoint(shard_size=SHARDED), source)
    (source / "README.md").write_text(CARD)
    text = card_of(source, tmp_path / "out")
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert data.base_model == "org/model"
    assert data.base_model_relation == "finetune"
    assert data.license == "apache-2.0"
    assert data.language == ["en", "no"]
    assert data.pipeline_tag == "text-generation"
    assert {"pissa", "lora", "residual"} <= set(data.tags)
    assert f"[org/model](https://huggingface.co/org/model) at commit `{COMMIT}`" in text


def test_named_licence_is_carried_over(source: Path, tmp_path: Path) -> None:
    link = "https://example.org/LICENSE"
    card = f"---\nlicense: other\nlicense_name: llama-4\nlicense_link: {link}\nlicense_details: d\ntags: [x]\n---\n"
    (source / "README.md").write_text(card)
    text = card_of(source, tmp_path / "out")
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama-4", link)
    assert data["license_details"] == "d"
    assert data["tags"] == ["pissa", "lora", "residual"]
    assert "**Built with Llama**" in text
    assert f"`other`, `llama-4` (<{link}>)" in text


def test_local_source_is_not_named(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    text = card_of(source, tmp_path / "out")
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.license is None
    assert "a local checkpoint" in text
    assert source.name not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("license", ["a: b", "[x]", "'q\"", "x" * 3 + " # y", "!!python/object", "{a: [}", "*a", "no"])
def test_strange_licence_does_not_break_the_metadata(source: Path, tmp_path: Path, license: str) -> None:
    (source / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    data = ModelCard(card_of(source, tmp_path / "out")).data
    assert data.library_name == "transformers"
    assert data.license in (None, license.strip("'\""), "xxx", ["x"])


def test_figures_are_the_manifest_s(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    text = card_of(
        tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out", rank_pattern={"k_proj": 2}, exclude="v_proj"
    )
    weights = manifest_of(tmp_path / "out")["weights"]
    deviation = max(weight["reconstruction"]["relative_frobenius"] for weight in weights)
    assert f"at most {deviation:.1e}" in text
    for figure in ("energy_loss", "sigma_error"):
        assert f"at most {max(weight['certificate'][figure] for weight in weights):.1e}" in text
    assert f"{min(weight['energy'] for weight in weights):.1%} to" in text
    assert "| rank r | 2 to 4 |" in text
    assert "`k_proj`" in text
    assert "`v_proj`" not in text
    assert "12 weights" in text
    assert "The base alone is not a usable model" in text
    assert "2404.02948" in text


def test_restore_writes_the_same_card(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "source"))
    (source / "README.md").write_text(CARD)
    text = card_of(source, tmp_path / "out")
    (tmp_path / "init" / "pissa_init").mkdir(parents=True)
    for name in ("pissa_manifest.json", ADAPTER, "pissa_init/adapter_config.json"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "init" / name)
    restore(source, tmp_path / "init", tmp_path / "restored")
    assert (tmp_path / "restored" / "README.md").read_text() == text


JUDGE = """
import json, pathlib, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.helpers import outputs_of
outputs = {}
for name, code in json.loads(pathlib.Path(sys.argv[2]).read_text()).items():
    variables = {}
    exec(code, variables)
    outputs[name] = outputs_of(variables["model"])
torch.save(outputs, sys.argv[3])
"""


def test_snippets_of_published_cards_run(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """By the ids in them, through transformers and PEFT, in a process that knows nothing but the hub's address."""
    with logged_in(tmp_path / "hub") as hub:
        original = put_base(hub, tiny_checkpoint(shard_size=SHARDED))
        folder = decomposed(original, tmp_path / "decomposed")
        adapter = trained_adapter(folder, tmp_path / "trained")
        convert(adapter, folder, tmp_path / "lora")
        merge(folder, adapter, tmp_path / "merged")
        publish(folder, "user/full")
        publish(folder, "user/full", revision="side")
        publish(folder, "user/small", adapter_only=True)
        publish(tmp_path / "lora", "user/lora")
        publish(tmp_path / "merged", "user/merged")
        base = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(original))
        trained = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        assert deviation(trained, base) > 1e-3
        places = [("full", "main"), ("full", "side"), ("small", "main"), ("lora", "main"), ("merged", "main")]
        cards = {f"{name} {branch}": hub.files(f"user/{name}", branch)["README.md"].decode() for name, branch in places}
        codes, outputs = tmp_path / "codes.json", tmp_path / "outputs.pt"
        codes.write_text(json.dumps({place: "".join(snippets_in(card)) for place, card in cards.items()}))
        ran = run_python("-c", JUDGE, ROOT, codes, outputs, **hub.environment())
        assert ran.code == 0, ran.err
        for place, found in torch.load(outputs).items():
            expected = base if place.startswith(("full", "small")) else trained
            assert deviation(found, expected) < 1e-4, place
        assert hub.token not in ran.out + ran.err + "".join(cards.values())


def test_published_cards_pass_the_client_s_validation(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    with logged_in(tmp_path / "hub") as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        convert(trained_adapter(folder, tmp_path / "trained"), folder, tmp_path / "lora")
        publish(folder, "user/full")
        publish(folder, "user/small", adapter_only=True)
        publish(tmp_path / "lora", "user/lora")
        relations = {"full": "finetune", "small": "finetune", "lora": "adapter"}
        for name, relation in relations.items():
            card = ModelCard(hub.files(f"user/{name}")["README.md"].decode())
            if CLIENT >= 2:  # an earlier one asks huggingface.co, whatever HF_ENDPOINT says
                card.validate()
            data = HfApi(endpoint=hub.endpoint).model_info(f"user/{name}").card_data
            assert data.base_model == BASE
            assert data.base_model_relation == relation
            assert data.license == "apache-2.0"
            assert data.library_name == ("peft" if name == "lora" else "transformers")
        asked = [call.status for call in hub.requests if call.path == "/api/validate-yaml"]
        assert len(asked) >= 3
        assert set(asked) == {200}
        assert "![" in hub.files("user/full")["README.md"].decode()


TEXT = st.text(st.characters(), max_size=40)


@given(TEXT, st.lists(TEXT, max_size=3), TEXT)
def test_no_metadata_breaks_the_front_matter(licence: str, language: list[str], base: str) -> None:
    readme = f"---\nlicense: {json.dumps(licence)}\nlanguage: {json.dumps(language)}\n---\n"
    metadata = source_metadata(readme.encode(errors="replace").decode())
    card = front_matter(
        library="peft", tags=["pissa"], relation="adapter", base=base, base_license=licence, metadata=metadata
    )
    data = ModelCard(card + "\n# Text\n").data.to_dict()
    assert data["library_name"] == "peft"
    assert data["tags"] == ["pissa"]
    assert data.get("base_model") in (None, base)
    assert data.get("license") in (None, licence)
    assert set(data) <= {"library_name", "tags", "base_model", "base_model_relation", "license", "language"}


@given(TEXT)
def test_no_name_ends_its_code_or_cell(name: str) -> None:
    shown = code(name)
    assert shown[0] == shown[-1] == "`"
    assert not set("`|<>\n\r\\") & set(shown[1:-1])
    assert shown[1:-1].isprintable()


def test_no_sentence_becomes_markup() -> None:
    assert prose("a <b>|[x](y)\n# `c`") == r"a \<b\>\|\[x\](y) \# \`c\`"


def test_names_in_a_card_are_harmless(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    folder = decomposed(tiny_checkpoint(), tmp_path / "out")
    adapter = trained_adapter(folder, tmp_path / "trained")
    convert(adapter, folder, tmp_path / "lora")
    record = load_conversion(tmp_path / "lora")
    text = lora_card(replace(record, base={**record.base, "repo_id": 'x"); import os #'}), "CAUSAL_LM")
    assert "import os" not in text
    assert all(line == "" or not line.startswith("<") for line in text.splitlines())
