"""Killed at any point, and killed again while it carries on, a command ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.kills import Harness, Kill, Point, Reference, Result, random_points, steps

from .inputs import COMMANDS, Inputs
from .server import Server, run_alone

SEVERAL = [("decompose", 2), ("merge", 3)]
# Command and processes that share its work.
CASES = [*((command, 1) for command in COMMANDS), *SEVERAL]


@pytest.fixture
def harness(case: tuple[str, int], server: Server, inputs: Inputs, tmp_path: Path) -> Harness:
    command, processes = case
    return Harness(server.run, inputs, command, processes, tmp_path)


@pytest.fixture
def reference(case: tuple[str, int], harness: Harness, server: Server, inputs: Inputs, tmp_path: Path) -> Reference:
    """An uninterrupted run, which leaves what one process does."""
    undisturbed, (command, _) = harness.reference(), case
    assert undisturbed.files == Harness(server.run, inputs, command, 1, tmp_path).reference().files
    return undisturbed


def what(reference: Reference, kill: Kill) -> tuple[bool, str]:
    """Whether it struck rank 0, and in what work."""
    return kill.rank == 0, reference.part(kill.operation)


def some_of_each(reference: Reference, generator: random.Random) -> list[Point]:
    """Steps of rank 0 and of another one, in a piece and in a join."""
    chosen = {}
    for point in generator.sample(steps(reference), len(steps(reference))):
        assert point.fault is not None
        chosen[what(reference, Kill(point.ranks[0], str(point.fault.at)))] = point
    return [point for (_, part), point in chosen.items() if part != "whole"]


def wrong(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.failure]


@pytest.mark.parametrize("case", [case for case in CASES if case not in SEVERAL])
def test_killed_at_some_steps_and_some_points(harness: Harness, reference: Reference, generator: random.Random) -> None:
    named = [harness.strike(point, reference) for point in generator.sample(steps(reference), 5)]
    drawn = [harness.attempt(points, reference) for points in islice(random_points(reference, generator), 5)]
    assert wrong(named + drawn) == []
    assert any(result.kills for result in drawn)


@pytest.mark.parametrize("case", SEVERAL)
def test_one_of_several_killed_in_a_piece_or_a_join(
    harness: Harness, reference: Reference, generator: random.Random
) -> None:
    """Rank 0, which stops all, or another one, whose work the others do."""
    named = [harness.strike(point, reference) for point in some_of_each(reference, generator)]
    assert wrong(named) == []
    struck = {what(reference, kill) for result in named for kill in result.kills}
    assert struck == {(leads, part) for leads in (True, False) for part in ("pieces", "joins")}


@pytest.mark.parametrize("case", SEVERAL)
def test_some_of_several_killed_at_some_points(
    harness: Harness, reference: Reference, generator: random.Random
) -> None:
    drawn = [harness.attempt(points, reference) for points in islice(random_points(reference, generator), 4)]
    assert wrong(drawn) == []
    assert any(result.kills for result in drawn)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_or_every_fifth_step_and_many_points(
    harness: Harness, reference: Reference, generator: random.Random
) -> None:
    every = 1 if len(reference.operations) == 1 else 5  # all of them take benchmarks.kills half an hour
    named = [harness.strike(point, reference) for point in steps(reference)[::every]]
    drawn = [harness.attempt(points, reference) for points in islice(random_points(reference, generator), 50)]
    assert wrong(named + drawn) == []
    assert {kill.rank for result in drawn for kill in result.kills} == set(range(len(reference.operations)))


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_run_again_from_the_command_line(
    command: str, inputs: Inputs, server: Server, tmp_path: Path, generator: random.Random
) -> None:
    """In interpreters of their own, which have nothing from a parent."""
    expected = Harness(server.run, inputs, command, 1, tmp_path).reference()
    of_a_shard = [point for point in steps(expected) if "receipt" in str(point)]
    chosen = generator.choice(of_a_shard or steps(expected))
    result = Harness(lambda run, grace: [run_alone(run)], inputs, command, 1, tmp_path).strike(chosen, expected)
    assert result.failure is None
