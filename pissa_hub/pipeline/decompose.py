"""``decompose``: a checkpoint into a residual base and a PiSSA adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pissa_hub.checkpoint.files import Files, Pin
from pissa_hub.errors import ManifestError, OutputError
from pissa_hub.hub.card_data import source_metadata
from pissa_hub.hub.publish import Published
from pissa_hub.hub.publish_release import Base
from pissa_hub.hub.publish_stream import Publication, published_place
from pissa_hub.hub.pull import pull_original
from pissa_hub.manifest import MANIFEST_NAME, Manifest, load_manifest
from pissa_hub.model.modules import resolve_layout
from pissa_hub.pipeline.destination import InPlace
from pissa_hub.pipeline.device import pick_devices, worker_count
from pissa_hub.pipeline.finish import CARD_NAME, finish
from pissa_hub.pipeline.job import carry_out
from pissa_hub.pipeline.output import check_whole
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, ADAPTER_NAME, Plan, ShardPlan, make_plan
from pissa_hub.pipeline.receipts import Receipt, WorkFolder, pinned_commits
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.workers import Decomposer
from pissa_hub.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`decompose` did.

    Attributes:
        plan: the plan that was followed.
        manifest: of the finished folder.
        was_finished: whether the folder had been finished before and nothing was done.
        carried_over: shards that an earlier, interrupted run had finished.
        published: what changed on the Hub; None if it was not to be published.
    """

    plan: Plan
    manifest: Manifest
    was_finished: bool
    carried_over: int
    published: Published | None = None


def plan_decomposition(
    source: str | Path, settings: Settings, output: Path | None = None, *, keep_source: bool = True
) -> Plan:
    """The plan for a source, from headers and config.json alone; see ``pipeline.plan``.

    Args:
        source: see :func:`decompose`.
        settings: what is asked for.
        output: where it is to be followed: the unfinished work in it knows the commit of a source on the Hub.
        keep_source: see :func:`decompose`.

    Raises:
        PissaHubError: the source is not a usable checkpoint, or the settings do not fit it.
    """
    pins = {} if output is None else pinned_commits(output)
    checkpoint = pull_original(source, pins=pins, keep=keep_source)
    shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
    return make_plan(checkpoint, resolve_layout(checkpoint.config, shapes), settings)


def decompose(
    source: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    devices: str | None = None,
    keep_source: bool = True,
    publish: str | None = None,
    private: bool | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Outcome:
    """Decompose a checkpoint into a residual base and a PiSSA adapter.

    A folder that an interrupted call left is carried on with; one that is finished is left as it is.

    Args:
        source: folder of a safetensors checkpoint, or ``org/name[@revision]`` on the Hub.
        output: folder to write; absent, empty, or of the same plan.
        device: ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ...
        devices: several, with commas between, or ``all``: a process for each shares the work. So do the processes of
            torchrun and srun, each with its own GPU.
        keep_source: whether the shards of a source on the Hub stay in the client's cache; if not, two of them are
            on the disk at most.
        publish: ``owner/name`` on the Hub. Each finished shard is uploaded to a branch ``pissa-upload-*`` there and its
            file removed; the last step makes the release in one commit and deletes that branch. What stays in
            ``output``, all but the shards, is enough for ``convert`` and ``restore``.
        private: of a new repository, as of :func:`pissa_hub.publish`.
        progress: told how far it is.
        settings: fields of :class:`~pissa_hub.pipeline.settings.Settings`, e.g. ``rank=64``.

    Raises:
        PissaHubError: see ``errors``; for a bad input nothing is left behind.
    """
    plan = plan_decomposition(source, Settings(**settings), Path(output), keep_source=keep_source)
    publication = None if publish is None else partial(open_publication, plan, publish, private, progress)
    return run(plan, Path(output), pick_devices(device, devices), progress, publication)


def run(
    plan: Plan,
    output: Path,
    devices: Sequence[torch.device],
    progress: Progress | None = None,
    publication: Callable[[], Publication] | None = None,
) -> Outcome:
    """Follow a plan; see :func:`decompose`. ``publication`` is called once the output folder may be used."""
    job = _Decomposition(plan, devices[0], is_published=publication is not None)
    done = carry_out(job, output, progress, publication or InPlace, devices)
    return Outcome(plan, done.result, done.was_finished, done.carried_over, done.delivered)


def open_publication(plan: Plan, repo_id: str, private: bool | None, progress: Progress | None) -> Publication:
    """Where a plan's shards are to be published. Raises HubError if they may not be."""
    checkpoint = plan.checkpoint
    return Publication(
        repo_id,
        plan.digest,
        base=Base(checkpoint.repo_id, checkpoint.revision, checkpoint.license),
        metadata=source_metadata(checkpoint.readme),
        auto_class=plan.layout.auto_class,
        private=private,
        progress=progress,
    )


def publishing_bytes(plan: Plan, finished: frozenset[str] = frozenset()) -> int:
    """``Plan.disk_bytes`` where one shard is on the disk at once."""
    shards = [shard.output.file_size for shard in plan.shards if shard.name not in finished]
    return plan.disk_bytes(finished) - sum(shards) + max(shards, default=0)


@dataclass(frozen=True)
class _Decomposition:
    """A plan as a job."""

    plan: Plan
    device: torch.device
    is_published: bool

    marker = MANIFEST_NAME

    @property
    def inputs(self) -> Mapping[str, Path]:
        return {"source": self.plan.checkpoint.root}

    @property
    def source(self) -> Files:
        return self.plan.checkpoint.files

    @property
    def pins(self) -> Collection[Pin]:
        return [self.source.pin] if self.source.pin else []

    @property
    def digest(self) -> str:
        return self.plan.digest

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.plan.settings.as_dict()

    @property
    def shards(self) -> Sequence[ShardPlan]:
        return self.plan.shards

    @property
    def workers(self) -> int:
        return worker_count(max(weight.stored.numel for weight in self.plan.weights), self.device)

    @property
    def file_names(self) -> Collection[str]:
        plan, adapter = self.plan, f"{ADAPTER_FOLDER}/{ADAPTER_NAME}"
        shards = [shard.name for shard in plan.shards]
        return [*shards, adapter, *plan.generated, *plan.checkpoint.other_files, CARD_NAME]

    def worker(self, device: torch.device) -> Decomposer:
        return Decomposer(self.plan.settings, device)

    def disk_bytes(self, held: frozenset[str]) -> int:
        return publishing_bytes(self.plan, held) if self.is_published else self.plan.disk_bytes(held)

    def load(self, output: Path) -> Manifest:
        return load_manifest(output)

    def recognise(self, output: Path) -> Manifest:
        try:
            manifest = self.load(output)
        except ManifestError as error:
            raise OutputError(f"{output} is not empty ({error.fact})", "choose another folder") from None
        if not _is_of(self.plan, manifest):
            raise OutputError(
                f"{output} holds another decomposition, of other weights or settings",
                "choose another folder or remove it",
            )
        shards = [name for name in manifest.source.files if not (output / name).exists()]
        place = published_place(output)
        if shards and place and not self.is_published:
            raise OutputError(
                f"{output} is finished, and its shards are on the Hub alone, as {place}",
                f"use {place}, or choose another folder",
            )
        gone = shards if self.is_published else []
        check_whole(output, {name: digest for name, digest in manifest.files.items() if name not in gone})
        return manifest

    def accept(self, receipt: Receipt) -> None:
        """Any checkpoint will do."""

    def finish(self, receipts: Sequence[Receipt], output: Path, work: WorkFolder) -> Manifest:
        return finish(self.plan, receipts, output, work)


def _is_of(plan: Plan, manifest: Manifest) -> bool:
    """Whether a finished folder came from this plan and these very weights, by their hashes."""
    planned = [(weight.stored.name, weight.name, weight.target.rank, weight.target.alpha) for weight in plan.weights]
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
        plan.checkpoint.files.holds(shard.name, manifest.source.files[shard.name]) for shard in plan.shards
    )
