"""Ctrl-C and SIGTERM at any operation: one line, the exit code that says so, and the same bytes next time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Reference
from .inputs import COMMANDS, Inputs, files_of
from .operations import Fault
from .server import Run, Server

_ENDS = {
    "SIGINT": (130, "interrupted; run the same command again to carry on"),
    "SIGTERM": (143, "terminated; run the same command again to carry on"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("signal", _ENDS)
def test_a_signal_somewhere(
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    command: str,
    signal: str,
    tmp_path: Path,
    generator: random.Random,
) -> None:
    usual, expected = reference(command)
    codes = []
    for number, name in enumerate(generator.sample(usual.operations, 4)):
        root = tmp_path / str(number)
        root.mkdir()
        arguments = inputs.arguments(command, root / "out")
        (ended,) = server.run(Run(arguments, str(root), Fault(signal, name)))
        codes.append(ended.code)
        # click ends the line of a terminal's ^C.
        lines = [line for line in ended.err.splitlines() if line and not line.startswith("note: ")]
        assert (ended.code, lines) in ((_ENDS[signal][0], [_ENDS[signal][1]]), (0, [])), (name, ended)
        (again,) = server.run(Run(arguments, str(root)))
        assert again.code == 0, (name, again)
        assert files_of(root) == expected, name
    assert _ENDS[signal][0] in codes
