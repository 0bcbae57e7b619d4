"""Carrying out a job in an output folder: resumable, nothing foreign touched, nothing left of a bad input.

``decompose``, ``merge`` and ``restore`` are such jobs. The job's marker, a file that is written last, makes a folder
finished; until then ``.pissa/`` says whose unfinished work it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from pissa_hub.checkpoint.files import Pin
from pissa_hub.errors import (
    AdapterError,
    CheckpointError,
    MatrixError,
    OutputError,
    PeerError,
    PlanError,
    ReadError,
    VerificationError,
)
from pissa_hub.pipeline import pieces, shared
from pissa_hub.pipeline.destination import Destination, InPlace
from pissa_hub.pipeline.helpers import Helpers
from pissa_hub.pipeline.output import check_free, check_outside, check_space, remove_output, remove_partials
from pissa_hub.pipeline.patience import comes_true
from pissa_hub.pipeline.pieces import bytes_read, divide, too_large
from pissa_hub.pipeline.planned import PlannedWeight
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.schedule import Alone
from pissa_hub.pipeline.share import Share, Workload, is_there
from pissa_hub.pipeline.shared import Shared
from pissa_hub.progress import Progress, Silent
from pissa_hub.ranks import Rank, find_rank

# How long a file that another machine has written may take to be seen on a network disk.
_LAG_SECONDS = 60.0
W = TypeVar("W", bound=PlannedWeight)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Job(Workload[W], Protocol[W, R_co]):
    """What is to be made of a checkpoint, shard by shard."""

    @property
    def inputs(self) -> Mapping[str, Path]:
        """What it is -> folder that is read, in which the output must not lie."""

    @property
    def pins(self) -> Collection[Pin]:
        """Of what is read from the Hub."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex of all that decides the output but the weights' values and the machine."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was asked for; JSON for whoever looks into ``.pissa/``."""

    @property
    def marker(self) -> str:
        """Name of the file that makes a folder finished."""

    @property
    def file_names(self) -> Collection[str]:
        """Relative POSIX names of the files that it writes, but the marker."""

    def disk_bytes(self, held: frozenset[str]) -> int:
        """Most bytes on disk at once, less what the ``held`` shards already take."""

    def load(self, output: Path) -> R_co:
        """What :meth:`finish` made of a folder, from its marker. Raises PissaHubError if that is damaged."""

    def recognise(self, output: Path) -> R_co:
        """What made a folder with the marker. Raises OutputError unless it was this very job."""

    def finish(self, receipts: Sequence[Receipt], output: Path, work: WorkFolder) -> R_co:
        """Write all that is not a shard, the marker last; ``receipts`` has one for every shard, in their order."""


@dataclass(frozen=True)
class Done(Generic[R]):
    """A job that is done.

    Attributes:
        result: what :meth:`Job.finish` or :meth:`Job.recognise` made of it.
        was_finished: whether the folder had been finished before and nothing was done.
        carried_over: shards that an earlier, interrupted run had finished; 0 in processes other than rank 0.
        delivered: what :meth:`Destination.commit` returned.
    """

    result: R
    was_finished: bool
    carried_over: int
    delivered: Any = None


def carry_out(
    job: Job[W, R],
    output: Path,
    progress: Progress | None = None,
    open_destination: Callable[[], Destination] = InPlace,
    devices: Sequence[torch.device] = (),
) -> Done[R]:
    """Do a job, or what an interrupted run left of it; together with other processes, if there are any.

    Args:
        job: what is to be done.
        output: folder to write.
        progress: told how far it is.
        open_destination: called once the output folder may be used: where finished shards go from there.
        devices: if there are several, a process for each, this one with the first, which is the job's own.

    Raises:
        OutputError: the output folder cannot be used or written.
        AdapterError, CheckpointError, MatrixError, VerificationError: the input is bad; nothing is left of the output.
        ReadError: it could not be read to its end; as after all that follows, what is done so far stays.
        HubError: the input or the output did not arrive.
        PeerError: another process failed.
    """
    rank, progress = find_rank(), progress or Silent()
    if rank is None and len(devices) < 2:
        return _lead(job, output, progress, Alone(progress), open_destination)
    if open_destination is not InPlace:
        raise PlanError("several processes cannot publish while they work", "publish the finished folder")
    if rank is None:
        with Helpers(job, output, devices, progress) as schedule:
            return _lead(job, output, progress, schedule)
    if len(devices) > 1:
        raise PlanError("each of several processes has one device", "leave --devices to a run without torchrun or srun")
    meeting = _meet(job, output, rank, progress)
    if meeting is None:
        return Done(job.recognise(output), True, 0)
    with meeting as schedule:
        return _lead(job, output, progress, schedule) if rank.leads else _follow(job, output, schedule)


def _meet(job: Job[W, R], output: Path, rank: Rank, progress: Progress) -> Shared | None:
    """The schedule of several processes; None if this one comes so late that the folder is finished and rank 0 gone."""
    is_finished = not rank.leads and (output / job.marker).exists()
    wait = shared.GRACE_SECONDS if is_finished else shared.JOIN_SECONDS
    try:
        return Shared.by_environment(rank, job.digest, progress, wait)
    except PeerError:
        if is_finished:
            return None
        raise


def _lead(
    job: Job[W, R],
    output: Path,
    progress: Progress,
    schedule: Alone | Shared,
    open_destination: Callable[[], Destination] = InPlace,
) -> Done[R]:
    """The process that checks, opens, waits for all and finishes."""
    work = WorkFolder(output, job.digest)
    check_outside(output, job.inputs)
    if (output / job.marker).exists():
        return _as_it_is(job, output, work, open_destination())
    check_free(output, work, job.digest)
    absent = [path for path in (output.absolute(), *output.absolute().parents) if not path.exists()]
    destination = open_destination()
    held = {shard.name for shard in job.shards if is_there(shard, work, destination)}
    names = [shard.source.name for shard in job.shards if shard.name not in held]
    check_space(output, job.disk_bytes(frozenset(held)) + job.source.room(names))
    with work.locked():
        if (output / job.marker).exists():  # another process was faster
            return _as_it_is(job, output, work, destination)
        check_free(output, work, job.digest)
        run = work.create(job.settings, job.pins)
        remove_partials(output)
        try:
            receipts, carried_over = _make_all(job, output, work, schedule, destination, run)
        except (AdapterError, CheckpointError, MatrixError, VerificationError) as error:
            if not isinstance(error, ReadError):
                schedule.stop(error)
                remove_output(output, work, job.file_names, absent)
                destination.abandon()
            raise
        for note in _differences(receipts):
            progress.note(note)
        result = job.finish(receipts, output, work)
        delivered = destination.commit(output)
        work.remove()
    return Done(result, False, carried_over, delivered)


def _follow(job: Job[W, R], output: Path, schedule: Shared) -> Done[R]:
    """Any other process."""
    opening, marker = schedule.join(), output / job.marker
    if opening is not None:
        try:
            _take_part(job, output, schedule, opening)
            schedule.wait_for_end()
        except (OutputError, PeerError, ReadError):
            if not marker.exists():  # or this process slept, and the others have finished without it
                raise
    if not comes_true(marker.exists, _LAG_SECONDS):
        raise _not_of_rank_0(output)
    return Done(job.load(output), opening is None, 0)


def _not_of_rank_0(output: Path) -> OutputError:
    return OutputError(
        f"{output} is not the folder that rank 0 writes", "give every rank one folder on a disk that all of them see"
    )


def _take_part(job: Job[W, R], output: Path, schedule: Shared, opening: Mapping[str, Any]) -> None:
    work, threads = WorkFolder(output, job.digest), torch.get_num_threads()
    if not comes_true(lambda: work.found_run() == opening["run"] or (output / job.marker).exists(), _LAG_SECONDS):
        raise _not_of_rank_0(output)
    torch.set_num_threads(opening["threads"])  # the last bits depend on it
    try:
        division = divide(job.shards, opening["cut"], opening["piece"], largest_first=True)
        Share(job, output, work, schedule, InPlace()).do(division)
    finally:
        torch.set_num_threads(threads)


def _as_it_is(job: Job[W, R], output: Path, work: WorkFolder, destination: Destination) -> Done[R]:
    """What there is to do with a folder that is finished."""
    result = job.recognise(output)
    delivered = destination.commit(output)
    work.remove()
    return Done(result, True, 0, delivered)


def _make_all(
    job: Job[W, R], output: Path, work: WorkFolder, schedule: Alone | Shared, destination: Destination, run: str
) -> tuple[list[Receipt], int]:
    """Every shard's receipt, and how many of them an earlier run left."""
    done = frozenset(shard.name for shard in job.shards if work.read(shard.name))
    pending = [shard for shard in job.shards if shard.name not in done]
    to_cut = {shard.name for shard in pending if work.pieces(shard.name)}
    schedule.progress.expect(sum(map(bytes_read, job.shards)))
    if isinstance(schedule, Shared):
        if not job.source.room([shard.source.name for shard in pending]):
            to_cut.update(too_large(pending, schedule.processes))
        joined = sorted(shard.output.file_size for shard in pending if shard.name in to_cut)
        check_space(output, job.disk_bytes(done) + sum(joined[-schedule.processes :]))
        threads = torch.get_num_threads()
        schedule.open({"run": run, "threads": threads, "cut": sorted(to_cut), "piece": pieces.MIN_PIECE_BYTES})
    division = divide(job.shards, to_cut, pieces.MIN_PIECE_BYTES, largest_first=isinstance(schedule, Shared))
    Share(job, output, work, schedule, destination).do(division)
    if isinstance(schedule, Shared):
        comes_true(lambda: all(is_there(shard, work, destination) for shard in job.shards), _LAG_SECONDS)
        remove_partials(output)  # of those that died, or wake up only now and cannot finish them any more
        inherited = {division.name(unit) for unit in schedule.inherited()}
        # Done, as the others said, but not to be seen from here, or perhaps by two.
        doubtful = [shard for shard in job.shards if shard.name in inherited or not is_there(shard, work, destination)]
        Share(job, output, work, Alone(schedule.progress), destination).do(divide(doubtful))
    job.source.require_unchanged()  # of all shards, whoever has read them
    return [work.require(shard.name) for shard in job.shards], schedule.count("carried", 0)


def _differences(receipts: Sequence[Receipt]) -> Iterator[str]:
    """Sentences on what was not the same for all shards, as far as bytes depend on it."""
    made = [receipt.environment for receipt in receipts if receipt.environment.get("device")]
    for key in sorted({key for environment in made for key in environment}):
        values = sorted({str(environment.get(key)) for environment in made})
        if len(values) > 1:
            yield f"shards were made with different {key} ({', '.join(values)}), so no single run has all their bytes"
