"""What a manifest, an initial adapter and the original checkpoint have to agree on before a residual is made anew.

The residual follows from W, A, B and s alone, so the adapter and the manifest, which are small, stand for the whole
decomposed folder. The manifest has the hash of every file: what has another one is not written, or not kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath

from pissa_hub.adapter.initial import Initial
from pissa_hub.checkpoint.header import Header, TensorSpec
from pissa_hub.checkpoint.index import INDEX_NAME
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import ManifestError, PissaHubError, VerificationError
from pissa_hub.hub.card import residual_card
from pissa_hub.manifest import MANIFEST_NAME, Manifest
from pissa_hub.model.modules import Kind, WeightModule, resolve_layout
from pissa_hub.model.targets import Target
from pissa_hub.pipeline.finish import CARD_NAME
from pissa_hub.pipeline.plan import (
    ADAPTER_FOLDER,
    ADAPTER_NAME,
    ShardPlan,
    index_bytes,
    make_plan,
    model_config,
    plan_shards,
)
from pissa_hub.pipeline.settings import Settings

_ADAPTER = f"{ADAPTER_FOLDER}/{ADAPTER_NAME}"
_AS_WRITTEN = "give the folder as decompose wrote it"


@dataclass(frozen=True)
class Restoration:
    """What ``restore`` will do.

    Attributes:
        checkpoint: the source.
        root: folder of the manifest and the initial adapter.
        manifest: what has to come out.
        shards: in name order, without parts of an adapter.
        adapter_header: of the initial adapter.
        others: name -> a file or bytes with the manifest's hash, for all that is not a shard.
    """

    checkpoint: Checkpoint
    root: Path
    manifest: Manifest = field(repr=False)
    shards: tuple[ShardPlan, ...] = field(repr=False)
    adapter_header: Header = field(repr=False)
    others: Mapping[str, Path | bytes] = field(repr=False)

    @property
    def adapter(self) -> Path:
        return self.root / _ADAPTER

    def not_the_source(self, difference: str) -> VerificationError:
        return _not_the_source(self.checkpoint, difference)

    def require_source(self, shard: str, found: FileDigest) -> None:
        """Raises VerificationError unless this is the shard that was decomposed."""
        if found != self.manifest.source.files[shard]:
            raise self.not_the_source(f"{shard} differs")

    def require_same(self, name: str, found: FileDigest) -> None:
        """Raises VerificationError unless this is the file that ``decompose`` wrote."""
        if found != self.manifest.files[name]:
            raise _other_bytes(self.manifest, name)


def plan_restoration(checkpoint: Checkpoint, initial: Initial, manifest: Manifest) -> Restoration:
    """Check all that can be checked before a weight is read.

    Args:
        checkpoint: the source.
        initial, manifest: what ``open_decomposed`` gave.

    Raises:
        VerificationError: the source is another one, or a file is not to be had with the hash that it must have.
        ManifestError: the manifest contradicts itself or the adapter.
        PlanError: its settings are of a newer version.
    """
    settings = Settings.from_dict(manifest.settings)
    _check_names(initial.root, manifest)
    _check_shards(checkpoint, manifest)
    shards = plan_shards(checkpoint, _targets(checkpoint, manifest), settings)
    header = initial.adapter.header
    for shard in shards:
        for weight in shard.weights.values():
            _check_factor(initial, weight.lora_A)
            _check_factor(initial, weight.lora_B)
        if shard.output.file_size != manifest.files[shard.name].size:
            raise _other_bytes(manifest, shard.name)
    return Restoration(
        checkpoint=checkpoint,
        root=initial.root,
        manifest=manifest,
        shards=tuple(replace(shard, adapter=None) for shard in shards),
        adapter_header=header,
        others=_others(checkpoint, initial.root, manifest, shards, settings),
    )


def _check_names(root: Path, manifest: Manifest) -> None:
    """Raises ManifestError for a name that leads out of the folder, or if a file that there must be has none."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or set("\\:\0") & set(name):
            raise ManifestError(f"{root / MANIFEST_NAME} names {name!r}, which points out of the folder", _AS_WRITTEN)
    for name in (*manifest.source.files, _ADAPTER):
        if name not in manifest.files:
            raise ManifestError(f"{root / MANIFEST_NAME} does not name {name!r}", _AS_WRITTEN)


def _check_shards(checkpoint: Checkpoint, manifest: Manifest) -> None:
    expected = {name: digest.size for name, digest in manifest.source.files.items()}
    found = {shard.name: shard.header.file_size for shard in checkpoint.shards}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise _not_the_source(checkpoint, f"{name} differs")


def _targets(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Target]:
    """What was decomposed: the manifest says so, whatever this version would choose."""
    stored = {entry.name: entry.spec for _, entry in checkpoint.tensors()}
    for record in manifest.weights:
        shape = record.shape[::-1] if record.is_transposed else record.shape
        if stored.get(record.tensor) != TensorSpec(record.tensor, record.source_dtype, shape):
            raise _not_the_source(checkpoint, f"it has no {record.tensor} of {record.source_dtype} {list(shape)}")
        kind: Kind = "conv1d" if record.is_transposed else "linear"
        yield Target(WeightModule(record.tensor, record.module, kind, shape), record.rank, record.alpha)


def _check_factor(initial: Initial, spec: TensorSpec) -> None:
    header = initial.adapter.header
    if spec.name not in header or header[spec.name].spec != spec:
        raise ManifestError(
            f"{initial.root / MANIFEST_NAME} names {spec.name} of {spec.dtype} {list(spec.shape)}, which the adapter "
            "beside it lacks",
            _AS_WRITTEN,
        )


def _others(
    checkpoint: Checkpoint, root: Path, manifest: Manifest, shards: tuple[ShardPlan, ...], settings: Settings
) -> dict[str, Path | bytes]:
    """For every file that is not a shard, what has its hash: beside the adapter, in the source, or planned anew."""
    others: dict[str, Path | bytes] = {_ADAPTER: root / _ADAPTER}
    for name, digest in manifest.files.items():
        if name in manifest.source.files or name in others:
            continue
        candidates: Iterator[Path | bytes] = chain(
            _found(name, checkpoint, root), _planned(name, checkpoint, manifest, shards, settings)
        )
        found = next((content for content in candidates if _digest_of(content) == digest), None)
        if found is None:
            raise VerificationError(
                f"{name} is neither in {checkpoint.place} nor in {root} as it was when that was decomposed",
                f"put the {name} of that time into one of them",
            )
        others[name] = found
    return others


def _found(name: str, checkpoint: Checkpoint, root: Path) -> Iterator[Path]:
    """The file, where it lies beside the adapter and in the source."""
    if (root / name).is_file():
        yield root / name
    path = checkpoint.files.find(name)
    if path is not None:
        yield path


def _planned(
    name: str, checkpoint: Checkpoint, manifest: Manifest, shards: tuple[ShardPlan, ...], settings: Settings
) -> Iterator[bytes]:
    """The file, if it follows from the plan."""
    if name == "config.json" and checkpoint.config is not None:
        yield model_config(checkpoint, [weight for shard in shards for weight in shard.weights.values()])
    elif name == INDEX_NAME and checkpoint.index is not None:
        yield index_bytes(checkpoint, shards)
    elif name == CARD_NAME:
        shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
        try:
            plan = make_plan(checkpoint, resolve_layout(checkpoint.config, shapes), settings)
        except PissaHubError:  # another transformers may see other modules
            return
        yield residual_card(plan, manifest).encode()


def _digest_of(content: Path | bytes) -> FileDigest:
    if isinstance(content, bytes):
        return FileDigest(len(content), hashlib.sha256(content).hexdigest())
    return FileDigest(*sha256_file(content))


def _not_the_source(checkpoint: Checkpoint, difference: str) -> VerificationError:
    return VerificationError(
        f"{checkpoint.place} is not the source of this decomposition: {difference}",
        "give the checkpoint that the manifest names",
    )


def _other_bytes(manifest: Manifest, name: str) -> VerificationError:
    return VerificationError(
        f"{name} comes out with other bytes than the manifest names",
        f"restore with pissa_hub {manifest.tool['version']} and torch {manifest.environment['torch']}, which wrote it",
    )
