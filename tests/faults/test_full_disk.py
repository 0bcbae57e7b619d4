"""A disk that is full or fails at any operation: one clear line, nothing half-done left, the same bytes next time."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from .conftest import Reference
from .inputs import COMMANDS, Inputs, files_of
from .operations import Fault
from .server import Ended, Run, Server

# Whoever wrote a partial file cannot remove it either.
_DEAD = ("EROFS", "EIO")
_TMPFS = 3 << 20


def said(ended: Ended) -> str:
    """The one line of an error beside notes. Fails unless it is one of ours, with a remedy."""
    lines = [line for line in ended.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, ended
    assert lines[0].startswith("error: "), ended
    assert "; " in lines[0], ended
    assert "check the path and its permissions" not in lines[0], "a bare error of the system"
    return lines[0]


def spoil(server: Server, inputs: Inputs, command: str, fault: Fault, expected: dict[str, bytes], root: Path) -> Ended:
    """A run with the fault, and the same command once it is mended."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    run = Run(inputs.arguments(command, root / "out"), str(root), fault)
    (ended,) = server.run(run)
    if ended.code:
        assert ended.code == 1, (fault, ended)
        assert str(root) in said(ended), (fault, ended)
        if not (fault.lasting and fault.action in _DEAD):
            assert not [name for name in files_of(root) if ".partial" in name], (fault, ended)
    else:
        found = {name: data for name, data in files_of(root).items() if not name.startswith("out/.pissa/")}
        assert found == expected, fault
    (again,) = server.run(Run(run.arguments, run.root))
    assert again.code == 0, (fault, again)
    assert files_of(root) == expected, fault
    return ended


# An error that comes once, and disks that stay as they are.
_FULL = Fault("ENOSPC")
_OTHERS = (
    Fault("ENOSPC", lasting=True),
    Fault("EDQUOT", lasting=True),
    Fault("EIO"),
    Fault("EROFS", lasting=True),
    Fault("EACCES"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fails_somewhere(
    server: Server,
    inputs: Inputs,
    reference: Callable[[str], Reference],
    command: str,
    tmp_path: Path,
    generator: random.Random,
) -> None:
    ended, expected = reference(command)
    failed = 0
    for fault in (_FULL, *_OTHERS):
        spoiled = replace(fault, at=generator.choice(ended.operations))
        failed += spoil(server, inputs, command, spoiled, expected, tmp_path / "root").code
    assert failed > len(_OTHERS) // 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fails_anywhere(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, tmp_path: Path
) -> None:
    """It is full at every operation in turn; the other faults take turns."""
    ended, expected = reference(command)
    for name, other in zip(ended.operations, cycle(_OTHERS), strict=False):
        for fault in (_FULL, other):
            spoil(server, inputs, command, replace(fault, at=name), expected, tmp_path / "root")


def test_a_full_disk_is_named_with_the_space_that_is_left(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    name = "out/model-00002-of-00006.safetensors.partial: write 3"
    assert name in reference("decompose")[0].operations
    ended = spoil(server, inputs, "decompose", Fault("ENOSPC", name), reference("decompose")[1], tmp_path / "root")
    assert f"{tmp_path}/root/out/model-00002-of-00006.safetensors: no space left for " in said(ended)
    assert said(ended).endswith(" free); free some space or choose another output folder")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, a small one; for who may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_real_disk_that_is_full(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, tmpfs: Path
) -> None:
    """Each time a little less so, until it is enough."""
    expected = {name.removeprefix("out/"): data for name, data in reference(command)[1].items()}
    run = Run(inputs.arguments(command, tmpfs / "out"), str(tmpfs))
    codes, ballast = [], tmpfs / "ballast"
    for free in range(0, _TMPFS, 100_000):
        ballast.unlink(missing_ok=True)
        room = shutil.disk_usage(tmpfs).free - free
        if room > 0:
            ballast.write_bytes(bytes(room))
        (ended,) = server.run(run)
        codes.append(ended.code)
        if not ended.code:
            break
        assert str(tmpfs / "out") in said(ended)
        assert not list(tmpfs.rglob("*.partial"))
    assert codes == [1] * (len(codes) - 1) + [0]
    assert len(codes) > 1
    assert files_of(tmpfs / "out") == expected
