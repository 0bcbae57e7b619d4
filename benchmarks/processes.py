"""Run a command and measure the whole process: wall time, CPU time, peak resident set.

This module and whoever calls it must not import torch: on Linux a child starts with the peak of its parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "benchmarks"


class ProcessError(RuntimeError):
    """A measured command failed; the message ends with what it said."""


@dataclass(frozen=True)
class Measured:
    """Wall and CPU (user + system) seconds, peak resident bytes, and the JSON object that was printed."""

    wall: float
    cpu: float
    peak_rss: int
    report: dict[str, Any]


def run(module: str, *arguments: str | Path) -> Measured:
    """Run ``python -m module arguments`` from the root of the repository, without network."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # What earlier runs left to be written must not burden this one.
    if hasattr(os, "sync"):
        os.sync()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start = perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # an interrupt, too, leaves no process
            process.kill()
            process.wait()
            raise
        wall = perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            said = stderr.read().decode(errors="replace").strip()
            raise ProcessError(f"{' '.join(command)}: exit {process.returncode}\n{said[-2000:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        return Measured(
            wall,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * unit,
            _last_object(stdout.read().decode()),
        )


def _last_object(output: str) -> dict[str, Any]:
    """The JSON object that ``output`` is, or whose last line it is; {} without one."""
    for text in (output, *output.strip().splitlines()[-1:]):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def call(module: str, *arguments: str | Path) -> dict[str, Any]:
    """The JSON object that ``python -m module arguments`` prints."""
    return run(module, *arguments).report


def warm(files: Sequence[Path]) -> None:
    """Read files, so that every run finds them in the page cache."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
