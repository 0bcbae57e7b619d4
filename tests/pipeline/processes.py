"""The command line in processes of their own: one, those of torchrun, the tasks of SLURM."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from .watch import Watch

COMMAND = ("-m", "pissa_hub")


@contextmanager
def watched_here(watch: Watch) -> Iterator[Watch]:
    """This process, as rank 0, and those that it starts are watched."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in watch.environment().items():
            patch.setenv(name, value)
        watch.install(patch.setattr)
        yield watch


def start(watch: Watch, command: Sequence[str | Path], **variables: str | int) -> subprocess.Popen[str]:
    """Python with a command."""
    plain = {name: value for name, value in os.environ.items() if not re.match("SLURM_|RANK$|WORLD_SIZE$", name)}
    # The level that the command line sets before it imports torch.
    given = {"OMP_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR", **watch.environment(), **variables}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**plain, **{name: str(value) for name, value in given.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def under_torchrun(
    watch: Watch, launcher: Sequence[str | Path], arguments: Sequence[str | Path]
) -> subprocess.Popen[str]:
    """An agent with its workers; ``launcher`` are torchrun's own options."""
    return start(watch, ["-m", "torch.distributed.run", *launcher, *COMMAND, *arguments])


def as_slurm(watch: Watch, processes: int, arguments: Sequence[str | Path]) -> list[subprocess.Popen[str]]:
    """The tasks of a step, as srun starts them."""
    step = {
        "SLURM_STEP_NUM_TASKS": processes,
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": 7,
        "MASTER_PORT": free_port(),
    }
    return [
        start(watch, [*COMMAND, *arguments], **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in range(processes)
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit codes and what was printed."""
    printed = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, printed, strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
