"""What an adapter's files say, read strictly: malformed ones are refused by name, and by no other exception."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pissa_hub.adapter.config import LoraConfig, read_config
from pissa_hub.adapter.export import lora_config
from pissa_hub.adapter.peft_files import CONVERSION_NAME, Adapter, open_adapter
from pissa_hub.adapter.record import ConversionRecord, ModuleRecord, load_conversion
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import AdapterError, HeaderError

from ..helpers import seal_again, write_record
from .trained import CONFIG, WEIGHTS

PREFIX = "base_model.model."
LEAST = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
DIGEST = FileDigest(3, "a" * 64)
RECORD = ConversionRecord(
    tool={"name": "pissa_hub", "version": "0"},
    settings={"rank": "exact", "dtype": "float32", "for": "peft"},
    adapter={WEIGHTS: DIGEST},
    init=DIGEST,
    base={"repo_id": None, "revision": None, "license": None, "files": {}, "deviation": None},
    modules=(ModuleRecord("q_proj", (8, 6), 2, 2, 0.1, 1e-8), ModuleRecord("embed", (8, 6), 2, 2, None, 0.0)),
    notes=("one",),
    files={WEIGHTS: DIGEST},
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, "LORA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias", "fan_in_fan_out"),
        *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("layers_pattern", "auto_mapping", "task_type", "base_model_name_or_path", "trainable_token_indices"),
        *("ensure_weight_tying", "use_dora", "init_lora_weights", "peft_type"),
    ]
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config_of(folder: Path, **fields: Any) -> LoraConfig:
    """The config of the least fields and these."""
    (folder / CONFIG).write_text(json.dumps({**LEAST, **fields}))
    return read_config(folder)


def adapter_of(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **fields: Any
) -> Adapter:
    """An adapter with tensors of these shapes."""
    (folder / CONFIG).write_text(json.dumps({**LEAST, **fields}))
    save_file({name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}, folder / WEIGHTS)
    return open_adapter(folder)


@contextmanager
def a_line_at_most() -> Iterator[None]:
    """A refusal is allowed, in one line."""
    lines: list[str] = []
    try:
        yield
    except (AdapterError, HeaderError) as error:
        lines = str(error).splitlines()
    assert len(lines) <= 1, lines


def pair(module: str = "q_proj", rank: int = 4) -> dict[str, tuple[int, ...]]:
    return {f"{PREFIX}{module}.lora_A.weight": (rank, 6), f"{PREFIX}{module}.lora_B.weight": (8, rank)}


def test_the_least_config(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert (config.rank, config.alpha, config.use_rslora, config.variants) == (4, 8.0, False, ())
    assert config.scaling_of("layers.0.q_proj") == 2.0
    assert config.initialisation is None
    assert config_of(tmp_path, init_lora_weights="pissa_niter_4").initialisation == "pissa_niter_4"


def test_the_first_pattern_that_matches_wins(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        use_rslora=True,
        rank_pattern={r"layers\.1\.q_proj": 16, "q_proj": 9},
        alpha_pattern={"^v_proj": 5, "k_proj|v_proj": 3},
    )
    names = ["layers.1.q_proj", "layers.2.q_proj", "xq_proj", "v_proj", "layers.0.v_proj"]
    assert [config.rank_of(name) for name in names] == [16, 9, 4, 4, 4]
    assert [config.scaling_of(name) for name in names] == [8 / 4, 8 / 3, 8 / 2, 5 / 2, 3 / 2]


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|aa)*b", r"(([a-z])+.)+[A-Z]([a-z])+", "((a*)*)*b", "(?:a|a)+$", "(.*){20}b"]
)
def test_patterns_that_never_end_are_refused(tmp_path: Path, key: str) -> None:
    """PEFT would hang on them."""
    with pytest.raises(AdapterError, match="rank_pattern"):
        config_of(tmp_path, rank_pattern={key: 2}).rank_of("a" * 200)


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        r"^model\.layers\.(0|1|12)\.self_attn\.q_proj",
        r".*\.layers\.\d+\.mlp\.(gate|up)_proj",
        r"model\.(?:language_model\.)?layers\.[0-9]+\..*",
    ],
)
def test_patterns_that_people_write_are_taken(tmp_path: Path, key: str) -> None:
    assert config_of(tmp_path, rank_pattern={key: 2}, alpha_pattern={key: 3}).rank_pattern == {key: 2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -4}, "r is -4"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"r": None}, "r is None"),
        ({"r": 10**400}, "integer of 401 digits"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -1.5}, "lora_alpha is -1.5"),
        ({"lora_alpha": 10**90}, "lora_alpha is "),
        ({"lora_alpha": [8]}, "lora_alpha is "),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": 5}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is None"),
        ({"use_rslora": "false"}, "use_rslora"),
        ({"target_parameters": 5}, "target_parameters"),
        ({"target_parameters": [5]}, "target_parameters"),
        ({"target_modules": [1, "q_proj"]}, "target_modules"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"modules_to_save": [["a"]]}, "modules_to_save"),
        ({"task_type": ["CAUSAL_LM"]}, "task_type"),
        ({"base_model_name_or_path": "\ud800"}, "not valid Unicode"),
        ({"base_model_name_or_path": "a\nb"}, "base_model_name_or_path"),
        ({"bias": 3}, "bias"),
    ],
)
def test_fields_that_no_lora_has(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        config_of(tmp_path, **fields)
    assert CONFIG in refusal.value.fact
    assert named in refusal.value.fact
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"r": 1, "r": 2}', "repeats the key 'r'"),
        (b'{"peft_type": "LORA", "rank_pattern": {"q": 1, "q": 2}}', "repeats the key 'q'"),
        (b'{"lora_alpha": NaN}', "NaN"),
        (b'{"lora_alpha": -Infinity}', "-Infinity"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999, "r": 1}', "holds 1e999"),
        (b'{"peft_type": "LORA", "lora_alpha": 1, "r": 1, "layers_pattern": 7}', "layers_pattern"),
        (b'{"peft_type": "LORA", "lora_alpha": 8}', "'r'"),
        (b'{"r": %s}' % (b"9" * 5000), CONFIG),
        (b'{"peft_type": "VERA", "r": 4}', "'VERA', not a LORA"),
        (b'{"peft_type": ["LORA"], "r": 4}', "not a LORA"),
        (b"{}", "None, not a LORA"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError) as refusal:
        read_config(tmp_path)
    assert CONFIG in refusal.value.fact
    assert named in refusal.value.fact
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("use_dora", True, "DoRA"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"x": 1}, "BD-LoRA"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("layer_replication", [[0, 1]], "layer replication"),
    ],
)
def test_variants_of_lora_are_named(tmp_path: Path, field: str, value: object, name: str) -> None:
    assert config_of(tmp_path, **{field: value}).variants == (name,)
    assert config_of(tmp_path, **{field: None}).variants == ()


@quick
@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_fields_are_read_or_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    """What is taken can be written again."""
    (tmp_path / CONFIG).write_text(json.dumps({**LEAST, **fields}))
    with a_line_at_most():
        config = read_config(tmp_path)
        assert config.rank_of("layers.0.q_proj") >= 1
        assert 0 < config.scaling_of("layers.0.q_proj") < math.inf
        assert all(isinstance(name, str) for name in config.target_parameters)
        for for_peft in (True, False):
            json.dumps(lora_config(config.table, {"q_proj": 3}, None, for_peft=for_peft), allow_nan=False)


@quick
@given(table=JSON)
def test_any_json_is_read_or_refused(tmp_path: Path, table: object) -> None:
    for name in (CONFIG, CONVERSION_NAME):
        (tmp_path / name).write_text(json.dumps(table))
    with a_line_at_most():
        read_config(tmp_path)
    with a_line_at_most():
        load_conversion(tmp_path)


NAMES = st.lists(
    st.sampled_from(
        [
            *("base_model.model.", "layers.0.", "q_proj", "experts.", "base_layer", ".lora_A", ".lora_B", ".weight"),
            *(".lora_embedding_A", ".lora_embedding_B", ".bias", ".default", ".lora_magnitude_vector", ".", "..", "/"),
            *("`", "|", "<script>", "\n", '"', "'", " ", "é", "\u2028", ".lora_ga_A"),
        ]
    ),
    max_size=6,
).map("".join)


@quick
@given(
    names=st.lists(NAMES, max_size=6, unique=True),
    shape=st.lists(st.integers(0, 8), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]),
    fields=st.dictionaries(FIELDS, JSON, max_size=1),
)
def test_any_names_are_read_or_refused(
    tmp_path: Path, names: list[str], shape: list[int], dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    """A name that is taken stands on one line and quotes nothing."""
    with a_line_at_most():
        adapter = adapter_of(tmp_path, dict.fromkeys(names, tuple(shape)), dtype, **fields)
        assert not {*"`|<>\"' \n"} & {*"".join(adapter.modules)}


def test_modules_of_every_naming(tmp_path: Path) -> None:
    adapter = adapter_of(
        tmp_path,
        {
            **pair("q_proj"),
            "v_proj.lora_A.default.weight": (4, 6),
            "v_proj.lora_B.default.weight": (8, 4),
            f"{PREFIX}q_proj.lora_B.bias": (8,),
            f"{PREFIX}embed.lora_embedding_A": (4, 50),
            f"{PREFIX}embed.lora_embedding_B": (8, 4),
            f"{PREFIX}embed.base_layer.weight": (50, 8),
            f"{PREFIX}score.weight": (2, 8),
        },
    )
    assert list(adapter.modules) == ["embed", "q_proj", "v_proj"]
    assert [module.is_embedding for module in adapter.modules.values()] == [True, False, False]
    assert [module.bias is not None for module in adapter.modules.values()] == [False, True, False]
    assert adapter.saved == {f"{PREFIX}score.weight": "score.weight"}
    assert adapter.base_weights == (f"{PREFIX}embed.base_layer.weight",)
    assert {module.scaling for module in adapter.modules.values()} == {2.0}


BAD_TENSORS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "A without B": ({f"{PREFIX}q_proj.lora_A.weight": (4, 6)}, {}, "lacks lora_B of q_proj"),
    "B without A": ({f"{PREFIX}q_proj.lora_B.weight": (8, 4)}, {}, "lacks lora_A of q_proj"),
    "a bias alone": ({**pair(), f"{PREFIX}k.lora_B.bias": (8,)}, {}, "k"),
    "no factors": ({f"{PREFIX}score.weight": (2, 8)}, {}, "holds no lora_A"),
    "twice": ({**pair(), "q_proj.lora_A.weight": (4, 6), "q_proj.lora_B.weight": (8, 4)}, {}, "q_proj twice"),
    "a whole weight twice": (
        {**pair(), "score.weight": (2, 8), f"{PREFIX}score.weight": (2, 8)},
        {},
        "score.weight twice",
    ),
    "another rank": (pair(rank=3), {}, "rank 4"),
    "a huge rank": (pair(), {"r": 2**20}, f"rank {2**20}"),
    "a multiple of the rank": (pair(rank=8), {}, "rank 4"),
    "other inner sizes": (
        {f"{PREFIX}q_proj.lora_A.weight": (4, 6), f"{PREFIX}q_proj.lora_B.weight": (8, 5)},
        {},
        "rank 4",
    ),
    "a shard": ({f"{PREFIX}q_proj.lora_A.weight": (24,), f"{PREFIX}q_proj.lora_B.weight": (32,)}, {}, "gathered"),
    "nothing in it": (
        {f"{PREFIX}q_proj.lora_A.weight": (4, 0), f"{PREFIX}q_proj.lora_B.weight": (8, 4)},
        {},
        "gathered",
    ),
    "a bias of another length": ({**pair(), f"{PREFIX}q_proj.lora_B.bias": (5,)}, {}, "bias"),
    "another kind of adapter": ({**pair(), f"{PREFIX}q_proj.lora_ga_A.weight": (4, 6)}, {}, "lora_ga_A"),
    "backticks in a name": (pair("a`b"), {}, "a`b"),
    "a table's bar in a name": (pair("a|b"), {}, "a|b"),
    "HTML in a name": (pair("<img/src=x>"), {}, "<img/src=x>"),
    "blanks in a name": (pair("q proj"), {}, "q proj"),
    "a folder above in a name": (pair("../../etc/q_proj"), {}, "../../etc/q_proj"),
    "HTML in a whole weight's name": ({**pair(), "<b>.weight": (2, 2)}, {}, "<b>"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_are_no_adapter(tmp_path: Path, case: str) -> None:
    shapes, fields, named = BAD_TENSORS[case]
    with pytest.raises(AdapterError) as refusal:
        adapter_of(tmp_path, shapes, **fields)
    assert WEIGHTS in refusal.value.fact
    assert named in refusal.value.fact
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_factors_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(AdapterError, match=r"q_proj.*stored as"):
        adapter_of(tmp_path, pair(), dtype)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / CONVERSION_NAME).write_bytes(RECORD.to_bytes())
    assert load_conversion(tmp_path) == RECORD


PLACES = st.sampled_from(
    [
        *([name] for name in ("tool", "settings", "adapter", "init", "base", "modules", "notes", "files", "version")),
        *(["modules", 0, name] for name in ("module", "shape", "rank", "exact_rank", "update", "error")),
        *(["modules", 0], ["modules", 0, "shape", 0], ["files", WEIGHTS], ["init", "size"], ["init", "sha256"]),
        *(["base", name] for name in ("repo_id", "deviation")),
    ]
)


@quick
@given(place=PLACES, value=JSON | st.just(math.inf))
def test_any_record_is_read_or_refused(tmp_path: Path, place: list[Any], value: object) -> None:
    """What is taken can be shown."""
    table = json.loads(RECORD.to_bytes())
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / CONVERSION_NAME).write_text(json.dumps(table, indent=1).replace("Infinity", "1e999") + "\n")
    seal_again(tmp_path / CONVERSION_NAME)
    with a_line_at_most():
        record = load_conversion(tmp_path)
        assert record.largest_error >= 0
        assert all(isinstance(digest.size, int) for digest in record.files.values())
        assert record.base["repo_id"] is None or isinstance(record.base["repo_id"], str)


@pytest.mark.parametrize(
    ("field", "value"),
    [("error", "small"), ("error", -1.0), ("update", [1]), ("rank", 2.5), ("exact_rank", -1), ("shape", [8])],
)
def test_figures_that_are_none(tmp_path: Path, field: str, value: object) -> None:
    table = json.loads(RECORD.to_bytes())
    table["modules"][0][field] = value
    write_record(tmp_path / CONVERSION_NAME, table)
    with pytest.raises(AdapterError, match="figures of a module"):
        load_conversion(tmp_path)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        *(("base", "deviation", value) for value in ("near", [], -1.0, True)),
        *(("settings", field, value) for field in ("dtype", "for") for value in (None, 7)),
    ],
)
def test_what_a_card_could_not_say(tmp_path: Path, part: str, field: str, value: object) -> None:
    table = json.loads(RECORD.to_bytes())
    for spoiled in ({**table[part], field: value}, {key: table[part][key] for key in table[part] if key != field}):
        write_record(tmp_path / CONVERSION_NAME, {**table, part: spoiled})
        with pytest.raises(AdapterError, match=f"has (a )?{part} that (is|are) none|lacks fields"):
            load_conversion(tmp_path)


def test_a_record_of_the_future(tmp_path: Path) -> None:
    table = json.loads(RECORD.to_bytes())
    write_record(tmp_path / CONVERSION_NAME, {**table, "version": 2})
    with pytest.raises(AdapterError, match="another version"):
        load_conversion(tmp_path)
