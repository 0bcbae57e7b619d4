"""One command that something is done to, and how it has to end all the same."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .inputs import MARKERS, Inputs, files_of
from .operations import Fault
from .server import Ended, Run, Server


@dataclass(frozen=True)
class Trial:
    """A command line, run in folders of one test.

    Attributes:
        server: that runs it.
        inputs: what it is given.
        command: its name.
        usual: how it ends when nothing goes wrong.
        expected: all files that it then leaves.
        folder: of the test, empty at first.
        generator: the same for each test in every run.
    """

    server: Server
    inputs: Inputs
    command: str
    usual: Ended
    expected: Mapping[str, bytes]
    folder: Path
    generator: random.Random

    @property
    def root(self) -> Path:
        """Where it is run unless a test says otherwise."""
        return self.folder / "root"

    @property
    def marker(self) -> str:
        """The file that says that the output is finished."""
        return f"out/{MARKERS[self.command]}"

    def line(self, root: Path, fault: Fault | None = None, **options: Any) -> Run:
        """The command line with its output below ``root``; ``options`` are those of :class:`Run`."""
        return Run(self.inputs.arguments(self.command, root / "out"), str(root), fault or Fault(), **options)

    def run(self, root: Path, fault: Fault | None = None, **options: Any) -> Ended:
        """One run in a folder as it is, made if need be."""
        root.mkdir(exist_ok=True)
        (ended,) = self.server.run(self.line(root, fault, **options))
        return ended

    def run_anew(self, root: Path, fault: Fault, **options: Any) -> Ended:
        """One run in a folder that is empty."""
        shutil.rmtree(root, ignore_errors=True)
        return self.run(root, fault, **options)

    def carry_on(self, root: Path, about: object = None) -> Ended:
        """The same command with nothing in its way: it ends well, and with the expected bytes."""
        ended = self.run(root)
        assert ended.code == 0, (about, ended)
        assert files_of(root) == self.expected, about
        return ended


def said(ended: Ended) -> str:
    """The one line of an error beside notes. Fails unless it is one of ours, with a remedy."""
    lines = [line for line in ended.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, ended
    assert lines[0].startswith("error: "), ended
    assert "; " in lines[0], ended
    assert "check the path and its permissions" not in lines[0], "a bare error of the system"
    return lines[0]


def left_partial(root: Path) -> list[str]:
    """Names of files that are not all there."""
    return [name for name in files_of(root) if ".partial" in name]
