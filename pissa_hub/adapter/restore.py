"""``restore``: the folder that ``decompose`` wrote, from the original checkpoint and the initial adapter; no SVD."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pissa_hub.adapter.initial import INITIAL_FILES, open_decomposed
from pissa_hub.adapter.restoration import Restoration, plan_restoration
from pissa_hub.checkpoint.files import Files, Pin
from pissa_hub.checkpoint.reader import read_small
from pissa_hub.checkpoint.writer import copy_file_atomic, make_folder, write_file_atomic
from pissa_hub.errors import MatrixError, OutputError
from pissa_hub.hub.pull import pull_folder, pull_original
from pissa_hub.manifest import MANIFEST_NAME, Manifest, load_manifest
from pissa_hub.pipeline.device import pick_devices, worker_count
from pissa_hub.pipeline.job import carry_out
from pissa_hub.pipeline.output import check_whole
from pissa_hub.pipeline.plan import ShardPlan
from pissa_hub.pipeline.receipts import Receipt, WorkFolder, pinned_commits
from pissa_hub.pipeline.workers import Restorer
from pissa_hub.progress import Progress


@dataclass(frozen=True)
class Restored:
    """What a call of :func:`restore` did.

    Attributes:
        manifest: of the folder.
        was_finished: whether the folder had been finished before and nothing was done.
        carried_over: shards that an earlier, interrupted run had finished.
    """

    manifest: Manifest
    was_finished: bool
    carried_over: int


def restore(
    source: str | Path,
    init: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    devices: str | None = None,
    keep_source: bool = True,
    progress: Progress | None = None,
) -> Restored:
    """Write the folder that ``decompose`` wrote once more, byte for byte.

    A folder that an interrupted call left is carried on with; one that is finished is left as it is.

    Args:
        source: folder of the checkpoint that was decomposed, or ``org/name[@revision]`` on the Hub.
        init: folder with ``pissa_manifest.json`` and ``pissa_init/``, or that ``pissa_init`` itself; or a repository.
        output: folder to write; absent, empty, or of the same restoration.
        device, devices: see :func:`pissa_hub.decompose`.
        keep_source: see :func:`pissa_hub.decompose`.
        progress: told how far it is.

    Raises:
        ManifestError: ``init`` has no manifest that can be used.
        AdapterError: its adapter is not the one that the manifest names.
        VerificationError: the source is not the one that the manifest names, or a file comes out with another hash.
        PissaHubError: see ``errors``; in all these cases nothing is left behind.
    """
    pins = pinned_commits(Path(output))
    started_from = pull_folder(init, INITIAL_FILES, pins=pins)
    initial, manifest = open_decomposed(started_from.folder)
    plan = plan_restoration(pull_original(source, pins=pins, keep=keep_source), initial, manifest)
    try:
        where = pick_devices(device, devices)
        done = carry_out(_Restoring(plan, started_from.pin, where[0]), Path(output), progress, devices=where)
    except MatrixError as error:  # not with the weights that were decomposed
        raise plan.not_the_source(error.fact) from None
    return Restored(manifest, done.was_finished, done.carried_over)


@dataclass(frozen=True)
class _Restoring:
    """A restoration as a job."""

    plan: Restoration
    init_pin: Pin | None
    device: torch.device

    marker = MANIFEST_NAME

    @property
    def inputs(self) -> Mapping[str, Path]:
        return {"source": self.plan.checkpoint.root, "folder of the initial adapter": self.plan.root}

    @property
    def source(self) -> Files:
        return self.plan.checkpoint.files

    @property
    def pins(self) -> Collection[Pin]:
        return [pin for pin in (self.source.pin, self.init_pin) if pin]

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"restore " + read_small(self.plan.root / MANIFEST_NAME)).hexdigest()

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.plan.manifest.settings

    @property
    def shards(self) -> Sequence[ShardPlan]:
        return self.plan.shards

    @property
    def workers(self) -> int:
        numels = [weight.stored.numel for shard in self.plan.shards for weight in shard.weights.values()]
        return worker_count(max(numels), self.device)

    @property
    def file_names(self) -> Collection[str]:
        return self.plan.manifest.files

    def worker(self, device: torch.device) -> Restorer:
        return Restorer(self.plan.adapter, self.plan.adapter_header, device)

    def disk_bytes(self, held: frozenset[str]) -> int:
        return sum(digest.size for name, digest in self.plan.manifest.files.items() if name not in held)

    def load(self, output: Path) -> Manifest:
        return load_manifest(output)

    def recognise(self, output: Path) -> Manifest:
        if read_small(output / MANIFEST_NAME) != read_small(self.plan.root / MANIFEST_NAME):
            raise OutputError(f"{output} holds another decomposition", "choose another folder or remove it")
        check_whole(output, self.plan.manifest.files)
        for shard in self.plan.shards:
            if not self.source.holds(shard.name, self.plan.manifest.source.files[shard.name]):
                raise self.plan.not_the_source(f"{shard.name} differs")
        return self.plan.manifest

    def accept(self, receipt: Receipt) -> None:
        self.plan.require_source(receipt.shard, receipt.source)
        self.plan.require_same(receipt.shard, receipt.output)

    def finish(self, receipts: Sequence[Receipt], output: Path, work: WorkFolder) -> Manifest:
        for name, content in self.plan.others.items():
            make_folder((output / name).parent)
            if isinstance(content, bytes):
                digest = write_file_atomic(output / name, content)
            else:
                digest = copy_file_atomic(content, output / name)
            self.plan.require_same(name, digest)
        copy_file_atomic(self.plan.root / MANIFEST_NAME, output / MANIFEST_NAME)
        return self.plan.manifest
