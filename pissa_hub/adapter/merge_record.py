"""pissa_merge.json: what a merged checkpoint was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import OutputError
from pissa_hub.manifest import file_digests
from pissa_hub.seal import SEAL, read_sealed, sealed

MERGE_NAME = "pissa_merge.json"
FORMAT = "pissa-hub-merge"
VERSION = 1
_DIGESTS = ("shards", "adapter", "files")


@dataclass(frozen=True)
class MergeRecord:
    """The whole file.

    Attributes:
        tool: name and version.
        settings: what was asked for.
        base: the original model's repo_id, revision and license, as far as they are known.
        shards: name -> digest of the base's shards.
        adapter: name -> digest of the adapter's files.
        notes: sentences for whoever uses the result.
        files: name -> digest of what was written.
    """

    tool: Mapping[str, str]
    settings: Mapping[str, Any]
    base: Mapping[str, Any]
    shards: Mapping[str, FileDigest]
    adapter: Mapping[str, FileDigest]
    notes: tuple[str, ...]
    files: Mapping[str, FileDigest]

    def to_bytes(self) -> bytes:
        return sealed({"format": FORMAT, "version": VERSION, **asdict(self)})


def load_merge(folder: Path) -> MergeRecord:
    """Read the record of a merged checkpoint. Raises OutputError if it is not one of this version."""
    path, again = folder / MERGE_NAME, "merge again, into another folder"
    try:
        table = read_sealed(path)
        del table[SEAL]
        if (table.pop("format"), table.pop("version")) != (FORMAT, VERSION):
            raise ValueError("is of another version")
        if not all(isinstance(table["base"][key], str | None) for key in ("repo_id", "revision", "license")):
            raise ValueError("has a base that is none")
        digests = {key: file_digests(table[key]) for key in _DIGESTS}
        return MergeRecord(**{**table, **digests, "notes": tuple(map(str, table["notes"]))})
    except ValueError as error:
        raise OutputError(f"{path} {error}", again) from None
    except (KeyError, TypeError, AttributeError):
        raise OutputError(f"{path} lacks fields, or has others than a merge's record", again) from None
