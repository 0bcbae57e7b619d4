"""Output folders as a kill would leave them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .helpers import files_of


def snapshots_of(work: Callable[[Path], object], folder: Path) -> list[Path]:
    """Copies of the output of ``work(output)`` before and after every file gets its name, partial files included."""
    output, taken = folder / "out", []

    def snapshot(descriptor: int) -> None:
        if output.exists():
            taken.append(Path(shutil.copytree(output, folder / f"{len(taken):03}")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", snapshot)
        work(output)
    return taken


def unfinished(snapshots: Sequence[Path], receipts: int, target: Path) -> Path:
    """A copy of the first snapshot with so many receipts."""
    found = next(path for path in snapshots if len(receipts_in(path)) == receipts)
    return Path(shutil.copytree(found, target))


def receipts_in(output: Path) -> set[str]:
    """Names of the shards that are done."""
    return {path.name.removesuffix(".receipt.json") for path in output.glob(".pissa/*.receipt.json")}


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait, two minutes at least; fails if the process that is to do it ends before."""
    for _ in range(60_000):
        if is_so():
            return
        assert process is None or process.poll() is None or is_so(), process.communicate()
        time.sleep(0.002)
    raise AssertionError("it does not happen")


def work_done_from(
    snapshots: Sequence[Path], carry_on: Callable[[Path], int], expected: dict[str, bytes], folder: Path
) -> list[int]:
    """What ``carry_on(output)`` tells of a copy of each snapshot; fails unless it ends with the ``expected`` files."""
    told = []
    for snapshot in snapshots:
        output = Path(shutil.copytree(snapshot, folder / snapshot.name))
        told.append(carry_on(output))
        assert files_of(output) == expected, snapshot.name
    return told
