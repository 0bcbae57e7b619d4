"""Whatever a power cut leaves on the disk, the same command ends with the same bytes; a finished folder is whole."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .conftest import Reference
from .disk import Disk, State, lay_out, power_cuts
from .inputs import COMMANDS, MARKERS, Inputs, files_of
from .operations import Fault, Operation, recorded
from .server import Run, Server


def record(server: Server, inputs: Inputs, command: str, folder: Path) -> list[Operation]:
    """All that an uninterrupted run does in ``folder``."""
    folder.mkdir()
    log = folder.with_name("log")
    (ended,) = server.run(Run(inputs.arguments(command, folder / "out"), str(folder), record=str(log)))
    assert ended.code == 0, ended
    return recorded(log)


def is_whole_or_unmarked(state: State, command: str, expected: dict[str, bytes]) -> bool:
    """Whether a folder that looks finished is."""
    if f"out/{MARKERS[command]}" not in state:
        return True
    found = {name: content for name, content in state.items() if content is not None}
    return all(found.get(name) == data for name, data in expected.items())


def carry_on(
    server: Server, inputs: Inputs, command: str, states: Sequence[tuple[int, State]], folder: Path
) -> list[dict[str, bytes]]:
    """What the same command makes of each state."""
    ends = []
    for number, state in states:
        root = folder / "after the cut"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        lay_out(state, root)
        (ended,) = server.run(Run(inputs.arguments(command, root / "out"), str(root)))
        assert ended.code == 0, (number, sorted(state), ended)
        ends.append(files_of(root))
    return ends


@pytest.mark.parametrize("command", COMMANDS)
def test_a_power_cut_somewhere(
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    command: str,
    tmp_path: Path,
    generator: random.Random,
) -> None:
    expected = reference(command)[1]
    operations = record(server, inputs, command, tmp_path / "root")
    states = list(power_cuts(operations, tmp_path / "root", generator, most=16))
    assert len(states) > len(operations)
    assert all(is_whole_or_unmarked(state, command, expected) for _, state in states)
    ends = carry_on(server, inputs, command, generator.sample(states, 8), tmp_path)
    assert ends == [expected] * 8


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_power_cut_anywhere(
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    command: str,
    tmp_path: Path,
    generator: random.Random,
) -> None:
    expected = reference(command)[1]
    operations = record(server, inputs, command, tmp_path / "root")
    for number, state in power_cuts(operations, tmp_path / "root", generator):
        assert is_whole_or_unmarked(state, command, expected), (number, sorted(state))
        assert carry_on(server, inputs, command, [(number, state)], tmp_path) == [expected], (number, sorted(state))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("forgotten", ["sync", "folder sync"])
def test_a_sync_that_is_forgotten_would_be_seen(
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    command: str,
    forgotten: str,
    tmp_path: Path,
    generator: random.Random,
) -> None:
    operations = record(server, inputs, command, tmp_path / "root")
    fewer = [operation for operation in operations if operation.kind != forgotten]
    assert len(fewer) < len(operations)
    states = power_cuts(fewer, tmp_path / "root", generator, most=64)
    assert not all(is_whole_or_unmarked(state, command, reference(command)[1]) for _, state in states)


def test_the_finished_folder_outlives_a_power_cut(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], tmp_path: Path, generator: random.Random
) -> None:
    """Its own name in the folder above, too, and those of folders in it."""
    for command in COMMANDS:
        root = tmp_path / command / "root"
        root.parent.mkdir()
        disk = Disk(root)
        for operation in record(server, inputs, command, root):
            disk.apply(operation)
        after = list(disk.crashes(generator, most=64))
        assert all(f"out/{MARKERS[command]}" in state for state in after)
        assert all(is_whole_or_unmarked(state, command, reference(command)[1]) for state in after)


@pytest.mark.parametrize("years", [-10, 10])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_clock_that_jumps_changes_nothing(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, years: int, tmp_path: Path
) -> None:
    """Half of the work is done with the clock ahead, or behind, and its files are dated so; the rest without."""
    ended, expected = reference(command)
    arguments, root, seconds = inputs.arguments(command, tmp_path / "out"), str(tmp_path), years * 365.25 * 86400
    fault = Fault("SIGKILL", len(ended.operations) // 2)
    (killed,) = server.run(Run(arguments, root, fault, clock=seconds))
    assert killed.code == -9
    for path in tmp_path.rglob("*"):
        os.utime(path, times=(path.stat().st_mtime + seconds,) * 2)
    (again,) = server.run(Run(arguments, root))
    assert again.code == 0, again
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "convert"])
def test_work_that_a_bad_disk_garbled_is_done_again(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, tmp_path: Path
) -> None:
    """Whatever file of it: empty, cut off, or of zeros, as a disk leaves it that says too early that it has written."""
    usual, expected = reference(command)
    arguments = inputs.arguments(command, tmp_path / "killed" / "out")
    (tmp_path / "killed").mkdir()
    fault = Fault("SIGKILL", "out/model-00004-of-00006.safetensors: rename")
    assert fault.at in usual.operations
    assert server.run(Run(arguments, str(tmp_path / "killed"), fault))[0].code == -9
    done = [path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*") if path.is_file()]
    names = [path for path in done if path.suffix != ".partial" and path.name != "lock"]
    assert len(names) > 6
    for number, name in enumerate(names):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "killed", root)
        content = (root / name).read_bytes()
        (root / name).write_bytes((b"", content[: len(content) // 2], bytes(len(content)))[number % 3])
        (again,) = server.run(Run(inputs.arguments(command, root / "out"), str(root)))
        assert again.code == 0, (name, again)
        assert files_of(root) == expected, name
