"""What an unfinished run leaves in ``.pissa/``: the plan it follows and a receipt for every finished shard.

The files are the truth. A receipt counts only if it is of this plan, every file that it vouches for is there with the
bytes that it names, on the disk or where the shards go, and so is the source's shard, here or on the Hub: a torn or
foreign one costs a shard's work and nothing else. What a name on the Hub stood for when the work began is kept too, so
that a moved branch changes nothing.
"""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from pissa_hub.checkpoint.files import Files, Pin
from pissa_hub.checkpoint.lock import locked
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.writer import FileDigest, write_file_atomic
from pissa_hub.errors import CARRY_ON, CheckpointError, ManifestError, OutputError
from pissa_hub.manifest import WeightRecord, manifest_schema, weight_record
from pissa_hub.schema import violations
from pissa_hub.seal import read_sealed, sealed

WORK_FOLDER = ".pissa"
_PLAN_NAME = "plan.json"
_LOCK_NAME = "lock"
_COMMITS = "commits"
_RECEIPT = ".receipt.json"
_DOOMED = ".partial"
_NOTHING: Mapping[str, FileDigest] = {}


@dataclass(frozen=True)
class Receipt:
    """A finished shard.

    Attributes:
        shard: its name.
        source, output: digests of the shard read and the shard written.
        adapter: digest of its part of the adapter; None where it holds no target.
        weights: records for the manifest, in file order.
        environment: what its exact bytes depend on beside source and settings; see ``pipeline.device.environment``.
    """

    shard: str
    source: FileDigest
    output: FileDigest
    adapter: FileDigest | None
    weights: tuple[WeightRecord, ...]
    environment: Mapping[str, str | int]


def joint_environment(receipts: Iterable[Receipt]) -> Mapping[str, str | int]:
    """Of all that several receipts vouch for; where they differ, all values with commas between."""
    values: dict[str, dict[str | int, None]] = {}
    for receipt in receipts:
        for key, value in receipt.environment.items():
            if value != "":
                values.setdefault(key, {})[value] = None
    return {key: next(iter(of)) if len(of) == 1 else ", ".join(sorted(map(str, of))) for key, of in values.items()}


def pinned_commits(output: Path) -> Mapping[str, str]:
    """What names on the Hub stood for in the unfinished work of a folder, by ``Pin.key``; empty if there is none."""
    try:
        commits = read_sealed(output / WORK_FOLDER / _PLAN_NAME)[_COMMITS]
        return {str(name): str(commit) for name, commit in commits.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
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

    @staticmethod
    def piece_name(shard: str, number: int) -> str:
        """Name of a piece of a shard, as the shard's own is relative to the output folder."""
        return f"{WORK_FOLDER}/{shard}.{number:03}.piece"

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def exists(self) -> bool:
        return self._folder.is_dir()

    def found_digest(self) -> str | None:
        """Digest of the plan whose work is here; None if that cannot be told."""
        try:
            return str(read_sealed(self._folder / _PLAN_NAME)["digest"])
        except (ValueError, KeyError, TypeError):
            return None

    def found_run(self) -> str | None:
        """What the last :meth:`create` returned, wherever it was called; None if that cannot be told."""
        try:
            return str(read_sealed(self._folder / _PLAN_NAME)["run"])
        except (ValueError, KeyError, TypeError):
            return None

    @property
    def is_of_a_run(self) -> bool:
        """Whether there is a plan, torn or not, or a receipt of this one: else the folder says nothing."""
        return (self._folder / _PLAN_NAME).exists() or any(
            self.read(path.name.removesuffix(_RECEIPT)) for path in self._folder.glob(f"*{_RECEIPT}")
        )

    def is_foreign(self, path: Path) -> bool:
        """Whether something in the output folder is neither this folder nor what a removal of it left."""
        return path != self._folder and not (path.name.startswith(f"{WORK_FOLDER}-") and path.suffix == _DOOMED)

    def create(self, settings: Mapping[str, Any], pins: Iterable[Pin] = ()) -> str:
        """Make the folder and say in it which plan its work belongs to.

        Returns:
            What nobody else's call returns.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fact = f"{self._output} cannot be created: {error.strerror}"
            raise OutputError(fact, "choose another folder or check the permissions") from error
        commits = {pin.key: pin.commit for pin in pins}
        run = secrets.token_hex(8)
        plan = {"digest": self._digest, "settings": settings, _COMMITS: commits, "run": run}
        write_file_atomic(self._folder / _PLAN_NAME, sealed(plan))
        return run

    def adapter_part(self, shard: str) -> Path:
        """Where a shard's share of the adapter waits to be assembled."""
        return self._folder / f"{PurePosixPath(shard).name}.adapter"

    def write(self, receipt: Receipt) -> None:
        table = {"plan": self._digest, **asdict(receipt)}
        write_file_atomic(self._receipt_path(receipt.shard), sealed(table))

    def read(self, shard: str) -> Receipt | None:
        """A file's receipt, if it is one of this plan; nothing is said of what it vouches for."""
        try:
            return self.require(shard)
        except OutputError:
            return None

    def require(self, shard: str) -> Receipt:
        """:meth:`read`, of a file that is finished. Raises OutputError if its receipt is gone, or on a bad disk."""
        path = self._receipt_path(shard)
        try:
            table = read_sealed(path)
            if table["plan"] != self._digest or table["shard"] != shard or any(violations(table, _schema())):
                raise ValueError("is not of this work")
            return Receipt(
                shard,
                FileDigest(**table["source"]),
                FileDigest(**table["output"]),
                FileDigest(**table["adapter"]) if table["adapter"] else None,
                tuple(weight_record(weight) for weight in table["weights"]),
                dict(table["environment"]),
            )
        except (ValueError, LookupError, TypeError, ManifestError) as error:
            raise OutputError(f"{path} {error}", CARRY_ON) from None

    def receipt(
        self,
        shard: str,
        source: Files,
        elsewhere: Mapping[str, FileDigest] = _NOTHING,
        *,
        of: str | None = None,
        span: range | None = None,
    ) -> Receipt | None:
        """A file's receipt, if what it vouches for has the bytes that it names and so has the source.

        Args:
            shard: name of the file, a shard or a piece of one.
            source: that the shard is of.
            elsewhere: finished shards that need not lie in the output folder.
            of, span: of a piece, the shard and the bytes that were read.
        """
        receipt = self.read(shard)
        if receipt is None:
            return None
        held = (
            (elsewhere.get(shard) == receipt.output or _is(self._output / shard, receipt.output))
            and (receipt.adapter is None or _is(self.adapter_part(shard), receipt.adapter))
            and source.holds(of or shard, receipt.source, span)
        )
        return receipt if held else None

    def is_there(self, receipt: Receipt) -> bool:
        """Whether files of the sizes that a receipt names are there."""
        parts = [(self._output / receipt.shard, receipt.output)]
        if receipt.adapter is not None:
            parts.append((self.adapter_part(receipt.shard), receipt.adapter))
        return all(path.is_file() and path.stat().st_size == digest.size for path, digest in parts)

    def pieces(self, shard: str) -> list[Path]:
        """Finished pieces of a shard, and whatever else was written with them."""
        return sorted(self._folder.glob(f"{glob.escape(shard)}.[0-9][0-9][0-9].piece*"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one at work in the output folder. Raises OutputError if somebody else is."""
        with locked(self._folder / _LOCK_NAME, self._output):
            yield

    def remove(self) -> None:
        """Remove the folder, or what an earlier removal left; never its plan alone."""
        with suppress(OSError):
            self._folder.rename(self._output / f"{WORK_FOLDER}-{secrets.token_hex(4)}{_DOOMED}")
        for folder in self._output.glob(f"{WORK_FOLDER}-*{_DOOMED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def _receipt_path(self, shard: str) -> Path:
        return self._folder / f"{PurePosixPath(shard).name}{_RECEIPT}"


@cache
def _schema() -> Mapping[str, Any]:
    """Of the part of a receipt that goes to the manifest."""
    manifest = manifest_schema()
    values = manifest["properties"]["environment"]["additionalProperties"]
    return {
        "properties": {
            "weights": {"type": "array", "items": manifest["$defs"]["weight"]},
            "environment": {"type": "object", "additionalProperties": values},
        }
    }


def _is(path: Path, digest: FileDigest) -> bool:
    try:
        return path.stat().st_size == digest.size and sha256_file(path) == (digest.size, digest.sha256)
    except (OSError, CheckpointError):
        return False
