"""Carrying out a job in an output folder: resumable, nothing foreign touched, nothing left of a bad input.

``decompose``, ``merge`` and ``restore`` are such jobs. The job's marker, a file that is written last, makes a folder
finished; until then ``.pissa/`` says whose unfinished work it holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Protocol, TypeVar

from pissa_hub.checkpoint.files import Files, Pin
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import AdapterError, CheckpointError, MatrixError, OutputError, VerificationError
from pissa_hub.pipeline.destination import Destination, InPlace
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.pipeline.stream import PlannedShard, PlannedWeight, Worker, stream
from pissa_hub.progress import Progress, Silent

W = TypeVar("W", bound=PlannedWeight)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Job(Protocol[W, R_co]):
    """What is to be made of a checkpoint, shard by shard."""

    @property
    def inputs(self) -> Mapping[str, Path]:
        """What it is -> folder that is read, in which the output must not lie."""

    @property
    def source(self) -> Files:
        """Where the shards come from."""

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
    def shards(self) -> Sequence[PlannedShard[W]]:
        """In the order of the work."""

    @property
    def workers(self) -> int:
        """How many weights to have in hand at once."""

    @property
    def marker(self) -> str:
        """Name of the file that makes a folder finished."""

    @property
    def file_names(self) -> Collection[str]:
        """Relative POSIX names of the files that it writes, but the marker."""

    def worker(self) -> Worker[W]:
        """A worker for the stream."""

    def disk_bytes(self, held: frozenset[str]) -> int:
        """Most bytes on disk at once, less what the ``held`` shards already take."""

    def recognise(self, output: Path) -> R_co:
        """What made a folder with the marker. Raises OutputError unless it was this very job."""

    def accept(self, receipt: Receipt) -> None:
        """Raises VerificationError if a finished shard, read or written, is not what it should be."""

    def finish(self, receipts: Sequence[Receipt], output: Path, work: WorkFolder) -> R_co:
        """Write all that is not a shard, the marker last; ``receipts`` has one for every shard, in their order."""


@dataclass(frozen=True)
class Done(Generic[R]):
    """A job that is done.

    Attributes:
        result: what :meth:`Job.finish` or :meth:`Job.recognise` made of it.
        was_finished: whether the folder had been finished before and nothing was done.
        carried_over: shards that an earlier, interrupted run had finished.
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
) -> Done[R]:
    """Do a job, or what an interrupted run left of it.

    Args:
        job: what is to be done.
        output: folder to write.
        progress: told how far it is.
        open_destination: called once the output folder may be used: where finished shards go from there.

    Raises:
        OutputError: the output folder cannot be used or written.
        AdapterError, CheckpointError, MatrixError, VerificationError: the input is bad; nothing is left of the output.
        HubError: the input or the output did not arrive; what is done so far stays.
    """
    progress = progress or Silent()
    work = WorkFolder(output, job.digest)
    _check_outside(output, job.inputs)
    if (output / job.marker).exists():
        result = job.recognise(output)
        delivered = open_destination().commit(output)
        work.remove()
        return Done(result, True, 0, delivered)
    _check_free(output, work, job.digest)
    absent = [path for path in (output.absolute(), *output.absolute().parents) if not path.exists()]
    destination = open_destination()
    shards = job.shards if work.exists else ()
    found = (work.receipt(shard.source.name, job.source, destination.held) for shard in shards)
    receipts = {receipt.shard: receipt for receipt in found if receipt}
    held = frozenset(receipts)
    pending = [shard for shard in job.shards if shard.source.name not in held]
    names = [shard.source.name for shard in pending]
    _check_space(output, job.disk_bytes(held) + job.source.room(names))
    work.create(job.settings, job.pins)
    _remove_partials(output)
    data = {shard.source.name: shard.source.header for shard in job.shards}
    sizes = {name: header.file_size - header.data_start for name, header in data.items()}
    progress.expect(sum(sizes.values()))
    progress.advance(sum(sizes[name] for name in held))
    for receipt in receipts.values():
        destination.add(receipt.shard, output / receipt.shard, receipt.output)

    def accept(receipt: Receipt) -> None:
        job.source.require_intact(receipt.shard, receipt.source)
        job.accept(receipt)

    try:
        supply = job.source.supply(names, work.folder)
        written = stream(pending, supply, output, work, job.worker, job.workers, accept, progress, destination)
    except (AdapterError, CheckpointError, MatrixError, VerificationError):
        _remove_output(output, work, job.file_names, absent)
        destination.abandon()
        raise
    receipts.update({receipt.shard: receipt for receipt in written})
    result = job.finish([receipts[shard.source.name] for shard in job.shards], output, work)
    delivered = destination.commit(output)
    work.remove()
    return Done(result, False, len(held), delivered)


def free_space(output: Path) -> int:
    """Free bytes on the disk that a folder is on or would be created on."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_whole(output: Path, files: Mapping[str, FileDigest]) -> None:
    """Raises OutputError if a file of a finished folder is gone or of another size."""
    for name, digest in files.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != digest.size:
            raise OutputError(
                f"{output} was finished, but {name} is damaged or gone", "remove the folder and start again"
            )


def _check_outside(output: Path, inputs: Mapping[str, Path]) -> None:
    for what, path in inputs.items():
        folder = path.resolve()
        if output.resolve() == folder or folder in output.resolve().parents:
            raise OutputError(f"{output} lies in the {what}", "choose a folder outside of it")


def _check_free(output: Path, work: WorkFolder, digest: str) -> None:
    """Raises OutputError unless the folder is absent, empty or holds unfinished work of this very job."""
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output} is not a folder", "choose another one")
    if work.exists:
        if work.found_digest() not in (None, digest):
            raise OutputError(
                f"{output} holds the unfinished work of another plan",
                "run that one's command again, choose another folder or remove it",
            )
    elif any(output.iterdir()):
        raise OutputError(f"{output} is not empty", "choose another folder")


def _check_space(output: Path, needed: int) -> None:
    free = free_space(output)
    if needed > free:
        raise OutputError(
            f"{output} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            "free some space or choose another disk",
        )


def _remove_partials(output: Path) -> None:
    """What a killed run was writing when it stopped."""
    for path in output.rglob("*.partial"):
        path.unlink(missing_ok=True)


def _remove_output(output: Path, work: WorkFolder, names: Collection[str], absent: Sequence[Path]) -> None:
    """Leave nothing of a run whose input turned out to be bad, nor the folders that were ``absent``, deepest first."""
    for name in names:
        (output / name).unlink(missing_ok=True)
    work.remove()
    made = {output / folder for name in names for folder in PurePosixPath(name).parents} - {output}
    for folder in [*sorted(made, reverse=True), *absent]:
        with suppress(OSError):  # somebody else's files in it
            folder.rmdir()
