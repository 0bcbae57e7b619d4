"""What is to become of shards and weights, as the stream sees it; the plans of all jobs are made of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pissa_hub.checkpoint.header import Header, TensorEntry
from pissa_hub.checkpoint.source import Shard


class PlannedWeight(Protocol):
    """A stored tensor that a worker replaces."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def room(self) -> int:
        """Bytes of its buffer: of what is read or of all that replaces it, whichever is more."""

    @property
    def replaced_by(self) -> Sequence[str]:
        """Names of all that replaces it in the shard."""

    @property
    def factors(self) -> Sequence[str]:
        """Names of what goes to the shard's part of the adapter."""


W = TypeVar("W", bound=PlannedWeight)
W_co = TypeVar("W_co", bound=PlannedWeight, covariant=True)


class PlannedShard(Protocol[W_co]):
    """A shard, or a piece of one, and what is to become of it."""

    @property
    def name(self) -> str:
        """Relative POSIX name of the file that is written."""

    @property
    def source(self) -> Shard:
        """The shard that is read."""

    @property
    def entries(self) -> Sequence[TensorEntry]:
        """What of it is read, in file order."""

    @property
    def output(self) -> Header:
        """Of the file that is written."""

    @property
    def weights(self) -> Mapping[str, W_co]:
        """What goes to a worker, by its name in the source; all other tensors are copied."""

    @property
    def adapter(self) -> Header | None:
        """Of the shard's own part of the adapter, None where nothing goes there."""


@dataclass(frozen=True)
class WholeShard(Generic[W]):
    """A shard of which every tensor is read; see :class:`PlannedShard`."""

    source: Shard
    output: Header
    weights: Mapping[str, W]
    adapter: Header | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def entries(self) -> Sequence[TensorEntry]:
        return self.source.header.entries


def span_of(shard: PlannedShard[W]) -> range | None:
    """The bytes of the source that a piece is made of; None for a whole shard."""
    if len(shard.entries) == len(shard.source.header.entries):
        return None
    return range(shard.entries[0].start, shard.entries[-1].stop)
