"""Finished folders: what ``decompose``, ``merge`` or ``convert`` wrote, told by the record that it wrote last."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pissa_hub.adapter.merge_record import MERGE_NAME, MergeRecord, load_merge
from pissa_hub.adapter.peft_files import CONVERSION_NAME
from pissa_hub.adapter.record import ConversionRecord, load_conversion
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import OutputError
from pissa_hub.manifest import MANIFEST_NAME, Manifest, file_digests, load_manifest
from pissa_hub.pipeline.receipts import WORK_FOLDER

Kind = Literal["decomposition", "merge", "conversion"]
Record = Manifest | MergeRecord | ConversionRecord

_LOADERS: Mapping[str, Callable[[Path], Record]] = {
    MANIFEST_NAME: load_manifest,
    MERGE_NAME: load_merge,
    CONVERSION_NAME: load_conversion,
}
RECORD_NAMES = tuple(_LOADERS)
_KINDS: Mapping[type[Record], Kind] = {Manifest: "decomposition", MergeRecord: "merge", ConversionRecord: "conversion"}


@dataclass(frozen=True)
class Finished:
    """A finished folder.

    Attributes:
        folder: where it lies.
        record_name: file name of its record.
        record: names every other file of it.
    """

    folder: Path
    record_name: str
    record: Record = field(repr=False)

    @property
    def kind(self) -> Kind:
        return _KINDS[type(self.record)]

    @property
    def shards(self) -> Collection[str]:
        """Names of the files that hold a checkpoint's weights; none of an adapter."""
        return () if isinstance(self.record, ConversionRecord) else self.sources

    @property
    def sources(self) -> Mapping[str, FileDigest]:
        """Name -> digest of the shards of what it was made from; empty where they are not known."""
        if isinstance(self.record, ConversionRecord):
            return file_digests(self.record.base["files"])
        return self.record.source.files if isinstance(self.record, Manifest) else self.record.shards


def open_finished(folder: str | Path) -> Finished:
    """Read the record of a folder; nothing is hashed but that.

    Raises:
        OutputError: it is not a folder that decompose, merge or convert has finished.
        ManifestError, OutputError, AdapterError: its record cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise OutputError(f"{folder} is not a folder", "give one that decompose, convert or merge has written")
    name = next((name for name in RECORD_NAMES if (root / name).is_file()), None)
    if name is None and (root / WORK_FOLDER).exists():
        raise OutputError(f"{root} is unfinished", "run the command that began it once more")
    if name is None:
        raise OutputError(
            f"{root} has no {', '.join(RECORD_NAMES[:-1])} or {RECORD_NAMES[-1]}",
            "give a folder that decompose, convert or merge finished",
        )
    return Finished(root, name, _LOADERS[name](root))
