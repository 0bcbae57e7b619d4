"""Whatever a power cut leaves on the disk, the same command ends with the same bytes; a finished folder is whole."""

from __future__ import annotations

import os
import shutil

import pytest

from .disk import Disk, State, lay_out, power_cuts
from .inputs import COMMANDS
from .operations import Fault, Operation, recorded
from .trial import Trial


def record(trial: Trial) -> list[Operation]:
    """All that an uninterrupted run does."""
    log = trial.folder / "log"
    ended = trial.run(trial.root, record=str(log))
    assert ended.code == 0, ended
    return recorded(log)


def is_whole_or_unmarked(state: State, trial: Trial) -> bool:
    """Whether a folder that looks finished is."""
    if trial.marker not in state:
        return True
    found = {name: content for name, content in state.items() if content is not None}
    return all(found.get(name) == data for name, data in trial.expected.items())


def carry_on(trial: Trial, number: int, state: State) -> None:
    """The same command on a disk as the cut after an operation left it."""
    root = trial.folder / "after the cut"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    lay_out(state, root)
    trial.carry_on(root, (number, sorted(state)))


def test_a_power_cut_somewhere(trial: Trial) -> None:
    operations = record(trial)
    states = list(power_cuts(operations, trial.root, trial.generator, most=16))
    assert len(states) > len(operations)
    assert all(is_whole_or_unmarked(state, trial) for _, state in states)
    for number, state in trial.generator.sample(states, 8):
        carry_on(trial, number, state)


@pytest.mark.slow
def test_a_power_cut_anywhere(trial: Trial) -> None:
    for number, state in power_cuts(record(trial), trial.root, trial.generator):
        assert is_whole_or_unmarked(state, trial), (number, sorted(state))
        carry_on(trial, number, state)


@pytest.mark.parametrize("forgotten", ["sync", "folder sync"])
def test_a_sync_that_is_forgotten_would_be_seen(trial: Trial, forgotten: str) -> None:
    operations = record(trial)
    fewer = [operation for operation in operations if operation.kind != forgotten]
    assert len(fewer) < len(operations)
    states = power_cuts(fewer, trial.root, trial.generator, most=64)
    assert not all(is_whole_or_unmarked(state, trial) for _, state in states)


def test_the_finished_folder_outlives_a_power_cut(trial: Trial) -> None:
    """Its own name in the folder above, too, and those of folders in it."""
    disk = Disk(trial.root)
    for operation in record(trial):
        disk.apply(operation)
    after = list(disk.crashes(trial.generator, most=64))
    assert all(trial.marker in state for state in after)
    assert all(is_whole_or_unmarked(state, trial) for state in after)


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_changes_nothing(trial: Trial, years: int) -> None:
    """Half of the work is done with the clock ahead, or behind, and its files are dated so; the rest without."""
    seconds = years * 365.25 * 86400
    killed = trial.run(trial.root, Fault("SIGKILL", len(trial.usual.operations) // 2), clock=seconds)
    assert killed.code == -9
    for path in trial.root.rglob("*"):
        os.utime(path, times=(path.stat().st_mtime + seconds,) * 2)
    trial.carry_on(trial.root)


@pytest.mark.parametrize("trial", [command for command in COMMANDS if command != "convert"], indirect=True)
def test_work_that_a_bad_disk_garbled_is_done_again(trial: Trial) -> None:
    """Whatever file of it: empty, cut off, or of zeros, as a disk leaves it that says too early that it has written."""
    fault = Fault("SIGKILL", "out/model-00004-of-00004.safetensors: rename")
    assert fault.at in trial.usual.operations
    assert trial.run(trial.root, fault).code == -9
    done = [path.relative_to(trial.root) for path in trial.root.rglob("*") if path.is_file()]
    names = [path for path in done if path.suffix != ".partial" and path.name != "lock"]
    assert len(names) > 6
    for number, name in enumerate(names):
        root = trial.folder / str(number)
        shutil.copytree(trial.root, root)
        content = (root / name).read_bytes()
        (root / name).write_bytes((b"", content[: len(content) // 2], bytes(len(content)))[number % 3])
        trial.carry_on(root, name)
