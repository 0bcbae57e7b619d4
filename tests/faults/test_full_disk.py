"""A disk that is full or fails at any operation: one clear line, nothing half-done left, the same bytes next time."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from .inputs import files_of
from .operations import Fault
from .server import Ended
from .trial import Trial, left_partial, said

# Whoever wrote a partial file cannot remove it either.
_DEAD = ("EROFS", "EIO")
_TMPFS = 3 << 20


def spoil(trial: Trial, fault: Fault) -> Ended:
    """A run with the fault, and the same command once it is mended."""
    ended = trial.run_anew(trial.root, fault)
    if ended.code:
        assert ended.code == 1, (fault, ended)
        assert str(trial.root) in said(ended), (fault, ended)
        if not (fault.lasting and fault.action in _DEAD):
            assert not left_partial(trial.root), (fault, ended)
    else:
        found = {name: data for name, data in files_of(trial.root).items() if not name.startswith("out/.pissa")}
        assert found == trial.expected, fault
    trial.carry_on(trial.root, fault)
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


def test_a_disk_that_fails_somewhere(trial: Trial) -> None:
    failed = 0
    for fault in (_FULL, *_OTHERS):
        failed += spoil(trial, replace(fault, at=trial.generator.choice(trial.usual.operations))).code
    assert failed > len(_OTHERS) // 2


@pytest.mark.slow
def test_a_disk_that_fails_anywhere(trial: Trial) -> None:
    """It is full at every operation in turn; the other faults take turns."""
    for name, other in zip(trial.usual.operations, cycle(_OTHERS), strict=False):
        for fault in (_FULL, other):
            spoil(trial, replace(fault, at=name))


@pytest.mark.parametrize("trial", ["decompose"], indirect=True)
def test_a_full_disk_is_named_with_the_space_that_is_left(trial: Trial) -> None:
    name = "out/model-00002-of-00004.safetensors.partial: write 3"
    assert name in trial.usual.operations
    line = said(spoil(trial, Fault("ENOSPC", name)))
    assert f"{trial.root}/out/model-00002-of-00004.safetensors: no space left for " in line
    assert line.endswith(" free); free some space or choose another output folder")


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


def test_a_real_disk_that_is_full(trial: Trial, tmpfs: Path) -> None:
    """Each time a little less so, until it is enough."""
    expected = {name.removeprefix("out/"): data for name, data in trial.expected.items()}
    codes, ballast = [], tmpfs / "ballast"
    for free in range(0, _TMPFS, 100_000):
        ballast.unlink(missing_ok=True)
        room = shutil.disk_usage(tmpfs).free - free
        if room > 0:
            ballast.write_bytes(bytes(room))
        ended = trial.run(tmpfs)
        codes.append(ended.code)
        if not ended.code:
            break
        assert str(tmpfs / "out") in said(ended)
        assert not left_partial(tmpfs)
    assert codes == [1] * (len(codes) - 1) + [0]
    assert len(codes) > 1
    assert files_of(tmpfs / "out") == expected
