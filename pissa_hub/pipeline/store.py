"""The rendezvous store of several processes; of torch.distributed only this, so that any process may die.

torch.distributed is imported when there are several processes: not every build of PyTorch has it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from pissa_hub.errors import CARRY_ON, PeerError
from pissa_hub.pipeline.patience import Patience
from pissa_hub.ranks import Rank

POLL_SECONDS = 0.1
_CONNECT_SECONDS = 5.0


class Keys:
    """A store's keys below a prefix; whatever is asked of a store that is gone raises PeerError."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def below(self, prefix: str) -> Keys:
        return Keys(_distributed().PrefixStore(prefix, self._store))

    def get(self, key: str) -> str | None:
        """A value, None if there is none yet."""
        with _reaching():
            return str(self._store.get(key).decode()) if self._store.check([key]) else None

    def set(self, key: str, value: str) -> None:
        with _reaching():
            self._store.set(key, value)

    def swap(self, key: str, old: str, new: str) -> str:
        """Set a value if it is ``old``, or not there and ``old`` is empty; what it is then."""
        with _reaching():
            return str(self._store.compare_set(key, old, new).decode())

    def add(self, key: str, number: int) -> int:
        """Add to a number, 0 at first; the sum."""
        with _reaching():
            return int(self._store.add(key, number))

    def append(self, key: str, name: str) -> None:
        """Add to a list."""
        with _reaching():
            self._store.append(key, f"{name},")

    def names(self, key: str) -> list[str]:
        """The list."""
        return (self.get(key) or "").split(",")[:-1]


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise PeerError("the rendezvous store is gone, as if rank 0 had died", CARRY_ON) from None


def host_store() -> Any:
    """A store on this machine, for processes that are still to be started; ``port`` says where."""
    return _distributed().TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def reach_store(rank: Rank, wait: float) -> Any:
    """The store that the environment names; rank 0 serves it unless torchrun does.

    Args:
        rank: of this process.
        wait: seconds that a server may take to come.

    Raises:
        PeerError: it cannot be reached, or not be served.
    """
    try:
        if not rank.hosts_store:
            _wait_for_server(rank, wait)
        timeout = timedelta(seconds=wait)
        return _distributed().TCPStore(
            rank.address, rank.port, is_master=rank.hosts_store, wait_for_workers=False, timeout=timeout
        )
    except (RuntimeError, OSError, ValueError) as error:  # names that no resolver takes, too
        reason, place = str(error).splitlines()[0], f"{rank.address}:{rank.port}"
        raise PeerError(f"the rendezvous store at {place} cannot be reached ({reason})", "look at rank 0") from None


def _wait_for_server(rank: Rank, wait: float) -> None:
    """Until somebody listens; the store's own wait is deaf to interrupts. Raises OSError."""
    patience = Patience(wait)
    while True:
        try:
            return socket.create_connection((rank.address, rank.port), timeout=_CONNECT_SECONDS).close()
        except OSError:
            if patience.ran_out():
                raise
            time.sleep(POLL_SECONDS)


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
