"""Hostile config.json files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import PLAN, Attack, edit_json, named, sparse

_BY_NAME = "so 2-D weights were taken by their checkpoint names"
_OF_NO_MODEL = "config.json is of no model"


def fields(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "source" / "config.json", lambda table: table.update(changes))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "source" / "config.json").write_bytes(data)


def _remote_code(folder: Path) -> None:
    """Code that would leave a file behind."""
    fields(model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})(
        folder
    )
    (folder / "source" / "evil.py").write_text("import pathlib\npathlib.Path('executed').touch()\nclass Evil: ...\n")


_REFUSED = {
    "10^9 layers": ("'num_hidden_layers' is 1000000000", fields(num_hidden_layers=10**9)),
    "100,000 layers": ("a model of more than", fields(num_hidden_layers=100_000)),
    "10^9 labels": ("'num_labels' is 1000000000", fields(num_labels=10**9)),
    "10^9 layers below": ("'n_layer' is 1000000000", fields(text_config={"n_layer": 10**9})),
    "10^9 blocks in a list": ("'depths' is 1000000000", fields(model_type="swin", depths=[2, 10**9])),
    "nested 100,000 deep": ("nested too deeply", content(b'{"a":' * 100_000)),
    "a list": ("is not a JSON object", content(b"[]")),
    "no JSON": ("is not valid JSON", content(b"__import__('os').system('id')")),
    "not UTF-8": ("is not UTF-8", content(b'{"a": "\xff"}')),
    "half a character": ("half of a surrogate pair", fields(name="\udfff")),
    "10^400 tokens": ("holds an integer of 401 digits", fields(vocab_size=10**400)),
    "half a million values": ("holds more than 500000 values", content(b'{"a":[' + b"[]," * 300_000 + b"[]]}")),
    "100 MB, sparse": (
        "is larger than 16777216 bytes",
        lambda folder: sparse(folder / "source" / "config.json", b"{", 100_000_000),
    ),
}
_HARMLESS = {
    "remote code": ("is remote code, which is never run", _remote_code),
    "remote code for a known model": (
        "model     LlamaForCausalLM",
        fields(auto_map={"AutoModelForCausalLM": "os--system.id"}, custom_pipelines={"x": {"impl": "evil.Evil"}}),
    ),
    "10^18 tokens": (_BY_NAME, fields(vocab_size=10**18)),
    "negative sizes": (_BY_NAME, fields(hidden_size=-16)),
    "sizes that are words": (_BY_NAME, fields(hidden_size="sixteen")),
    "no heads": (_BY_NAME, fields(num_attention_heads=0, head_dim=None)),
    "sizes that are NaN": (_BY_NAME, fields(hidden_size=float("nan"))),
    "nested 900 deep": ("weights", content(b'{"a":' * 900 + b"1" + b"}" * 900)),
    "a path for a model": (_BY_NAME, fields(model_type="../../etc/passwd")),
    "a model type of a megabyte": (_BY_NAME, fields(model_type="x" * 1_000_000)),
    "escapes in the model type": (_BY_NAME, fields(model_type="\x1b[2J\nerror: all is well")),
    "a list for a model": (_BY_NAME, fields(model_type=["llama"])),
    "architecture os.system": ("weights", fields(architectures=["os.system"])),
    "architecture with an underscore": (_BY_NAME, fields(model_type=None, architectures=["__class__"])),
    "another class": ("weights", fields(__class__="Evil", __init__="evil", to_dict=1, get_text_config="x")),
    "kernels of a stranger": (
        "model     LlamaForCausalLM",
        fields(_attn_implementation="evil/kernels", _attn_implementation_internal="evil/kernels"),
    ),
    "a quantiser of a stranger": (
        "model     LlamaForCausalLM",
        fields(quantization_config={"quant_method": "evil", "modules_to_not_convert": ["x"] * 1000}),
    ),
    "a tokenizer of a stranger": ("model     LlamaForCausalLM", fields(tokenizer_class="os.system")),
}

ATTACKS: tuple[Attack, ...] = (
    *named("config", _REFUSED, PLAN),
    *(Attack(f"config: {name}", PLAN, line, spoil, code=0) for name, (line, spoil) in _HARMLESS.items()),
)
