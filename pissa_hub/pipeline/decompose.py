"""``decompose``: open, plan, stream, finish; carry on where a killed run stopped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import open_checkpoint
from pissa_hub.errors import CheckpointError, ManifestError, MatrixError, OutputError, PlanError
from pissa_hub.manifest import MANIFEST_NAME, Manifest, load_manifest
from pissa_hub.model.modules import resolve_layout
from pissa_hub.pipeline.finish import CARD_NAME, finish
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, ADAPTER_NAME, Plan, make_plan
from pissa_hub.pipeline.receipts import WorkFolder
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.stream import stream, worker_count
from pissa_hub.progress import Progress, Silent


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`decompose` did.

    Attributes:
        plan: the plan that was followed.
        manifest: of the finished folder.
        was_finished: whether the folder had been finished before and nothing was done.
        carried_over: shards that an earlier, interrupted run had finished.
    """

    plan: Plan
    manifest: Manifest
    was_finished: bool
    carried_over: int


def plan_decomposition(source: str | Path, settings: Settings) -> Plan:
    """The plan for a source, from headers and config.json alone; see ``pipeline.plan``.

    Raises:
        PissaHubError: the source is not a usable checkpoint, or the settings do not fit it.
    """
    checkpoint = open_checkpoint(source)
    shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
    return make_plan(checkpoint, resolve_layout(checkpoint.config, shapes), settings)


def decompose(
    source: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Outcome:
    """Decompose a checkpoint into a residual base and a PiSSA adapter.

    A folder that an interrupted call left is carried on with; one that is finished is left as it is.

    Args:
        source: folder of a safetensors checkpoint.
        output: folder to write; absent, empty, or of the same plan.
        device: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ...
        progress: told how far it is.
        settings: fields of :class:`~pissa_hub.pipeline.settings.Settings`, e.g. ``rank=64``.

    Raises:
        PissaHubError: see ``errors``; for a bad input nothing is left behind.
    """
    return run(plan_decomposition(source, Settings(**settings)), Path(output), pick_device(device), progress)


def run(plan: Plan, output: Path, device: torch.device, progress: Progress | None = None) -> Outcome:
    """Follow a plan; see :func:`decompose`."""
    progress = progress or Silent()
    work = WorkFolder(output, plan.digest)
    finished = _finished(plan, output, work)
    if finished is not None:
        return Outcome(plan, finished, was_finished=True, carried_over=0)
    absent = [path for path in (output.absolute(), *output.absolute().parents) if not path.exists()]
    found = (work.receipt(shard.source) for shard in plan.shards) if work.exists else ()
    receipts = {receipt.shard: receipt for receipt in found if receipt}
    held = frozenset(receipts)
    _check_space(output, plan.disk_bytes(held))
    work.create(plan.settings.as_dict())
    _remove_partials(output)
    pending = [shard for shard in plan.shards if shard.name not in held]
    data = {shard.name: shard.source.header.file_size - shard.source.header.data_start for shard in plan.shards}
    progress.expect(sum(data.values()))
    progress.advance(sum(data[name] for name in held))
    try:
        workers = worker_count(plan.weights, device)
        written = stream(pending, output, work, plan.settings, device, workers, progress)
    except (MatrixError, CheckpointError):
        _remove_output(plan, output, absent)
        raise
    receipts.update({receipt.shard: receipt for receipt in written})
    manifest = finish(plan, [receipts[shard.name] for shard in plan.shards], output, work, device)
    return Outcome(plan, manifest, was_finished=False, carried_over=len(held))


def pick_device(name: str) -> torch.device:
    """The device of a ``--device``. Raises PlanError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"device {name!r} cannot be used ({reason})", "use auto, cpu or cuda:N") from None
    return device


def free_space(output: Path) -> int:
    """Free bytes on the disk that a folder is on or would be created on."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _finished(plan: Plan, output: Path, work: WorkFolder) -> Manifest | None:
    """The manifest, if ``output`` is this plan's finished folder; None if it may be written.

    Raises:
        OutputError: it holds anything else.
    """
    source = plan.checkpoint.root.resolve()
    if output.resolve() == source or source in output.resolve().parents:
        raise OutputError(f"{output} lies in the source", "choose a folder outside of it")
    if not output.exists():
        return None
    if not output.is_dir():
        raise OutputError(f"{output} is not a folder", "choose another one")
    if (output / MANIFEST_NAME).exists():
        try:
            manifest = load_manifest(output)
        except ManifestError as error:
            raise OutputError(f"{output} is not empty ({error.fact})", "choose another folder") from None
        if not _is_of(plan, manifest):
            raise OutputError(
                f"{output} holds another decomposition, of other weights or settings",
                "choose another folder or remove it",
            )
        _check_whole(output, manifest)
        work.remove()
        return manifest
    if work.exists:
        found = work.found_digest()
        if found not in (None, plan.digest):
            raise OutputError(
                f"{output} holds the unfinished work of another plan",
                "run that one's command again, choose another folder or remove it",
            )
        return None
    if any(output.iterdir()):
        raise OutputError(f"{output} is not empty", "choose another folder")
    return None


def _check_whole(output: Path, manifest: Manifest) -> None:
    """Raises OutputError if a file of a finished folder is gone or of another size."""
    for name, digest in manifest.files.items():
        path = output / name
        if not path.is_file() or path.stat().st_size != digest.size:
            raise OutputError(
                f"{output} was finished, but {name} is damaged or gone", "remove the folder and start again"
            )


def _is_of(plan: Plan, manifest: Manifest) -> bool:
    """Whether a finished folder came from this plan and these very weights, by their hashes."""
    planned = [
        (weight.stored.name, weight.target.module.name, weight.target.rank, weight.target.alpha)
        for weight in plan.weights
    ]
    found = [(weight.tensor, weight.module, weight.rank, weight.alpha) for weight in manifest.weights]
    sizes = {shard.name: shard.source.header.file_size for shard in plan.shards}
    configs = {name: hashlib.sha256(data).hexdigest() for name, data in plan.generated.items()}
    same = (
        manifest.settings == plan.settings.as_dict()
        and configs == {name: digest.sha256 for name, digest in manifest.files.items() if name in configs}
        and planned == found
        and sizes == {name: digest.size for name, digest in manifest.source.files.items()}
    )
    return same and all(
        sha256_file(shard.source.path)[1] == manifest.source.files[shard.name].sha256 for shard in plan.shards
    )


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


def _remove_output(plan: Plan, output: Path, absent: Sequence[Path]) -> None:
    """Leave nothing of a run whose input turned out to be bad, nor the folders that were ``absent``, deepest first."""
    names = [shard.name for shard in plan.shards] + [
        *plan.generated,
        f"{ADAPTER_FOLDER}/{ADAPTER_NAME}",
        CARD_NAME,
    ]
    for name in names:
        (output / name).unlink(missing_ok=True)
    WorkFolder(output, plan.digest).remove()
    for folder in absent:
        with suppress(OSError):  # somebody else's files in it
            folder.rmdir()
