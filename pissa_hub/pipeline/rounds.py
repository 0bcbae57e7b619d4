"""One rank 0's attempt at a job, as several processes see it, and the signs of life that they give in it."""

from __future__ import annotations

from pissa_hub.pipeline.patience import Patience
from pissa_hub.pipeline.store import Keys


class Round:
    """The keys of one attempt. torchrun's store outlives the processes, so they may be those of dead ones.

    Args:
        root: keys of the job.
        number: which attempt it is.
        grace: seconds without a sign of life after which a process counts as dead.
        renewal: seconds in which another rank 0 may begin anew after this one has failed.
    """

    def __init__(self, root: Keys, number: str, grace: float, renewal: float) -> None:
        self.number = number
        self.keys = root.below(number)
        self._grace = grace
        self._renewal = Patience(renewal)
        self._seen: dict[str, tuple[int, Patience]] = {}
        self._is_led = False

    def leader(self) -> str | None:
        """The process of rank 0."""
        return self.keys.get("leader")

    def hears_leader(self) -> bool:
        """Whether rank 0 has given a sign of life since the last call, so that it is no dead one's round."""
        leader = self.leader()
        if leader is None or self.is_ended():
            return False
        beat = self._beat(leader)
        has_moved = self._seen.setdefault(leader, (beat, Patience(self._grace)))[0] != beat
        self._seen[leader] = (beat, Patience(self._grace))
        self._is_led |= has_moved
        return has_moved

    def opening(self) -> str | None:
        """What rank 0 said when work could begin, if it lives."""
        return self.keys.get("opened") if self._is_led and not self.is_ended() else None

    def is_ended(self) -> bool:
        """Whether rank 0 is through."""
        return self.keys.get("ended") is not None

    def is_over(self) -> bool:
        """Whether rank 0 is through and, if it failed, no other one begins anew in time."""
        return self.is_ended() and (self.keys.get("failed") is None or self._renewal.ran_out())

    def is_alive(self, process: str) -> bool:
        """Whether a process is not known to be dead, and has given a sign of life lately."""
        if process.rpartition(".")[0] in self.keys.names("dead"):
            return False
        beat = self._beat(process)
        if process not in self._seen or self._seen[process][0] != beat:
            self._seen[process] = (beat, Patience(self._grace))
        return not self._seen[process][1].ran_out()

    def _beat(self, process: str) -> int:
        return self.keys.add(f"alive/{process}", 0)
