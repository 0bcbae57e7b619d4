"""A source whose disk fails or gives little at a time: one clear line, work that stays, the same bytes next time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Reference
from .inputs import COMMANDS, Inputs, files_of
from .operations import Fault
from .server import Run, Server
from .test_full_disk import said


@pytest.mark.parametrize("command", COMMANDS)
def test_short_writes_and_short_reads_change_nothing(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, tmp_path: Path
) -> None:
    for of_reads in (False, True):
        root = tmp_path / str(of_reads)
        root.mkdir()
        fault = Fault("short", 1, lasting=True, of_reads=of_reads)
        run = Run(inputs.arguments(command, root / "out"), str(root), fault, inputs=inputs.folders)
        (ended,) = server.run(run)
        assert ended.code == 0, ended
        assert files_of(root) == reference(command)[1]
        usual = reference(command)[0]
        assert len(ended.reads if of_reads else ended.operations) > len(usual.reads if of_reads else usual.operations)


def fail_and_carry_on(
    server: Server, inputs: Inputs, command: str, reads: list[int], expected: dict[str, bytes], root: Path
) -> None:
    for at in reads:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        arguments = inputs.arguments(command, root / "out")
        (ended,) = server.run(Run(arguments, str(root), Fault("EIO", at, of_reads=True), inputs=inputs.folders))
        if ended.code:
            assert "Input/output error" in said(ended), (at, ended)
            assert not [name for name in files_of(root) if ".partial" in name], (at, ended)
        (again,) = server.run(Run(arguments, str(root)))
        assert again.code == 0, (at, again)
        assert files_of(root) == expected, at


def reads_of(server: Server, inputs: Inputs, command: str, root: Path) -> int:
    (ended,) = server.run(Run(inputs.arguments(command, root / "out"), str(root), inputs=inputs.folders))
    assert ended.code == 0, ended
    return len(ended.reads)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_source_that_fails_somewhere(
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    command: str,
    tmp_path: Path,
    generator: random.Random,
) -> None:
    count = reads_of(server, inputs, command, tmp_path)
    chosen = generator.sample(range(1, count + 1), 5)
    fail_and_carry_on(server, inputs, command, chosen, reference(command)[1], tmp_path / "root")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_source_that_fails_anywhere(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, tmp_path: Path
) -> None:
    count = reads_of(server, inputs, command, tmp_path)
    every = list(range(1, count + 1))
    fail_and_carry_on(server, inputs, command, every, reference(command)[1], tmp_path / "root")
