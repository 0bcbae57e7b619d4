"""Two runs of one command on one folder: one of them does it, the other says so, and the bytes are those of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Reference
from .inputs import COMMANDS, Inputs, files_of
from .server import Run, Server
from .test_full_disk import said

_BUSY = {"convert": "out was filled by somebody else meanwhile; run this command again to compare"}


@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_on_one_folder(
    server: Server, inputs: Inputs, reference: Callable[[str], Reference], command: str, tmp_path: Path
) -> None:
    for number in range(3):
        root = tmp_path / str(number)
        root.mkdir()
        run = Run(inputs.arguments(command, root / "out"), str(root))
        ended = server.run(run, run)
        assert sorted(process.code for process in ended) in ([0, 0], [0, 1]), ended
        for process in ended:
            if process.code:
                assert _BUSY.get(command, "out is being written by process ") in said(process)
        assert files_of(root) == reference(command)[1]
        (again,) = server.run(run)
        assert again.code == 0, again
        assert "is finished already" in again.out or "nothing to do" in again.out, again
