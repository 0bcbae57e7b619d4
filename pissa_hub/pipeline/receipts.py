"""What an unfinished run leaves in ``.pissa/``: the plan it follows and a receipt for every finished shard.

The files are the truth. A receipt counts only if it is of this plan, every file that it vouches for is there with the
bytes that it names, on the disk or where the shards go, and so is the source's shard, here or on the Hub: a torn or
foreign one costs a shard's work and nothing else. What a name on the Hub stood for when the work began is kept too, so
that a moved branch changes nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pissa_hub.checkpoint.files import Files, Pin
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.writer import FileDigest, write_file_atomic
from pissa_hub.errors import CheckpointError, ManifestError, OutputError
from pissa_hub.manifest import WeightRecord, weight_record

WORK_FOLDER = ".pissa"
_PLAN_NAME = "plan.json"
_COMMITS = "commits"
_NOTHING: Mapping[str, FileDigest] = {}


@dataclass(frozen=True)
class Receipt:
    """A finished shard.

    Attributes:
        shard: its name.
        source, output: digests of the shard read and the shard written.
        adapter: digest of its part of the adapter; None where it holds no target.
        weights: records for the manifest, in file order.
    """

    shard: str
    source: FileDigest
    output: FileDigest
    adapter: FileDigest | None
    weights: tuple[WeightRecord, ...]


def pinned_commits(output: Path) -> Mapping[str, str]:
    """What names on the Hub stood for in the unfinished work of a folder, by ``Pin.key``; empty if there is none."""
    try:
        commits = json.loads((output / WORK_FOLDER / _PLAN_NAME).read_bytes())[_COMMITS]
        return {str(name): str(commit) for name, commit in commits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


class WorkFolder:
    """``.pissa/`` in an output folder.

    Args:
        output: the output folder.
        digest: of the plan that this run follows.
    """

    def __init__(self, output: Path, digest: str) -> None:
        self._output = output
        self._folder = output / WORK_FOLDER
        self._digest = digest

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def exists(self) -> bool:
        return self._folder.is_dir()

    def found_digest(self) -> str | None:
        """Digest of the plan whose work is here; None if that cannot be told."""
        try:
            return str(json.loads((self._folder / _PLAN_NAME).read_bytes())["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def create(self, settings: Mapping[str, Any], pins: Iterable[Pin] = ()) -> None:
        """Make the folder and say in it which plan its work belongs to. Raises OutputError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fact = f"{self._output} cannot be created: {error.strerror}"
            raise OutputError(fact, "choose another folder or check the permissions") from error
        commits = {pin.key: pin.commit for pin in pins}
        plan = {"digest": self._digest, "settings": settings, _COMMITS: commits}
        write_file_atomic(self._folder / _PLAN_NAME, json.dumps(plan, indent=1).encode())

    def adapter_part(self, shard: str) -> Path:
        """Where a shard's share of the adapter waits to be assembled."""
        return self._folder / f"{shard}.adapter"

    def write(self, receipt: Receipt) -> None:
        table = {"plan": self._digest, **asdict(receipt)}
        write_file_atomic(self._receipt_path(receipt.shard), json.dumps(table).encode())

    def receipt(self, shard: str, source: Files, elsewhere: Mapping[str, FileDigest] = _NOTHING) -> Receipt | None:
        """A shard's receipt, if it and the files that it vouches for are sound and the source is still the same.

        Args:
            shard: its name.
            source: that the shard is of.
            elsewhere: finished shards that need not lie in the output folder.
        """
        try:
            table = json.loads(self._receipt_path(shard).read_bytes())
            if table["plan"] != self._digest or table["shard"] != shard:
                return None
            receipt = Receipt(
                shard,
                FileDigest(**table["source"]),
                FileDigest(**table["output"]),
                FileDigest(**table["adapter"]) if table["adapter"] else None,
                tuple(weight_record(weight) for weight in table["weights"]),
            )
            held = (
                (elsewhere.get(shard) == receipt.output or _is(self._output / shard, receipt.output))
                and (receipt.adapter is None or _is(self.adapter_part(shard), receipt.adapter))
                and source.holds(shard, receipt.source)
            )
            return receipt if held else None
        except (OSError, ValueError, KeyError, TypeError, ManifestError):
            return None

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _receipt_path(self, shard: str) -> Path:
        return self._folder / f"{shard}.receipt.json"


def _is(path: Path, digest: FileDigest) -> bool:
    try:
        return path.stat().st_size == digest.size and sha256_file(path) == (digest.size, digest.sha256)
    except (OSError, CheckpointError):
        return False
