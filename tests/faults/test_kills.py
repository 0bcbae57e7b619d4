"""Killed at any point, and killed again while it carries on, a command ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.kills import Harness, Reference, random_points, steps

from .inputs import COMMANDS, Inputs
from .server import Server, run_alone

# Command and processes that share its work.
CASES = [*((command, 1) for command in COMMANDS), ("decompose", 2), ("merge", 3)]


@pytest.fixture
def harness(case: tuple[str, int], server: Server, inputs: Inputs, tmp_path: Path) -> Harness:
    command, processes = case
    return Harness(server.run, inputs, command, processes, tmp_path)


@pytest.fixture
def reference(case: tuple[str, int], harness: Harness, server: Server, inputs: Inputs, tmp_path: Path) -> Reference:
    """An uninterrupted run of one process, as long as it takes them all."""
    command, _ = case
    return replace(Harness(server.run, inputs, command, 1, tmp_path).reference(), seconds=harness.reference().seconds)


@pytest.mark.parametrize("case", CASES)
def test_killed_at_some_steps_and_some_points(
    case: tuple[str, int], harness: Harness, reference: Reference, generator: random.Random
) -> None:
    _, processes = case
    chosen = [[point] for point in generator.sample(steps(reference, processes), 5)]
    results = [harness.attempt(points, reference) for points in chosen]
    drawn = random_points(reference, processes, generator)
    results += [harness.attempt(points, reference) for points in islice(drawn, 5)]
    assert [result for result in results if result.failure] == []
    struck = [result.kills for result in results[:5]]
    assert all(struck) if processes == 1 else any(struck)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_step_and_many_points(
    case: tuple[str, int], harness: Harness, reference: Reference, generator: random.Random
) -> None:
    _, processes = case
    named = [harness.attempt([point], reference) for point in steps(reference, processes)]
    drawn = random_points(reference, processes, generator)
    results = [harness.attempt(points, reference) for points in islice(drawn, 50)]
    assert [result for result in named + results if result.failure] == []
    assert sum(result.kills for result in named) > len(named) // 2


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_run_again_from_the_command_line(
    command: str, inputs: Inputs, server: Server, tmp_path: Path, generator: random.Random
) -> None:
    """In interpreters of their own, which have nothing from a parent."""
    expected = Harness(server.run, inputs, command, 1, tmp_path).reference()
    of_a_shard = [point for point in steps(expected, 1) if "receipt" in str(point)]
    chosen = generator.choice(of_a_shard or steps(expected, 1))
    result = Harness(lambda run, grace: [run_alone(run)], inputs, command, 1, tmp_path).attempt([chosen], expected)
    assert result.kills == 1
    assert result.failure is None
