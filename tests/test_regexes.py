"""Regexes of strangers: what is taken matches as PEFT matches it, and what may take for ever is not taken."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pissa_hub.regexes import MAX_REGEXES, PathPatterns, require_harmless

KEYS = [
    "q_proj",
    r"1\.q_proj",
    "1.q_proj",
    r"layers\.1\.q_proj",
    "^layers.*",
    r".*\.(q|k)_proj",
    "k_proj|v_proj",
    "proj",
    "",
]
PATHS = st.lists(st.sampled_from(["layers", "0", "1", "q_proj", "k_proj", "xq_proj"]), min_size=1, max_size=4).map(
    ".".join
)


@settings(deadline=None)
@given(keys=st.permutations(KEYS), path=PATHS)
def test_values_are_found_as_peft_finds_them(keys: list[str], path: str) -> None:
    values = {key: float(number) for number, key in enumerate(keys)}
    expected = next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", path)), -1.0)
    assert PathPatterns(values, "rank_pattern").find(path, -1.0) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a|aa)*b", "(?:a|a)+$", "(.*){20}b", ".*.*.*.*x", "a?" * 30, "(a.|a.|a.|a.|a.)" * 8, "a" * 1001),
        *("(", "[", "a{99999999999}", "(?P<a>)(?P<a>)", "[[a]", r"\q"),
    ],
)
def test_a_pattern_that_is_none_or_may_take_for_ever(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"may take for ever|is no regex"):
        require_harmless(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"^model\.layers\.(0|1|12)\.self_attn\.q_proj",
        r".*\.layers\.\d+\.mlp\.(gate|up)_proj",
        rf"layers\.({'|'.join(map(str, range(80)))})\.(q|v)_proj",
        r"(?!.*vision).*\.(q|k|v|o)_proj",
    ],
)
def test_patterns_that_people_write_are_taken(pattern: str) -> None:
    require_harmless(pattern)
    patterns = PathPatterns({pattern: 2}, "rank_pattern")
    patterns.require_affordable(f"model.layers.{number}.self_attn.q_proj" for number in range(200))


def test_names_cost_nothing_and_regexes_have_a_bound() -> None:
    names = [f"model.layers.{number}.mlp.experts.{number % 7}.up_proj" for number in range(20_000)]
    patterns = PathPatterns({re.escape(name): number for number, name in enumerate(names)}, "rank_pattern")
    patterns.require_affordable(names)
    assert [patterns.find(name, -1) for name in names] == list(range(20_000))
    with pytest.raises(ValueError, match=f"rank_pattern has more than {MAX_REGEXES} regexes"):
        PathPatterns({f"{number}.(q|k)_proj": 1 for number in range(MAX_REGEXES + 1)}, "rank_pattern")
    with pytest.raises(ValueError, match="may take for ever"):
        PathPatterns({".*.*.*x": 1}, "rank_pattern").require_affordable(names)
