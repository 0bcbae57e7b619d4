"""What a finished folder becomes on the Hub: its files, verified, and the few that are written anew for their place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pissa_hub.adapter.config import to_json
from pissa_hub.adapter.merge_record import MergeRecord
from pissa_hub.checkpoint.ancillary import read_readme
from pissa_hub.checkpoint.source import read_checkpoint
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import PlanError, VerificationError
from pissa_hub.finished import Kind, Record, open_finished
from pissa_hub.hub.card import decomposed_card, initial_adapter_card, lora_card, merged_card
from pissa_hub.hub.card_data import Metadata, source_metadata
from pissa_hub.hub.card_text import Place
from pissa_hub.manifest import MANIFEST_NAME, Manifest, SourceRecord
from pissa_hub.model.modules import resolve_layout
from pissa_hub.pipeline.finish import CARD_NAME
from pissa_hub.pipeline.plan import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER
from pissa_hub.progress import Progress
from pissa_hub.report import spectra_png

PLOT_NAME = "pissa_spectra.png"

_ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME}"
_LEGAL = ("license", "licence", "notice", "use_policy", "copying")


@dataclass(frozen=True)
class Content:
    """A file to publish: bytes or where they lie, None where the Hub has them already; and their digest."""

    data: Path | bytes | None = field(repr=False)
    digest: FileDigest

    @staticmethod
    def of(data: bytes) -> Content:
        return Content(data, FileDigest(len(data), hashlib.sha256(data).hexdigest()))


@dataclass(frozen=True)
class Base:
    """The original model: identity on the Hub and licence, as far as they are known."""

    repo_id: str | None
    revision: str | None
    license: str | None


@dataclass(frozen=True)
class Release:
    """A folder that can be published.

    Attributes:
        folder: where it lies.
        kind: which command wrote it.
        base: what it was made from.
        metadata: what the original's card hands on, by the folder's own card.
        record_name: file name of its record.
        record: names every other file.
    """

    folder: Path
    kind: Kind
    base: Base
    metadata: Metadata
    record_name: str
    record: Record = field(repr=False)

    @property
    def digests(self) -> Mapping[str, FileDigest]:
        """Of every file but the record."""
        return self.record.files


def open_release(folder: str | Path) -> Release:
    """Tell by its record what a folder is; nothing is hashed yet.

    Raises:
        OutputError: it is not a folder that decompose, merge or convert has finished.
        ManifestError, OutputError, AdapterError: its record cannot be used.
    """
    finished = open_finished(folder)
    record = finished.record
    if isinstance(record, Manifest):
        base = Base(record.source.repo_id, record.source.revision, record.source.license)
    else:
        base = Base(*(record.base[key] for key in ("repo_id", "revision", "license")))
    metadata = source_metadata(read_readme(finished.folder))
    return Release(finished.folder, finished.kind, base, metadata, finished.record_name, record)


def check_release(release: Release, progress: Progress) -> None:
    """Verify every byte.

    Raises:
        VerificationError: the folder is not what its record says, or holds other files too.
    """
    from pissa_hub.verification import verify

    findings = verify(release.folder, progress=progress)
    problem = next((problem for check in findings.checks for problem in check.problems), None)
    if problem:
        restorable = "; restore writes it anew, without SVD" if release.kind == "decomposition" else ""
        raise VerificationError(
            f"{release.folder} is not sound: {problem}", f"see `pissa-hub verify {release.folder}`{restorable}"
        )


def full_contents(
    release: Release,
    repo_id: str,
    branch: str | None,
    metadata: Metadata,
    *,
    on_hub: Collection[str] = (),
    auto_class: str | None = None,
) -> dict[str, Content]:
    """Every file of the repository: the folder's, with card, adapter configuration and record made for the Hub.

    The published record names the published files, so that a downloaded copy verifies.

    Args:
        release: verified.
        repo_id: where it goes.
        branch: if not the default one.
        metadata: for the card.
        on_hub: names of files that need not lie in the folder.
        auto_class: transformers class that loads it; found out from the folder if not given.
    """
    root = release.folder
    contents = {
        name: Content(None if name in on_hub else root / name, digest) for name, digest in release.digests.items()
    }
    contents.pop(PLOT_NAME, None)
    place = Place(repo_id, branch)
    if isinstance(release.record, Manifest):
        manifest = release.record
        contents[_ADAPTER_CONFIG] = Content.of(_adapter_config(root / _ADAPTER_CONFIG, repo_id, branch))
        picture = _picture(manifest)
        if picture is not None:
            contents[PLOT_NAME] = Content.of(picture)
            place = replace(place, plot=PLOT_NAME)
        card = decomposed_card(manifest, auto_class or _auto_class(root), metadata, place)
    elif isinstance(release.record, MergeRecord):
        base = release.base
        source = SourceRecord(base.repo_id, base.revision, base.license, {})
        card = merged_card(source, _auto_class(root), metadata, place)
    else:
        task_type = json.loads((root / ADAPTER_CONFIG_NAME).read_bytes()).get("task_type")
        card = lora_card(release.record, task_type, metadata, place)
    contents[CARD_NAME] = Content.of(card.encode())
    files = {name: content.digest for name, content in contents.items()}
    contents[release.record_name] = Content.of(replace(release.record, files=files).to_bytes())
    return contents


def initial_adapter_contents(
    release: Release, repo_id: str, branch: str | None, metadata: Metadata
) -> dict[str, Content]:
    """The initial adapter, the manifest and the licence of a decomposition, unchanged, and a card of their own.

    ``restore`` makes from them and the original the folder as ``decompose`` wrote it.

    Raises:
        PlanError: it is no decomposition.
    """
    if not isinstance(release.record, Manifest):
        raise PlanError(
            f"--adapter-only is for decomposed folders, and {release.folder} is a {release.kind}", "leave it"
        )
    root = release.folder
    contents = {
        name: Content(root / name, digest)
        for name, digest in release.digests.items()
        if name.startswith(f"{ADAPTER_FOLDER}/") or name.lower().startswith(_LEGAL)
    }
    card = initial_adapter_card(release.record, metadata, Place(repo_id, branch))
    contents[CARD_NAME] = Content.of(card.encode())
    contents[MANIFEST_NAME] = Content.of((root / MANIFEST_NAME).read_bytes())
    return contents


def _adapter_config(path: Path, repo_id: str, branch: str | None) -> bytes:
    """adapter_config.json that names the residual base as its own, where PEFT looks for it."""
    config = json.loads(path.read_bytes())
    config.pop("revision", None)
    return to_json({**config, "base_model_name_or_path": repo_id, **({"revision": branch} if branch else {})})


def _auto_class(root: Path) -> str:
    """The transformers class that loads a checkpoint."""
    checkpoint = read_checkpoint(root)
    shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
    return resolve_layout(checkpoint.config, shapes).auto_class


def _picture(manifest: Manifest) -> bytes | None:
    try:
        return spectra_png(manifest)
    except ImportError:
        return None
