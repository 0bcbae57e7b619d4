"""A source whose disk fails or gives little at a time: one clear line, work that stays, the same bytes next time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from .inputs import files_of
from .operations import Fault
from .trial import Trial, left_partial, said


@pytest.mark.parametrize("of_reads", [False, True])
def test_short_writes_and_short_reads_change_nothing(trial: Trial, of_reads: bool) -> None:
    fault = Fault("short", 1, lasting=True, of_reads=of_reads)
    ended = trial.run(trial.root, fault, inputs=trial.inputs.folders)
    assert ended.code == 0, ended
    assert files_of(trial.root) == trial.expected
    usual = trial.usual.reads if of_reads else trial.usual.operations
    assert len(ended.reads if of_reads else ended.operations) > len(usual)


def fail_and_carry_on(trial: Trial, reads: Iterable[int]) -> None:
    for at in reads:
        fault = Fault("EIO", at, of_reads=True)
        ended = trial.run_anew(trial.root, fault, inputs=trial.inputs.folders)
        if ended.code:
            assert "Input/output error" in said(ended), (at, ended)
            assert not left_partial(trial.root), (at, ended)
        trial.carry_on(trial.root, at)


def reads_of(trial: Trial) -> range:
    """Numbers of all reads in order."""
    ended = trial.run(trial.root, inputs=trial.inputs.folders)
    assert ended.code == 0, ended
    return range(1, len(ended.reads) + 1)


def test_a_source_that_fails_somewhere(trial: Trial) -> None:
    fail_and_carry_on(trial, trial.generator.sample(reads_of(trial), 5))


@pytest.mark.slow
def test_a_source_that_fails_anywhere(trial: Trial) -> None:
    fail_and_carry_on(trial, reads_of(trial))
