"""``--devices``: one process more for every device but the first, on this machine.

A helper gets its job on stdin, which stays open: when it closes, this process is gone, and the helper goes too. The
other way round, this process sees a helper die at once, and its shards go to the others.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from pissa_hub.errors import PeerError, PissaHubError
from pissa_hub.pipeline.shared import Shared
from pissa_hub.pipeline.store import host_store
from pissa_hub.progress import Progress
from pissa_hub.ranks import Rank

_LOCAL = "127.0.0.1"


class Helpers(Shared):
    """The schedule of this process and its helpers, which start when work begins and are gone when ``with`` is left.

    Meanwhile PyTorch's threads are shared out among the processes that compute on the CPU.

    Args:
        job: see ``pipeline.job.Job``; a dataclass with a ``device``, which each helper gets with its own.
        output: folder to write.
        devices: of this process and of each helper.
        progress: told of everybody's bytes.
    """

    def __init__(self, job: Any, output: Path, devices: Sequence[torch.device], progress: Progress) -> None:
        store = host_store()
        self._ranks = [
            Rank(number, len(devices), _LOCAL, store.port, has_agent=False) for number in range(len(devices))
        ]
        super().__init__(store, self._ranks[0], job.digest, progress)
        self._late_seconds = 0.0  # it is stopped anyway
        self._jobs = [replace(job, device=device) for device in devices]
        self._output = output
        self._helpers: list[tuple[subprocess.Popen[bytes], Thread]] = []
        self._threads_before = torch.get_num_threads()
        self._on_cpu = max(sum(device.type == "cpu" for device in devices), 1)

    def __enter__(self) -> Helpers:
        super().__enter__()
        torch.set_num_threads(max(self._threads_before // self._on_cpu, 1))
        return self

    def __exit__(self, kind: object, error: BaseException | None, *rest: object) -> None:
        try:
            super().__exit__(kind, error, *rest)
        finally:
            for process, attendant in self._helpers:
                process.kill()
                process.wait()
                if attendant.ident is not None:
                    attendant.join()
                assert process.stdin is not None
                with suppress(OSError):  # it is gone, with what was still to be read
                    process.stdin.close()
            torch.set_num_threads(self._threads_before)

    def open(self, opening: Any) -> None:
        super().open(opening)
        for rank, job in zip(self._ranks[1:], self._jobs[1:], strict=True):
            environment = {**os.environ, **rank.environment(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
            command = [sys.executable, "-m", __name__]
            # What a helper prints is nobody's result.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which stops it
            )
            attendant = Thread(target=self._attend, args=(process, rank, job), daemon=True)
            self._helpers.append((process, attendant))
            attendant.start()

    def _attend(self, process: subprocess.Popen[bytes], rank: Rank, job: Any) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # it died early
            process.stdin.write(pickle.dumps(_Order(job, self._output)))
            process.stdin.flush()
        code = process.wait()
        if code and not self._left.is_set():
            with suppress(PeerError):  # all is over
                if self.bury(rank.rank, process.pid) and self._failure is None:
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    self.progress.note(f"the process for {job.device} died ({how}); the others do its work")


@dataclass(frozen=True)
class _Order:
    """What a helper is told: bytes of this very program, from the process that started it."""

    job: Any
    output: Path


def _main() -> None:
    """A helper's life."""
    from pissa_hub.pipeline.job import carry_out

    try:
        order: Any = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the other process died before it had said all
        sys.exit(1)
    Thread(target=_go_with_the_other, daemon=True).start()
    try:
        carry_out(order.job, order.output)
    except PissaHubError:  # the other process says it
        sys.exit(1)


def _go_with_the_other() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _main()
