"""One of several processes that take units of work from a rendezvous store.

The receipts on the disk are the truth; the store only says who has which unit in hand, so that no two do the same and
the units of a process that died are taken over. Two that do one unit after all write the same bytes.

In the store, under a prefix of the job:

    round               how often a rank 0 began; each round has its own keys below, because those of torchrun's store
                        outlive the processes
    leader, opened      the process of rank 0, and what it said when work could begin
    next, owner/UNIT    how many units were handed out, and to which process
    done                finished units
    alive/PROCESS       a counter that the process moves on: no clock is compared with another machine's
    joined, left, dead  processes that came, are through, or were seen to die
    inherited           units that were taken over
    notes, note/NUMBER  what other ranks have to say, for rank 0 to show
    failed, ended       the first error, and that rank 0 is through
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event, Lock, Thread
from typing import Any

from pissa_hub import errors
from pissa_hub.errors import CARRY_ON, PeerError, PissaHubError
from pissa_hub.pipeline.patience import Patience
from pissa_hub.pipeline.rounds import Round
from pissa_hub.pipeline.store import POLL_SECONDS, Keys, reach_store
from pissa_hub.progress import Progress
from pissa_hub.ranks import Rank

HEARTBEAT_SECONDS = 0.5
# A process that has not moved its counter for so long counts as dead. One that was only asleep does a unit twice.
GRACE_SECONDS = 20.0
# How long to wait for a store or a rank 0 that has not come.
JOIN_SECONDS = 300.0
_LAST_SECONDS = 5.0
# One program may ask for the same work twice, and finds the store of the first time: everybody counts alike.
_calls: Counter[str] = Counter()


class Shared:
    """One of several processes. Leaving ``with`` tells the others how it ended; rank 0 leaves last.

    Args:
        store: a ``torch.distributed.Store`` that all of them reach.
        rank: which of them this is.
        job: what they do together: SHA-256 of the plan.
        progress: told of everybody's bytes.
        call: how often this store has been used for it.
    """

    def __init__(self, store: Any, rank: Rank, job: str, progress: Progress, call: int = 1) -> None:
        self._root = Keys(store).below(f"pissa-hub/{job}/{call}")
        self._rank = rank
        self.rank, self.processes = rank.rank, rank.world_size
        self._round = self._open_round("")
        self._name = f"{rank.rank}.{os.getpid()}.{secrets.token_hex(4)}"
        # Who comes late to a store that is gone would call that an error.
        self._late_seconds = GRACE_SECONDS if rank.hosts_store else 0.0
        self._closed = Event()
        self._left = Event()
        self._failure: PissaHubError | None = None
        self._pulse = Thread(target=self._beat, name="heartbeat", daemon=True)
        self._notes = 0
        self.progress = _Sum(progress, self.check, progress.note if rank.leads else self._tell)

    @classmethod
    def by_environment(cls, rank: Rank, job: str, progress: Progress, wait: float) -> Shared:
        """With the store that the rank names. Raises PeerError if that is not reached in so many seconds."""
        _calls[job] += 1
        return cls(reach_store(rank, wait), rank, job, progress, _calls[job])

    @property
    def _store(self) -> Keys:
        return self._round.keys

    def __enter__(self) -> Shared:
        if self._rank.leads:
            self._round = self._open_round(str(self._root.add("round", 1)))
            self._store.set("leader", self._name)
            self._pulse.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        try:
            if self._pulse.is_alive():
                self._leave(error)
        except PeerError:
            pass  # the store is gone, so nobody is there to be told
        finally:
            self._left.set()
            if self._pulse.ident is not None:
                self._pulse.join(_LAST_SECONDS)  # a thread inside the store must not outlive the interpreter

    def open(self, opening: Mapping[str, Any]) -> None:
        """Rank 0: let the others begin; ``opening`` is what :meth:`join` gives them."""
        self._store.set("opened", json.dumps(opening))

    def join(self) -> Mapping[str, Any] | None:
        """Another rank: wait until work begins; what rank 0 said then, or None if all is finished.

        Raises:
            PeerError: rank 0 does not come.
            PissaHubError: what stopped it.
        """
        patience = Patience(JOIN_SECONDS)
        while not patience.ran_out():
            number = self._root.get("round")
            if number is not None and number != self._round.number:
                self._round = self._open_round(number)
            if self._round.hears_leader():
                patience = Patience(JOIN_SECONDS)
            is_over = self._round.is_over()
            opening = None if is_over else self._round.opening()
            if is_over or opening is not None:
                self._store.append("joined", self._name)
                self._pulse.start()
                self._hear()
                self.check()
                return None if opening is None else dict(json.loads(opening))
            time.sleep(POLL_SECONDS)
        raise PeerError("rank 0 has not begun", "give every rank the same command and look at its output")

    def wait_for_end(self) -> None:
        """Another rank: until rank 0 is through. Raises PissaHubError if it failed."""
        leader = str(self._round.leader())
        while not self._round.is_ended():
            self.check()
            if not self._round.is_alive(leader):
                raise PeerError("rank 0 has died", CARRY_ON)
            time.sleep(POLL_SECONDS)
        self._hear()
        self.check()

    def units(self, count: int, needs: Mapping[int, Sequence[int]]) -> Iterator[int]:
        at_once = count - len(needs)
        while not self._closed.is_set() and (unit := self._store.add("next", 1) - 1) < at_once:
            self.check()
            if self._take(unit, ""):
                yield unit
        unclaimed = Patience(GRACE_SECONDS)
        while not self._closed.is_set():
            self.check()
            done = {int(unit) for unit in self._store.names("done")}
            missing = [unit for unit in range(count) if unit not in done]
            if not missing:
                return
            ready = (unit for unit in missing if done.issuperset(needs.get(unit, ())))
            is_late = unclaimed.ran_out()
            unit = next((unit for unit in ready if self._inherit(unit, unit >= at_once or is_late)), -1)
            if unit < 0:
                self._closed.wait(POLL_SECONDS)
            else:
                yield unit

    def done(self, unit: int) -> None:
        self._store.append("done", str(unit))

    def has(self, unit: int) -> bool:
        return self._store.get(f"owner/{unit}") == self._name

    def check(self) -> None:
        """Raises what stopped another process."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._closed.set()

    def count(self, what: str, number: int) -> int:
        return self._store.add(f"count/{what}", number)

    def bury(self, rank: int, process: int) -> bool:
        """Rank 0: such a process is dead. Whether that was not known."""
        name = f"{rank}.{process}"
        if name in self._store.names("dead"):
            return False
        self._store.append("dead", name)
        return True

    def inherited(self) -> list[int]:
        """Units that were taken over from a process that seemed to be dead."""
        return [int(unit) for unit in self._store.names("inherited")]

    def stop(self, error: BaseException) -> None:
        if self._failure is None:
            self._store.swap("failed", "", json.dumps(_told(error)))
        if self._rank.leads and not isinstance(error, KeyboardInterrupt):
            self._wait_for_others()

    def _leave(self, error: BaseException | None) -> None:
        if error is not None and (self._rank.leads or isinstance(error, PissaHubError)):
            self.stop(error)
        elif error is not None:  # what stops one process need not stop the others
            if not isinstance(error, KeyboardInterrupt):
                self._tell(f"rank {self.rank} stopped ({type(error).__name__}: {error}); the others do its work")
            self._store.append("dead", self._name.rpartition(".")[0])
        if self._rank.leads:
            self._store.set("ended", "1")
            if not isinstance(error, KeyboardInterrupt):
                self._wait_for_others(self._late_seconds)
                self._hear()
            return
        self._store.append("left", self._name)
        if error is not None and not isinstance(error, KeyboardInterrupt):
            # Whoever started the processes stops rank 0 when this one fails, and it may have to tidy up.
            leader = str(self._round.leader())
            while not self._round.is_ended() and self._round.is_alive(leader):
                time.sleep(POLL_SECONDS)

    def _wait_for_others(self, late: float = 0) -> None:
        """Until those who joined have left or died; ``late`` seconds for those who have not joined."""
        patience = Patience(late)
        while True:
            joined, left, dead = (set(self._store.names(key)) for key in ("joined", "left", "dead"))
            known = {process.partition(".")[0] for process in joined | dead}
            if (patience.ran_out() or len(known) >= self._rank.world_size - 1) and not any(
                map(self._round.is_alive, joined - left)
            ):
                return
            time.sleep(POLL_SECONDS)

    def _take(self, unit: int, owner: str) -> bool:
        return self._store.swap(f"owner/{unit}", owner, self._name) == self._name

    def _inherit(self, unit: int, is_free: bool) -> bool:
        """Take a unit that nobody has, if it ``is_free`` then, or whose process is dead."""
        owner = self._store.get(f"owner/{unit}")
        if owner is None:
            return is_free and self._take(unit, "")
        if owner == self._name or self._round.is_alive(owner) or not self._take(unit, owner):
            return False
        self._store.append("inherited", str(unit))
        return True

    def _open_round(self, number: str) -> Round:
        # Only torchrun starts processes anew that find the store of those before.
        return Round(self._root, number, GRACE_SECONDS, JOIN_SECONDS if self._rank.has_agent else 0.0)

    def _tell(self, note: str) -> None:
        """Another rank: let rank 0 say something."""
        self._store.set(f"note/{self._store.add('notes', 1)}", note)

    def _beat(self) -> None:
        while not self._left.is_set():
            try:
                self._store.add(f"alive/{self._name}", 1)
                self.progress.show(self.count("bytes", self.progress.take()))
                self._hear()
            except PeerError as error:
                self._failure = self._failure or error
                return
            except Exception as error:  # of whoever shows the progress
                self._failure = PeerError(f"rank {self.rank} cannot go on ({error})", CARRY_ON)
                return
            self._left.wait(HEARTBEAT_SECONDS)

    def _hear(self) -> None:
        if self._root.get("round") != self._round.number:
            self._failure = self._failure or PeerError("another rank 0 has begun", "leave it to that one")
        while self._rank.leads and (note := self._store.get(f"note/{self._notes + 1}")) is not None:
            self._notes += 1
            self.progress.note(note)
        failed = self._store.get("failed")
        if failed is not None and self._failure is None:
            self._failure = _heard(json.loads(failed))


class _Sum:
    """Progress of all processes together; whoever begins a weight hears here that another process failed."""

    def __init__(self, progress: Progress, check: Callable[[], None], tell: Callable[[str], None]) -> None:
        self._progress = progress
        self._check = check
        self.note = tell
        self._lock = Lock()
        self._expected = self._shown = self._own = 0

    def expect(self, nbytes: int) -> None:
        self._expected += nbytes
        self._progress.expect(nbytes)

    def working_on(self, weight: str) -> None:
        self._check()
        self._progress.working_on(weight)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._own += nbytes

    def take(self) -> int:
        """Own bytes since the last call."""
        with self._lock:
            own, self._own = self._own, 0
        return own

    def show(self, total: int) -> None:
        """Everybody's bytes; those of a process that died are counted twice."""
        total = min(total, self._expected)
        self._progress.advance(max(total - self._shown, 0))
        self._shown = max(total, self._shown)


def _told(error: BaseException) -> dict[str, str]:
    if isinstance(error, PissaHubError):
        return {"kind": type(error).__name__, "fact": error.fact, "remedy": error.remedy}
    what = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped ({type(error).__name__}: {error})"
    return {"kind": "PeerError", "fact": f"rank 0 {what}", "remedy": CARRY_ON}


def _heard(told: Mapping[str, str]) -> PissaHubError:
    kind: type[PissaHubError] = getattr(errors, told["kind"])
    return kind(told["fact"], told["remedy"])
