"""Ctrl-C and SIGTERM at any operation: one line, the exit code that says so, and the same bytes next time."""

from __future__ import annotations

import pytest

from .operations import Fault
from .trial import Trial

_ENDS = {
    "SIGINT": (130, "interrupted; run the same command again to carry on"),
    "SIGTERM": (143, "terminated; run the same command again to carry on"),
}


@pytest.mark.parametrize("signal", _ENDS)
def test_a_signal_somewhere(trial: Trial, signal: str) -> None:
    codes = []
    for name in trial.generator.sample(trial.usual.operations, 4):
        ended = trial.run_anew(trial.root, Fault(signal, name))
        codes.append(ended.code)
        # click ends the line of a terminal's ^C.
        lines = [line for line in ended.err.splitlines() if line and not line.startswith("note: ")]
        assert (ended.code, lines) in ((_ENDS[signal][0], [_ENDS[signal][1]]), (0, [])), (name, ended)
        trial.carry_on(trial.root, name)
    assert _ENDS[signal][0] in codes
