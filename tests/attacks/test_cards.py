"""What a stranger's model card, licence and names come to in ours: inert text, and metadata as intended."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from pissa_hub.checkpoint.ancillary import declared_license
from pissa_hub.hub.card_data import carried_metadata, code, front_matter, prose, source_metadata

from ..helpers import run_cli
from .sound import write_source

Capture = pytest.CaptureFixture[str]

INTENDED = {"library_name", "tags", "base_model", "base_model_relation", "license", "language", "pipeline_tag"}
BREAKOUTS = [
    "---\nlicense: mit\n---\n",
    "--- !!python/object/apply:os.system [id]",
    "!!python/object/apply:os.system ['touch executed']",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "![a](https://example.org/x.png)",
    "</code>`` `<b>",
    "| a | b |\n|---|---|",
    "\x1b[2J\x1b]0;x\x07",
    "\u202egpj.exe",
    "a\r\n# b",
    "x" * 100_000,
    "{{ config }} ${jndi:ldap://x}",
    "*a",
    "&a b",
]


def card_of(folder: Path, text: str, capfd: Capture) -> tuple[str, dict[str, object]]:
    """The card, and its metadata, of a decomposition of a model with this card."""
    write_source(folder / "source")
    (folder / "source" / "README.md").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert run_cli(capfd, "decompose", folder / "source", "-o", folder / "out", "--rank", 2).code == 0
    card = (folder / "out" / "README.md").read_bytes().decode()
    _, metadata, body = card.split("---\n", 2)
    return body, yaml.safe_load(metadata)


@pytest.mark.parametrize("hostile", BREAKOUTS)
def test_a_hostile_card(hostile: str, tmp_path: Path, capfd: Capture) -> None:
    as_text = json.dumps(hostile)
    body, metadata = card_of(
        tmp_path,
        f"---\nlicense: other\nlicense_name: {as_text}\nlicense_link: {as_text}\nlanguage: [en, {as_text}]\n"
        f"pipeline_tag: {as_text}\n{as_text}: 1\nlicense_{'y' * 2000}: x\nbase_model: {as_text}\nwidget: {as_text}\n"
        f"---\n# {hostile}\n",
        capfd,
    )
    assert metadata.keys() - {"license_name", "license_link"} <= INTENDED
    assert metadata["license"] == "other"
    assert metadata["library_name"] == "transformers"
    for key in ("license_name", "license_link", "pipeline_tag"):
        assert metadata.get(key, hostile) == hostile
    assert "base_model" not in metadata
    _is_inert(body)


@pytest.mark.parametrize(
    "yaml_text",
    [
        "license: !!python/object/apply:os.system ['touch executed']",
        "license: &a [mit]\nlanguage: *a",
        "\n".join(["a0: &a0 {license: mit}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))]),
        "\n".join(["a0: &a0 [mit]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)), "license: *a59"]),
        "license: " + "[" * 5000,
        "license: " + "{a: " * 5000,
        "? " * 5000,
        "license: " + "1:" * 20_000 + "1",
        "license: " + "9" * 60_000,
        "license: 2024-99-99",
        "license: .nan",
        "license: {mit: mit}",
        "? license\n: [[mit]]",
        "license: mit\nlicense: [a, {b: c}]",
        "%YAML 9.9\nlicense: mit",
        "license: \ufeffmit",
        'license: "mi\\u0000t"',
    ],
)
def test_hostile_yaml_names_no_licence(yaml_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = source_metadata(f"---\n{yaml_text}\n---\n# Model\n")
    assert metadata == {}
    assert not Path("executed").exists()
    front = front_matter(
        library="transformers", tags=[], relation="finetune", base=None, base_license=None, metadata=metadata
    )
    assert yaml.safe_load(front.strip("-")) == {"library_name": "transformers", "tags": []}


def test_a_plain_card_is_read() -> None:
    text = "---\nlicense: other\nlicense_name: llama3\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n---\n"
    assert source_metadata(text) == {
        "license": "other",
        "license_name": "llama3",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }
    assert declared_license("---\nlicense: mit\n---\n") == "mit"


@pytest.mark.parametrize("hostile", BREAKOUTS)
def test_names_and_sentences_in_a_card(hostile: str) -> None:
    inner = code(hostile)[1:-1]
    assert code(hostile) == f"`{inner}`"
    assert inner
    assert not set(inner) & set("`<>|\n\r[]!&{}")
    assert len(inner) <= 200
    sentence = prose(hostile)
    assert sentence.isprintable()
    assert not re.search(r"(?<!\\)[<>`\[\]|#!*]", sentence)


@pytest.mark.parametrize("hostile", BREAKOUTS)
def test_metadata_survive_yaml(hostile: str) -> None:
    metadata = carried_metadata({"license_name": hostile, "language": [hostile, "en"], hostile: "x"})
    front = front_matter(
        library="peft", tags=["lora"], relation="adapter", base=hostile, base_license=hostile, metadata=metadata
    )
    assert front.splitlines()[0] == front.splitlines()[-1] == "---"
    assert yaml.safe_load(front.strip("-")) == {"library_name": "peft", "tags": ["lora"], **metadata}


def _is_inert(body: str) -> None:
    """No HTML, no picture, no link but ours, nothing for a terminal."""
    text = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert all(line.isprintable() for line in body.split("\n"))
    assert not re.search(r"<(?!https://)", text)
    assert "![" not in text
    links = re.findall(r"\]\(([^)]*)\)|<(https://[^>]*)>", text)
    assert {"".join(link) for link in links} <= {"https://arxiv.org/abs/2404.02948"}
