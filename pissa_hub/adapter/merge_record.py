"""pissa_merge.json: what a merged checkpoint was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pissa_hub.adapter.config import to_json
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import OutputError

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
        return to_json({"format": FORMAT, "version": VERSION, **asdict(self)})


def load_merge(folder: Path) -> MergeRecord:
    """Read the record of a merged checkpoint. Raises OutputError if it is not one of this version."""
    path = folder / MERGE_NAME
    try:
        table = parse_object(path.read_bytes())
        if (table.pop("format"), table.pop("version")) != (FORMAT, VERSION):
            raise ValueError("it is of another version")
        digests = {key: {name: FileDigest(**digest) for name, digest in table[key].items()} for key in _DIGESTS}
        return MergeRecord(**{**table, **digests, "notes": tuple(table["notes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} cannot be used ({error})", "choose another folder") from None
