"""``merge``: a base and its adapter as one full checkpoint, streamed, in the base's own layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch

from pissa_hub import __version__
from pissa_hub.adapter.initial import INITIAL_FILES, Initial, open_decomposed
from pissa_hub.adapter.merge_plan import MergedShard, MergePlan, plan_merge
from pissa_hub.adapter.merge_record import MERGE_NAME, MergeRecord, load_merge
from pissa_hub.adapter.merger import Merger
from pissa_hub.adapter.pairs import Pair, pair_up, require_descent
from pissa_hub.adapter.peft_files import ADAPTER_FILES, CONVERSION_NAME, Adapter, open_adapter
from pissa_hub.adapter.record import load_conversion
from pissa_hub.adapter.workers import Worker, in_order, team_of
from pissa_hub.checkpoint.files import Files, Pin
from pissa_hub.checkpoint.index import INDEX_NAME
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.checkpoint.writer import FileDigest, copy_file_atomic, make_folder, write_file_atomic
from pissa_hub.errors import AdapterError, OutputError, PlanError, VerificationError
from pissa_hub.hub.card import merged_card
from pissa_hub.hub.pull import pull_checkpoint, pull_folder
from pissa_hub.manifest import MANIFEST_NAME, SourceRecord, file_digests
from pissa_hub.model.modules import resolve_layout
from pissa_hub.pipeline.device import pick_devices, worker_count
from pissa_hub.pipeline.job import carry_out
from pissa_hub.pipeline.output import check_whole
from pissa_hub.pipeline.receipts import Receipt, WorkFolder, pinned_commits
from pissa_hub.pipeline.settings import ADAPTER_DTYPES, SOURCE_DTYPE
from pissa_hub.progress import Progress, Silent

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Merged:
    """What a call of :func:`merge` did.

    Attributes:
        record: of the folder.
        was_finished: whether the folder had been finished before and nothing was done.
        carried_over: shards that an earlier, interrupted run had finished.
    """

    record: MergeRecord
    was_finished: bool
    carried_over: int


def merge(
    residual: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str = SOURCE_DTYPE,
    trust_init: bool = False,
    device: str = "auto",
    devices: str | None = None,
    keep_source: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Merge a trained adapter into the base that it was trained on.

    DoRA, biases, whole modules and embeddings too. A folder that an interrupted call left is carried on with.

    Args:
        residual: folder that ``decompose`` wrote; or the original checkpoint, for an adapter that ``convert`` wrote.
        adapter: folder that the trainer, or ``convert``, saved. Both may be ``org/name[@revision]`` on the Hub.
        output: folder to write; absent, empty, or of the same merge.
        dtype: of the result: ``source`` (each tensor's in the original), float32, bfloat16 or float16.
        trust_init: skip the check that the adapter descends from the residual's ``pissa_init`` by its content.
        device, devices: see :func:`pissa_hub.decompose`.
        keep_source: see :func:`pissa_hub.decompose`.
        progress: told how far it is.

    Raises:
        PissaHubError: see ``errors``; for a bad input nothing is left behind.
    """
    if dtype not in (SOURCE_DTYPE, *ADAPTER_DTYPES):
        raise PlanError(f"dtype {dtype!r} cannot be used", f"use {SOURCE_DTYPE}, {', '.join(ADAPTER_DTYPES)}")
    where, progress = pick_devices(device, devices), progress or Silent()
    pins = pinned_commits(Path(output))
    pulled = pull_folder(adapter, {*ADAPTER_FILES, CONVERSION_NAME}, pins=pins)
    trained, checkpoint = open_adapter(pulled.folder), pull_checkpoint(residual, pins=pins, keep=keep_source)
    parent = _residual(checkpoint, trained) if checkpoint.files.has(MANIFEST_NAME) else _original(trained)
    _require_shards(checkpoint, parent)
    _require_intact(checkpoint, parent)
    shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
    plan = plan_merge(checkpoint, resolve_layout(checkpoint.config, shapes), trained, dtype, parent.source_dtypes)
    if parent.initial is not None:
        pairs = pair_up(trained, parent.initial)
        if not trust_init and not (Path(output) / MERGE_NAME).exists():
            _require_descent(trained, parent.initial, pairs, where[0], progress)
    digests = {name: FileDigest(*sha256_file(trained.folder / name)) for name in ADAPTER_FILES}
    job = _Merging(plan, trained, pulled.pin, parent, dtype, where[0], digests)
    done = carry_out(job, Path(output), progress, devices=where)
    return Merged(done.result, done.was_finished, done.carried_over)


@dataclass(frozen=True)
class _Parent:
    """What is known of a base.

    Attributes:
        source: the original model.
        record: name of the file that says so.
        files: digests of the base's own shards and other files; empty if nothing is known of them.
        source_dtypes: tensor -> safetensors dtype in the original, of those that were decomposed.
        initial: the adapter that belongs to a residual base; None for an original.
    """

    source: SourceRecord
    record: str
    files: Mapping[str, FileDigest]
    source_dtypes: Mapping[str, str]
    initial: Initial | None

    def another(self, path: PurePath) -> VerificationError:
        """The error of a base that is not the one that the record names."""
        remedy = "give the original base" if self.initial is None else "download or decompose the base again"
        return VerificationError(f"{path} is not what {self.record} names", remedy)


def _residual(checkpoint: Checkpoint, trained: Adapter) -> _Parent:
    for name in INITIAL_FILES:
        checkpoint.files.find(name)
    initial, manifest = open_decomposed(checkpoint.root)
    if (trained.folder / CONVERSION_NAME).exists():
        raise AdapterError(
            f"{trained.folder} is converted: it belongs to the original, and {checkpoint.place} is a residual base",
            "give the original checkpoint, or the adapter as it was trained",
        )
    dtypes = {weight.tensor: weight.source_dtype for weight in manifest.weights}
    return _Parent(manifest.source, MANIFEST_NAME, manifest.files, dtypes, initial)


def _original(trained: Adapter) -> _Parent:
    if not (trained.folder / CONVERSION_NAME).exists():
        raise AdapterError(
            f"the base has no {MANIFEST_NAME}, and {trained.folder} is no adapter that convert wrote for an original",
            "give the folder that decompose wrote and the adapter was trained on",
        )
    record = load_conversion(trained.folder)
    base, digests = record.base, file_digests(record.base["files"])
    for name in ADAPTER_FILES:
        if record.files.get(name) != FileDigest(*sha256_file(trained.folder / name)):
            raise AdapterError(f"{trained.folder / name} is not what {CONVERSION_NAME} names", "convert it again")
    source = SourceRecord(base["repo_id"], base["revision"], base["license"], digests)
    return _Parent(source, CONVERSION_NAME, digests, {}, None)


def _require_shards(checkpoint: Checkpoint, parent: _Parent) -> None:
    """By names and sizes, before any work; what they hold is hashed on the way."""
    if not parent.files and parent.initial is None:
        return
    for shard in checkpoint.shards:
        known = parent.files.get(shard.name)
        if known is None or known.size != shard.header.file_size:
            raise parent.another(checkpoint.place / shard.name)


def _require_intact(checkpoint: Checkpoint, parent: _Parent) -> None:
    """Raises VerificationError if a small file that is carried over is not as the record says."""
    for name in {*checkpoint.other_files, INDEX_NAME} & parent.files.keys():
        path = checkpoint.files.find(name)
        if path is not None and FileDigest(*sha256_file(path)) != parent.files[name]:
            raise parent.another(checkpoint.place / name)


def _require_descent(
    trained: Adapter, initial: Initial, pairs: Sequence[Pair], device: torch.device, progress: Progress
) -> None:
    jobs = [partial(Worker.cosines, pair=pair) for pair in pairs if pair.initial]
    with team_of(trained, initial.adapter, device, progress) as team:
        require_descent(list(in_order(team, jobs)), initial)


@dataclass(frozen=True)
class _Merging:
    """A merge as a job; see ``pipeline.job``."""

    plan: MergePlan
    adapter: Adapter
    adapter_pin: Pin | None
    parent: _Parent
    dtype: str
    device: torch.device
    adapter_files: Mapping[str, FileDigest]

    marker = MERGE_NAME

    @property
    def inputs(self) -> Mapping[str, Path]:
        return {"base": self.plan.checkpoint.root, "adapter": self.adapter.folder}

    @property
    def source(self) -> Files:
        return self.plan.checkpoint.files

    @property
    def pins(self) -> Collection[Pin]:
        return [pin for pin in (self.source.pin, self.adapter_pin) if pin]

    @property
    def digest(self) -> str:
        shards = [
            [shard.source.name, _sha256(shard.source.header.raw), _sha256(shard.output.raw)] for shard in self.shards
        ]
        generated = {name: _sha256(data) for name, data in self.plan.generated.items()}
        adapter = {name: digest.sha256 for name, digest in self.adapter_files.items()}
        whole = ["merge", __version__, self.settings, shards, generated, adapter, self.plan.checkpoint.other_files]
        return _sha256(json.dumps(whole, sort_keys=True).encode())

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"dtype": self.dtype}

    @property
    def shards(self) -> Sequence[MergedShard]:
        return self.plan.shards

    @property
    def workers(self) -> int:
        return worker_count(max((weight.stored.numel for weight in self.plan.weights), default=0), self.device)

    @property
    def file_names(self) -> Collection[str]:
        shards = [shard.source.name for shard in self.shards]
        return {*shards, *self.plan.generated, *self.plan.checkpoint.other_files, CARD_NAME}

    def worker(self, device: torch.device) -> Merger:
        return Merger(self.adapter, device)

    def disk_bytes(self, held: frozenset[str]) -> int:
        carried = sum(self.source.size(name) for name in self.plan.checkpoint.other_files)
        return carried + sum(shard.output.file_size for shard in self.shards if shard.source.name not in held)

    def load(self, output: Path) -> MergeRecord:
        return load_merge(output)

    def recognise(self, output: Path) -> MergeRecord:
        record = self.load(output)
        if (record.settings, record.adapter) != (self.settings, self.adapter_files):
            raise OutputError(f"{output} holds another merge", "choose another folder or remove it")
        check_whole(output, record.files)
        for shard in self.shards:
            known = record.shards.get(shard.source.name)
            if known is None or not self.source.holds(shard.source.name, known):
                raise OutputError(f"{output} holds a merge of another base", "choose another folder or remove it")
        return record

    def accept(self, receipt: Receipt) -> None:
        if self.parent.files and self.parent.files.get(receipt.shard) != receipt.source:
            raise self.parent.another(self.source.place / receipt.shard)

    def finish(self, receipts: Sequence[Receipt], output: Path, work: WorkFolder) -> MergeRecord:
        files = {receipt.shard: receipt.output for receipt in receipts}
        for name, data in self.plan.generated.items():
            files[name] = write_file_atomic(output / name, data)
        for name in self.plan.checkpoint.other_files:
            if name not in files:
                make_folder((output / name).parent)
                files[name] = copy_file_atomic(self.source.path(name), output / name)
        source = self.parent.source
        files[CARD_NAME] = write_file_atomic(output / CARD_NAME, merged_card(source).encode())
        record = MergeRecord(
            tool={"name": "pissa_hub", "version": __version__},
            settings=self.settings,
            base={"repo_id": source.repo_id, "revision": source.revision, "license": source.license},
            shards={receipt.shard: receipt.source for receipt in receipts},
            adapter=self.adapter_files,
            notes=self.plan.notes,
            files=files,
        )
        write_file_atomic(output / MERGE_NAME, record.to_bytes())
        return record


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
