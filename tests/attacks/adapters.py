"""Hostile adapters."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .case import CONVERT, MERGE, Attack, edit_json, named, replaced, sparse, store, tensor
from .headers import _Marker
from .sound import CONFIG, LORA_A, LORA_B, Q_PROJ, WEIGHTS

_REGEX = "may take for ever to match"
_MODULES = 2000


def fields(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter" / CONFIG, lambda table: table.update(changes))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter" / CONFIG).write_bytes(data)


def file(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: replaced(folder / "adapter" / name, make)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter" / WEIGHTS
        table = load_file(path)
        change(table)
        save_file(table, path, {"format": "pt"})

    return spoil


def factor(name: str, value: Tensor) -> Callable[[Path], None]:
    return tensors(lambda table: table.update({name: value}))


def _poisoned(name: str, value: float) -> Callable[[Path], None]:
    return tensors(lambda table: table[name].view(-1)[:1].fill_(value))


def _extra(name: str) -> Callable[[Path], None]:
    """One more tensor under a name."""
    return factor(name, torch.zeros(2, 2))


def _pickle_only(folder: Path) -> None:
    (folder / "adapter" / WEIGHTS).unlink()
    (folder / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(_Marker()))


def _crowd(**changes: Any) -> Callable[[Path], None]:
    """Thousands of modules, each with a path as long as it may be."""

    def spoil(folder: Path) -> None:
        names = [f"{'a.' * 80}{number}.q_proj" for number in range(_MODULES)]
        keys: Iterable[str] = (f"base_model.model.{name}.lora_{side}.weight" for name in names for side in "AB")
        store(
            folder / "adapter" / WEIGHTS,
            {key: tensor(4 * place, 4 * place + 4, "F32", [1, 1]) for place, key in enumerate(keys)},
            bytes(8 * _MODULES),
        )
        fields(r=1, **changes)(folder)

    return spoil


_MANY = {f"{'b.' * 50}{number}.(q|k)_proj": 2 for number in range(5000)}
_LISTED = dict(list(_MANY.items())[:900])


def _ghost(folder: Path) -> None:
    def add(table: dict[str, Tensor]) -> None:
        table |= {name.replace(Q_PROJ, "ghost"): table[name].clone() for name in (LORA_A, LORA_B)}

    tensors(add)(folder)


_CASES = {
    "pickle alone": ("a pickle, which is never opened", _pickle_only),
    "weights are a pipe": ("has no adapter_model.safetensors", file(WEIGHTS, lambda path: os.mkfifo(path))),
    "config is a pipe": ("has no adapter_config.json", file(CONFIG, lambda path: os.mkfifo(path))),
    "config is a device": ("has no adapter_config.json", file(CONFIG, lambda path: path.symlink_to("/dev/zero"))),
    "config of 100 MB, sparse": (
        "is larger than 16777216 bytes",
        file(CONFIG, lambda path: sparse(path, b"{", 100_000_000)),
    ),
    "config nested 100,000 deep": ("nested too deeply", content(b'{"r":' * 100_000)),
    "config with a key twice": ("repeats the key 'r'", content(b'{"peft_type":"LORA","r":2,"r":3}')),
    "config that is a list": ("is not a JSON object", content(b"[]")),
    "config of half a million values": (
        "holds more than 500000 values",
        content(b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
    ),
    "r = 0": ("r is 0", fields(r=0)),
    "r = -1": ("r is -1", fields(r=-1)),
    "r = 10^9": ("says rank 1000000000", fields(r=10**9)),
    "r = 10^400": ("integer of 401 digits", fields(r=10**400)),
    "r = NaN": ("holds NaN", fields(r=float("nan"))),
    "r that is a word": ("r is '2'", fields(r="2")),
    "r that is true": ("r is True", fields(r=True)),
    "alpha = Infinity": ("holds Infinity", fields(lora_alpha=float("inf"))),
    "alpha = 1e-300": ("lora_alpha is 1e-300", fields(lora_alpha=1e-300)),
    "another method": ("not a LORA", fields(peft_type="LOHA")),
    "a method of a megabyte": ("not a LORA", fields(peft_type="X" * 1_000_000)),
    "a method with escapes": ("not a LORA", fields(peft_type="\x1b[2J\nLORA")),
    "nested groups in a pattern": (_REGEX, fields(rank_pattern={"(([a-z_.0-9])+)+X": 3})),
    "repeated choices in a pattern": (_REGEX, fields(alpha_pattern={"(a|aa)*b": 3})),
    "many wildcards in a pattern": (_REGEX, fields(rank_pattern={".*.*.*.*.*x": 3})),
    "many choices in a pattern": (_REGEX, fields(rank_pattern={"(a.|a.|a.|a.|a.|a.|a.|a.)" * 8: 3})),
    "many may-be's in a pattern": (_REGEX, fields(rank_pattern={"a?" * 30 + "a" * 30: 3})),
    "a pattern of a megabyte": (_REGEX, fields(rank_pattern={f"({'a' * 1_000_000})": 3})),
    "a pattern that counts to 2^32": ("of rank_pattern", fields(rank_pattern={"a{4294967296}": 3})),
    "a pattern that is none": ("is no regex", fields(rank_pattern={"(": 3})),
    "5000 patterns": ("has more than 1000 regexes", fields(rank_pattern=_MANY)),
    "patterns times modules": (_REGEX, _crowd(rank_pattern=_LISTED)),
    "wildcards times modules": (_REGEX, _crowd(rank_pattern={".*.*.*z": 3})),
    "parameters times modules": ("target_parameters has more than", _crowd(target_parameters=["a.b"] * 100_000)),
    "a line break in the base's name": ("base_model_name_or_path", fields(base_model_name_or_path="a\n# b")),
    "a list for the base's name": ("base_model_name_or_path", fields(base_model_name_or_path=["a"])),
    "a task that is code": ("task_type", fields(task_type={"__reduce__": "os.system"})),
    "an auto_mapping that is a list": ("auto_mapping", fields(auto_mapping=["os", "system"])),
    "a module that does not exist": (
        "lacks lora_B of ghost",
        tensors(lambda table: table.update({LORA_A.replace(Q_PROJ, "ghost"): table[LORA_A].clone()})),
    ),
    "NaN in A": ("holds NaN or infinity", _poisoned(LORA_A, float("nan"))),
    "infinity in B": ("holds NaN or infinity", _poisoned(LORA_B, float("inf"))),
    "A of another rank": ("where adapter_config.json says rank 2", factor(LORA_A, torch.zeros(3, 16))),
    "A of another width": ("has A [2, 17]", factor(LORA_A, torch.zeros(2, 17))),
    "A without columns": ("of shape [2, 0]", factor(LORA_A, torch.zeros(2, 0))),
    "A that is a number": ("of shape []", factor(LORA_A, torch.zeros(()))),
    "A of integers": ("is stored as I64", factor(LORA_A, torch.zeros(2, 16, dtype=torch.int64))),
    "A of complex numbers": ("is stored as C64", factor(LORA_A, torch.zeros(2, 16, dtype=torch.complex64))),
    "A of a terabyte": (
        "is truncated",
        lambda folder: store(
            folder / "adapter" / WEIGHTS,
            {LORA_A: tensor(0, 2**40, "F32", [2, 2**37]), LORA_B: tensor(2**40, 2**40 + 128, "F32", [16, 2])},
        ),
    ),
    "HTML in a name": ("which is no parameter's path", _extra("base_model.model.<script>.lora_A.weight")),
    "a folder above in a name": ("which is no parameter's path", _extra("base_model.model.../../x.lora_A.weight")),
    "Markdown in a name": ("which is no parameter's path", _extra("base_model.model.[a](b).lora_A.weight")),
    "a name of 10,000 characters": ("has a name that is", _extra(f"base_model.model.{'a' * 10_000}.lora_A.weight")),
    "factors twice": ("twice", _extra(LORA_A.replace("lora_A", "lora_A.default"))),
}
_HARMLESS = {
    "remote code": fields(auto_mapping={"base_model_class": "Evil", "parent_library": "os"}),
    "corda's pickles": fields(corda_config={"cache_file": "/etc/passwd", "covariance_file": "x.pt"}, eva_config={}),
    "a regex bomb in target_modules": fields(target_modules="(a|aa)*(.*.*.*)*b"),
    "a path for the base": fields(base_model_name_or_path="../../../../etc/passwd"),
    "HTML for the base": fields(base_model_name_or_path="<img src=x onerror=alert(1)>"),
    "a link for the base": fields(base_model_name_or_path="[a](https://example.org)"),
}

ATTACKS: tuple[Attack, ...] = (
    *named("adapter", _CASES, CONVERT),
    Attack("merged adapter: a module that does not exist", MERGE, "ghost", _ghost),
    Attack("merged adapter: a pickle alone", MERGE, "a pickle, which is never opened", _pickle_only),
    Attack("merged adapter: NaN", MERGE, "holds NaN or infinity", _poisoned(LORA_B, float("nan"))),
    Attack("merged adapter: a regex bomb", MERGE, _REGEX, fields(rank_pattern={"(a|aa)*b": 3})),
    *(
        Attack(f"adapter: {name}", CONVERT, "adapter -> out", spoil, code=0, writes=True)
        for name, spoil in _HARMLESS.items()
    ),
)
