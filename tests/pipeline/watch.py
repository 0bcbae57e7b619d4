"""Runs of several processes that are watched: what each of them did, work left for all, and deaths at a known place."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).parent
_WAIT_SECONDS, _WAITS = 0.01, 12_000
# Open as long as the process lives.
_signs_of_life: list[Any] = []


class Event(NamedTuple):
    """Of a process: it has ``done`` the unit ``name``, is ``reaching`` for the store, or is ``killed``."""

    rank: int
    what: str
    name: str


@dataclass(frozen=True)
class Kill:
    """Of a process by itself, once; until then the others leave it the work.

    Attributes:
        rank: which process it is.
        units: how many units it has done.
        sync: which sync of a file or folder after those it does not live to see.
    """

    rank: int
    units: int
    sync: int


@dataclass(frozen=True)
class Watch:
    """A watched run, seen by the test and by its processes alike.

    No process takes a second unit before each has done one or was killed; where processes are started anew, each of
    those that come after the kill.

    Attributes:
        log: file of events, made by the processes; their signs of life lie beside it.
        kill: what happens to one of them.
        constants: other values for those of the package, by ``module.NAME`` in ``pissa_hub.pipeline``.
    """

    log: Path
    kill: Kill | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_environment(cls) -> Watch:
        """In a process: what :meth:`environment` says."""
        table = json.loads(os.environ["WATCH"])
        kill = table["kill"] and Kill(**table["kill"])
        return cls(Path(table["log"]), kill, table["constants"])

    def environment(self) -> dict[str, str]:
        """Variables for processes that are to be watched."""
        path = os.pathsep.join([str(_HERE / "hooks"), str(_HERE.parent.parent)])
        return {"PYTHONPATH": path, "WATCH": json.dumps(asdict(self), default=str)}

    def events(self) -> list[Event]:
        """All so far."""
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        fields = (line.split(" ", 2) for line in lines)
        return [Event(int(rank), what, name) for rank, what, name in fields]

    def done(self, rank: int | None = None) -> list[str]:
        """Names of the units that were done, by one process or all, as often as they were."""
        return [event.name for event in self.events() if event.what == "done" and rank in (None, event.rank)]

    def ranks_at_work(self) -> set[int]:
        """Of the processes that have done something; after a kill, since then."""
        return {event.rank for event in self.events()[self._after_kill() :] if event.what == "done"}

    def is_killed(self) -> bool:
        """Whether what was to happen has happened, with as many units done as was asked for."""
        assert self.kill is not None
        before = self.events()[: self._after_kill()]
        done = sum(event[:2] == (self.kill.rank, "done") for event in before)
        return bool(before) and done == self.kill.units

    def hold(self) -> None:
        """Let every process stop when it has done its first unit, until :meth:`release`."""
        self._gate.touch()

    def release(self) -> None:
        self._gate.unlink()

    def living(self) -> int:
        """How many processes there are."""
        return sum(map(_is_held, self.log.parent.glob(f"{self.log.name}.*.lives")))

    def enter(self) -> None:
        """Watch this process, which has just begun, and whose end is seen by :meth:`living`."""
        import fcntl

        sign = self.log.with_name(f"{self.log.name}.{os.getpid()}.lives").open("w")
        fcntl.flock(sign, fcntl.LOCK_EX)
        _signs_of_life.append(sign)
        self.install(setattr)

    def install(self, patch: Callable[[Any, str, Any], None]) -> None:
        """Watch this process; ``patch(owner, name, value)`` changes what it works with."""
        import pissa_hub.pipeline.pieces
        import pissa_hub.pipeline.shared
        from pissa_hub.pipeline import shared
        from pissa_hub.pipeline.share import Share

        rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
        reach_store, add, units = shared.reach_store, Share.add, shared.Shared.units
        done = syncs = 0

        def dying(descriptor: int) -> None:
            nonlocal syncs
            syncs += 1
            if self.kill == Kill(rank, done, syncs) and not self._after_kill():
                self._tell(rank, "killed")
                os.kill(os.getpid(), signal.SIGKILL)

        def reaching(*arguments: Any) -> Any:
            self._tell(rank, "reaching")
            return reach_store(*arguments)

        def telling(share: Any, name: str, *arguments: Any) -> None:
            nonlocal done, syncs
            add(share, name, *arguments)
            done, syncs = done + 1, 0
            self._tell(rank, "done", name)
            while self._gate.exists():
                time.sleep(_WAIT_SECONDS)

        def sharing(schedule: Any, *arguments: Any) -> Iterator[int]:
            for unit in units(schedule, *arguments):
                yield unit
                for _ in range(_WAITS):
                    if self._all_have_work(rank, schedule.processes) or schedule._closed.wait(_WAIT_SECONDS):
                        break
                    schedule.check()
                else:
                    raise RuntimeError(f"the others have nothing to do: {self.events()}")

        for owner, name, value in (
            (os, "fsync", dying),
            (shared, "reach_store", reaching),
            (Share, "add", telling),
            (shared.Shared, "units", sharing),
        ):
            patch(owner, name, value)
        for name, constant in self.constants.items():
            module, _, name = name.partition(".")
            patch(getattr(pissa_hub.pipeline, module), name, constant)

    @property
    def _gate(self) -> Path:
        return self.log.with_name(f"{self.log.name}.hold")

    def _tell(self, rank: int, what: str, name: str = "") -> None:
        with self.log.open("a") as log:
            log.write(f"{rank} {what} {name}\n")

    def _after_kill(self) -> int:
        """Events until the kill, which is the last of them; 0 if nobody was killed."""
        return next((number for number, event in enumerate(self.events(), 1) if event.what == "killed"), 0)

    def _all_have_work(self, rank: int, processes: int) -> bool:
        """Whether this rank may take more."""
        if self.kill is not None and rank != self.kill.rank and not self._after_kill():
            return False
        ranks = self.ranks_at_work()
        if self._after_kill() and "TORCHELASTIC_RUN_ID" not in os.environ:  # nobody starts anew
            ranks = {event.rank for event in self.events() if event.what in ("done", "killed")}
        return len(ranks) >= processes


def _is_held(path: Path) -> bool:
    import fcntl

    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
