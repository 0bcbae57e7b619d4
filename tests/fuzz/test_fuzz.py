"""No parser breaks its contract, whatever it reads; and a parser that would is found out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pissa_hub.errors import PissaHubError

from ..helpers import ROOT
from . import contract
from .__main__ import main
from .campaign import Campaign, by_own_mutator, shrink
from .contract import ACCEPTED, REFUSED, Finding, judge
from .mutation import ODD_NUMBERS, ODD_TEXTS, join, mutate, odd_value, parts_of
from .targets import TARGETS, Target
from .world import World

EXAMPLES = 30
# Building a model takes a thousand times as long as reading a header.
FEW_EXAMPLES = {"skeleton": 4, "config": 20, "adapter": 20, "manifest": 20}
SAMPLES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
)
JSON = st.recursive(
    st.one_of(
        st.sampled_from(ODD_NUMBERS),
        st.integers().map(str),
        st.floats().map(json.dumps),
        st.sampled_from(("null", "true", "false")),
        st.one_of(st.text(), st.text(st.characters()), st.sampled_from(ODD_TEXTS)).map(json.dumps),
        st.sampled_from((10, 2000, 100_000)).map(lambda depth: "[" * depth + "]" * depth),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(st.text().map(json.dumps), inner), max_size=4).map(
            lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
        ),
    ),
    max_leaves=6,
)
"""Texts of JSON values, valid or nearly so; objects may repeat keys."""


@pytest.fixture(scope="module")
def target_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    """A target by name."""
    made: dict[str, Target] = {}

    def target(name: str) -> Target:
        if name not in made:
            made[name] = TARGETS[name].make(World(tmp_path_factory.mktemp(name)))
        return made[name]

    return target


def keeps(target: Target, data: bytes) -> None:
    verdict = judge(target.parse, data)
    assert not isinstance(verdict, Finding), f"{verdict.what}\n{verdict.detail}\n{data[:1000]!r}"


@pytest.mark.parametrize("name", TARGETS)
def test_valid_documents_are_accepted(target_of: Callable[[str], Target], name: str) -> None:
    target = target_of(name)
    verdicts = [judge(target.parse, data) for data in target.seeds]
    assert verdicts == [ACCEPTED] * len(target.seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_are_refused(target_of: Callable[[str], Target], name: str) -> None:
    assert judge(target_of(name).parse, b"") == REFUSED


@pytest.mark.parametrize("name", TARGETS)
def test_documents_with_any_value_in_any_place(target_of: Callable[[str], Target], name: str) -> None:
    target = target_of(name)

    @settings(SAMPLES, max_examples=FEW_EXAMPLES.get(name, EXAMPLES))
    @given(st.sampled_from(target.seeds), st.integers(0, 2**32), JSON)
    def check(seed: bytes, number: int, value: str) -> None:
        random = Random(number)
        keeps(target, mutate(seed, random, lambda: random.choice((value, odd_value(random)))))

    check()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "skeleton"])
def test_any_bytes(target_of: Callable[[str], Target], name: str) -> None:
    target = target_of(name)

    @settings(SAMPLES, max_examples=EXAMPLES // 2)
    @given(st.one_of(st.binary(), JSON.map(str.encode), st.text().map(str.encode)))
    def check(data: bytes) -> None:
        keeps(target, data)

    check()


def test_mutants_differ_and_follow_from_their_seed() -> None:
    data = join([b'{"a":[1,2.5,"x",null],"b":{"c":true}}', b"x = 1\n", b""])
    mutants = [mutate(data, Random(number)) for number in range(200)]
    assert mutants == [mutate(data, Random(number)) for number in range(200)]
    assert len(set(mutants)) > 150
    assert {len(mutant.split(b"\x1e")) for mutant in mutants} == {3}
    assert parts_of(data, 4)[1:] == [b"x = 1\n", b"", b""]
    parsed = [mutant for mutant in mutants if _is_json(parts_of(mutant, 3)[0])]
    assert len(parsed) > 100


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


class _UncheckedError(PissaHubError):
    """A message as it comes, its limits forgotten."""

    def __init__(self, fact: str) -> None:
        super().__init__(fact, "mend it")
        self._text = f"{fact}; mend it"

    def __str__(self) -> str:
        return self._text


def _warns(data: bytes) -> None:
    warnings.warn("odd", stacklevel=1)


def _never_ends(data: bytes) -> None:
    while True:
        try:
            json.loads(b"[1]")
        except Exception:  # what a parser must not do, and this one does
            continue


def _raises(error: BaseException) -> Callable[[bytes], None]:
    def parse(data: bytes) -> None:
        raise error

    return parse


@pytest.mark.parametrize(
    ("parse", "what"),
    [
        (_raises(RecursionError("deep")), "RecursionError"),
        (_raises(MemoryError()), "MemoryError"),
        (_raises(SystemExit(1)), "SystemExit"),
        (_raises(_UncheckedError("two\nlines")), "a message of several lines or control characters"),
        (_raises(_UncheckedError("\x1b[31mred")), "a message of several lines or control characters"),
        (_raises(_UncheckedError("x" * 3000)), "a long message"),
        (_raises(_UncheckedError("")), "a message without a fact"),
        (_warns, "UserWarning"),
    ],
)
def test_a_broken_contract_is_found(parse: Callable[[bytes], None], what: str) -> None:
    verdict = judge(parse, b"")
    assert isinstance(verdict, Finding)
    assert verdict.what.startswith(f"{what} in ")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "MAX_SECONDS", 0.1)
    verdict = judge(_never_ends, b"")
    assert isinstance(verdict, Finding)
    assert verdict.what.startswith("Hang in ")


def test_a_campaign_counts_and_shrinks() -> None:
    def parse(data: bytes) -> None:
        table = json.loads(data)
        if isinstance(table, dict) and len(table.get("a", [])) > 2:
            raise KeyError("three")

    def lenient(data: bytes) -> None:
        try:
            parse(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise PissaHubError("bad", "mend it") from error

    seeds = (b'{"a": [1], "b": "words, and more words, that do not matter at all"}',)
    report = by_own_mutator(Campaign("toy", "own", Target(seeds, lenient)), seeds, 2000, 60.0, 0)
    assert report.inputs == 2000
    assert report.accepted > 0
    assert report.refused > 0
    ((what, found),) = report.findings.items()
    assert what.startswith("KeyError in parse")
    assert len(bytes.fromhex(found)) < len(seeds[0])
    assert shrink(b"xxaxxbxx", lambda data: b"a" in data and b"b" in data) == b"ab"


@pytest.mark.slow
def test_the_long_form(tmp_path: Path) -> None:
    kept = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "tests.fuzz", "--runs", "30000", "--seconds", "20", "--seed", "1"]
    done = subprocess.run(
        [*command, "--json", str(kept), "--findings", str(tmp_path / "found")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(kept.read_bytes())["rows"]
    assert [row["target"] for row in rows] == list(TARGETS)
    assert {row["engine"] for row in rows} == {"atheris" if find_spec("atheris") else "own"}
    assert all(row["findings"] == [] for row in rows)
    assert all(row["accepted"] > 0 and row["refused"] > 0 for row in rows)


def test_an_unknown_target_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nothing"])
    assert stopped.value.code == 2
    assert "there is no target nothing" in capfd.readouterr().err
