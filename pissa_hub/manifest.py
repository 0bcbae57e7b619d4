"""pissa_manifest.json: what a decomposition was made of, how, how exactly, and every byte of it.

Written last, so that its presence means a finished folder. It holds no time stamps, durations or local paths: the same
source, settings and machine give the same bytes. It is sealed, see ``seal``; ``manifest.schema.json`` beside this file
is its JSON Schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import ManifestError
from pissa_hub.schema import violations
from pissa_hub.seal import read_sealed, sealed

MANIFEST_NAME = "pissa_manifest.json"
FORMAT = "pissa-hub-manifest"
VERSION = 1
_AGAIN = "download or decompose it again"

_T = TypeVar("_T")


@dataclass(frozen=True)
class CertificateRecord:
    """See ``factorization.certificate.Certificate``."""

    kind: str
    energy_loss: float
    sigma_error: float | None
    failure_probability: float


@dataclass(frozen=True)
class ReconstructionRecord:
    """Deviation of residual + s B A from W, both as stored; see ``factorization.methods.Deviation``."""

    max_abs: float
    relative_frobenius: float


@dataclass(frozen=True)
class WeightRecord:
    """One decomposed weight.

    Attributes:
        tensor, module: its name in the checkpoint and in memory.
        shape: [out, in], as PEFT sees it.
        is_transposed: whether it is stored as (in, out), as GPT-2's Conv1D is.
        source_dtype: safetensors dtype it was stored in.
        rank: r.
        alpha: lora_alpha.
        singular_values: the r leading ones, descending.
        energy: captured share of ||W||_F^2.
    """

    tensor: str
    module: str
    shape: tuple[int, int]
    is_transposed: bool
    source_dtype: str
    rank: int
    alpha: float
    singular_values: tuple[float, ...]
    energy: float
    certificate: CertificateRecord
    reconstruction: ReconstructionRecord


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from: identity on the Hub, if known, and the digest of every shard."""

    repo_id: str | None
    revision: str | None
    license: str | None
    files: Mapping[str, FileDigest]


@dataclass(frozen=True)
class Manifest:
    """The whole file. ``files`` has every file of the folder but the manifest itself."""

    tool: Mapping[str, str]
    source: SourceRecord
    settings: Mapping[str, Any]
    weights: tuple[WeightRecord, ...]
    files: Mapping[str, FileDigest]
    environment: Mapping[str, Any]

    def scaling(self, weight: WeightRecord) -> float:
        """s of W = W_res + s B A."""
        return weight.alpha / (weight.rank**0.5 if self.settings["use_rslora"] else weight.rank)

    def to_bytes(self) -> bytes:
        return sealed({"format": FORMAT, "version": VERSION, **asdict(self)})


def lora_names(module: str) -> tuple[str, str]:
    """Names of a module's A and B in PEFT's adapter file."""
    prefix = f"base_model.model.{module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of the file."""
    schema: dict[str, Any] = json.loads(Path(__file__).with_name("manifest.schema.json").read_bytes())
    return schema


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a decomposed folder.

    Raises:
        ManifestError: there is none, it is not as it was written, or it is not one of this version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ManifestError(f"{folder} has no {MANIFEST_NAME}", "give a folder that decompose has finished")
    try:
        table = read_sealed(path)
        found = table["format"], table["version"]
        if found != (FORMAT, VERSION):
            raise ManifestError(f"{path} is {found[0]!r} version {found[1]!r}", "use a newer pissa_hub")
        for violation in violations(table, manifest_schema()):
            raise ValueError(f"is malformed: {violation}")
        return Manifest(
            tool=dict(table["tool"]),
            source=_source(table["source"]),
            settings=dict(table["settings"]),
            weights=tuple(weight_record(weight) for weight in table["weights"]),
            files=file_digests(table["files"]),
            environment=dict(table["environment"]),
        )
    except KeyError as error:
        raise ManifestError(f"{path} is malformed: it lacks {error}", _AGAIN) from None
    except ValueError as error:
        raise ManifestError(f"{path} {error}", _AGAIN) from None


def file_digests(table: Mapping[str, Any]) -> dict[str, FileDigest]:
    """The part of a record that names files of a folder.

    Raises:
        ValueError: a name leads out of the folder, or a digest is none; as a clause that fits after the record's name.
    """
    for name in table:
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts or set("\\:\0") & set(name):
            raise ValueError(f"names {shown(name)}, which points out of the folder")
    return {name: file_digest(digest) for name, digest in table.items()}


def file_digest(table: Mapping[str, Any]) -> FileDigest:
    """A digest from its JSON form. Raises ValueError."""
    digest = _record(FileDigest, table)
    if type(digest.size) is not int or not isinstance(digest.sha256, str):
        raise ValueError("has digests that are none")
    return digest


def weight_record(table: Mapping[str, Any]) -> WeightRecord:
    """A record from its JSON form. Raises KeyError, TypeError or ValueError."""
    plain = dict(table)
    if len(plain["singular_values"]) != plain["rank"]:
        raise ValueError(f"has {len(plain['singular_values'])} singular values of {plain['tensor']!r}")
    return WeightRecord(
        **{
            **plain,
            "shape": (int(plain["shape"][0]), int(plain["shape"][1])),
            "singular_values": tuple(float(value) for value in plain["singular_values"]),
            "certificate": _record(CertificateRecord, plain["certificate"]),
            "reconstruction": _record(ReconstructionRecord, plain["reconstruction"]),
        }
    )


def _record(kind: type[_T], table: Mapping[str, Any]) -> _T:
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # every kind is a dataclass
    if set(table) != names:
        raise ValueError(f"{kind.__name__} has {sorted(table)}, not {sorted(names)}")
    return kind(**table)


def _source(table: Mapping[str, Any]) -> SourceRecord:
    return SourceRecord(table["repo_id"], table["revision"], table["license"], file_digests(table["files"]))
