"""What a finished folder becomes on the Hub: its files, verified, and the few that are written anew for their place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pissa_hub.adapter.config import to_json
from pissa_hub.adapter.merge_record import MERGE_NAME, load_merge
from pissa_hub.adapter.peft_files import CONVERSION_NAME
from pissa_hub.adapter.record import load_conversion
from pissa_hub.checkpoint.ancillary import read_readme
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import read_checkpoint
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import ManifestError, OutputError, PlanError, VerificationError
from pissa_hub.hub.card import decomposed_card, initial_adapter_card, lora_card, merged_card
from pissa_hub.hub.card_data import Metadata, source_metadata
from pissa_hub.hub.card_text import Place
from pissa_hub.manifest import MANIFEST_NAME, Manifest, SourceRecord, load_manifest
from pissa_hub.model.modules import resolve_layout
from pissa_hub.pipeline.finish import CARD_NAME
from pissa_hub.pipeline.plan import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER
from pissa_hub.pipeline.receipts import WORK_FOLDER
from pissa_hub.progress import Progress
from pissa_hub.report import spectra_png

PLOT_NAME = "pissa_spectra.png"
RECORD_NAMES = (MANIFEST_NAME, MERGE_NAME, CONVERSION_NAME)

Kind = Literal["decomposed", "merged", "converted"]

_KINDS: Mapping[str, Kind] = {MANIFEST_NAME: "decomposed", MERGE_NAME: "merged", CONVERSION_NAME: "converted"}
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
        record: its manifest or other record, as parsed JSON.
    """

    folder: Path
    kind: Kind
    base: Base
    metadata: Metadata
    record: Mapping[str, Any] = field(repr=False)

    @property
    def record_name(self) -> str:
        return next(name for name, kind in _KINDS.items() if kind == self.kind)

    @property
    def digests(self) -> Mapping[str, FileDigest]:
        """Of every file but the record."""
        return {name: FileDigest(**digest) for name, digest in self.record["files"].items()}


def open_release(folder: str | Path) -> Release:
    """Tell by its record what a folder is; nothing is hashed yet.

    Raises:
        OutputError: it is not a folder that decompose, merge or convert has finished.
        ManifestError, AdapterError: its record cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise OutputError(f"{folder} is not a folder", "give one that decompose, convert or merge has written")
    name = next((name for name in RECORD_NAMES if (root / name).is_file()), None)
    if name is None and (root / WORK_FOLDER).exists():
        raise OutputError(f"{root} is unfinished", "run the command that began it once more")
    if name is None:
        raise OutputError(
            f"{root} has none of {', '.join(RECORD_NAMES)}", "give a folder that decompose, convert or merge finished"
        )
    kind = _KINDS[name]
    if kind == "decomposed":
        source = load_manifest(root).source
        base = Base(source.repo_id, source.revision, source.license)
    elif kind == "merged":
        base = _base(load_merge(root).base)
    else:
        base = _base(load_conversion(root).base)
    record = parse_object((root / name).read_bytes())
    release = Release(root, kind, base, source_metadata(read_readme(root)), record)
    for path in release.digests:
        parts = PurePosixPath(path).parts
        if not parts or PurePosixPath(path).is_absolute() or ".." in parts or set("\\:\0") & set(path):
            raise ManifestError(
                f"{root / name} names {path!r}, which points out of the folder", "write the folder anew"
            )
    return release


def check_release(release: Release, progress: Progress) -> None:
    """Verify every byte: of a decomposition all that ``verify`` checks, else every file's hash.

    Raises:
        VerificationError: the folder is not what its record says, or holds other files too.
    """
    root = release.folder
    if release.kind == "decomposed":
        from pissa_hub.verification import verify

        findings = verify(root, progress=progress)
        problems = [problem for check in findings.checks for problem in check.problems]
        if problems:
            raise VerificationError(
                f"{root} is not sound: {problems[0]}",
                f"see `pissa-hub verify {root}`; restore writes it anew, without SVD",
            )
        return
    progress.expect(sum(digest.size for digest in release.digests.values()))
    for name, digest in release.digests.items():
        progress.working_on(name)
        if not (root / name).is_file() or FileDigest(*sha256_file(root / name)) != digest:
            raise VerificationError(
                f"{root / name} is gone or not what {release.record_name} says", "write the folder anew"
            )
        progress.advance(digest.size)
    known = {*release.digests, release.record_name}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and relative.as_posix() not in known and not relative.parts[0].startswith("."):
            raise VerificationError(f"{path} is not in {release.record_name}", "move it out of the folder")


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
    if release.kind == "decomposed":
        manifest = load_manifest(root)
        contents[_ADAPTER_CONFIG] = Content.of(_adapter_config(root / _ADAPTER_CONFIG, repo_id, branch))
        picture = _picture(manifest)
        if picture is not None:
            contents[PLOT_NAME] = Content.of(picture)
            place = replace(place, plot=PLOT_NAME)
        card = decomposed_card(manifest, auto_class or _auto_class(root), metadata, place)
    elif release.kind == "merged":
        base = release.base
        source = SourceRecord(base.repo_id, base.revision, base.license, {})
        card = merged_card(source, _auto_class(root), metadata, place)
    else:
        task_type = json.loads((root / ADAPTER_CONFIG_NAME).read_bytes()).get("task_type")
        card = lora_card(load_conversion(root), task_type, metadata, place)
    contents[CARD_NAME] = Content.of(card.encode())
    files = {name: {"size": c.digest.size, "sha256": c.digest.sha256} for name, c in contents.items()}
    contents[release.record_name] = Content.of(_record_bytes(release, files))
    return contents


def initial_adapter_contents(
    release: Release, repo_id: str, branch: str | None, metadata: Metadata
) -> dict[str, Content]:
    """The initial adapter, the manifest and the licence of a decomposition, unchanged, and a card of their own.

    ``restore`` makes from them and the original the folder as ``decompose`` wrote it.

    Raises:
        PlanError: it is no decomposition.
    """
    if release.kind != "decomposed":
        raise PlanError(f"--adapter-only is for decomposed folders, and {release.folder} is {release.kind}", "leave it")
    root = release.folder
    manifest = load_manifest(root)
    contents = {
        name: Content(root / name, digest)
        for name, digest in release.digests.items()
        if name.startswith(f"{ADAPTER_FOLDER}/") or name.lower().startswith(_LEGAL)
    }
    card = initial_adapter_card(manifest, metadata, Place(repo_id, branch))
    contents[CARD_NAME] = Content.of(card.encode())
    contents[MANIFEST_NAME] = Content.of((root / MANIFEST_NAME).read_bytes())
    return contents


def _base(table: Mapping[str, Any]) -> Base:
    values = (table.get(key) for key in ("repo_id", "revision", "license"))
    return Base(*(value if isinstance(value, str) else None for value in values))


def _adapter_config(path: Path, repo_id: str, branch: str | None) -> bytes:
    """adapter_config.json that names the residual base as its own, where PEFT looks for it."""
    config = json.loads(path.read_bytes())
    config.pop("revision", None)
    return to_json({**config, "base_model_name_or_path": repo_id, **({"revision": branch} if branch else {})})


def _record_bytes(release: Release, files: Mapping[str, Any]) -> bytes:
    """The record in its writer's own form, with the published files."""
    table = {**release.record, "files": files}
    if release.kind == "decomposed":
        return (json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    return to_json(table)


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
