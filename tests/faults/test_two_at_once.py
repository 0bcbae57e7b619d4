"""Two runs of one command on one folder: one of them does it, the other says so, and the bytes are those of one."""

from __future__ import annotations

import re

from .inputs import files_of
from .trial import Trial, said

# Who comes early sees the lock before its number is in it.
_BUSY = r"out is being written by (process \d+|another process)"
_FILLED = {"convert": "out was filled by somebody else meanwhile; run this command again to compare"}


def test_two_runs_on_one_folder(trial: Trial) -> None:
    for number in range(3):
        root = trial.folder / str(number)
        root.mkdir()
        ended = trial.server.run(trial.line(root), trial.line(root))
        assert sorted(process.code for process in ended) in ([0, 0], [0, 1]), ended
        for process in ended:
            if process.code:
                assert re.search(_FILLED.get(trial.command, _BUSY), said(process))
        assert files_of(root) == trial.expected
        again = trial.carry_on(root)
        assert "is finished already" in again.out or "nothing to do" in again.out, again
