"""``verify``: whether a finished folder is what its record says, and with the source, made of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from pissa_hub.checkpoint.header import Header
from pissa_hub.checkpoint.opening import read_bounded
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.comparison import Check, Findings, compare, require_shards
from pissa_hub.errors import PlanError, VerificationError
from pissa_hub.finished import Finished, open_finished
from pissa_hub.hub.publish_stream import published_place
from pissa_hub.hub.pull import pull_checkpoint, pull_folder, pull_original
from pissa_hub.integrity import check_files, check_headers
from pissa_hub.manifest import Manifest, WeightRecord, lora_names
from pissa_hub.pipeline.plan import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER, ADAPTER_NAME
from pissa_hub.progress import Progress, Silent

_ADAPTER = f"{ADAPTER_FOLDER}/{ADAPTER_NAME}"


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    *,
    sample: int = 4,
    progress: Progress | None = None,
) -> Findings:
    """Check what decompose, merge or convert wrote.

    Without the source: the record's own hash, every file's size and SHA-256, every safetensors header and the index; of
    a decomposition also the adapter's tensors and configuration, and its factors against the singular values in the
    manifest. With the source also its hashes; and of a decomposition every decomposed weight W against W_res + s B A,
    that every other tensor is byte-equal, and a sample of certificates by decomposing anew with another seed.

    Args:
        folder: what was written.
        source: the checkpoint that it was made from: of a merge what was merged into, of a converted adapter the
            original model. Both may be ``org/name[@revision]`` on the Hub; they are fetched into the client's cache.
        sample: how many certificates to recompute; -1 for all.
        progress: told how far it is.

    Raises:
        OutputError: the folder is not finished.
        ManifestError, OutputError, AdapterError: its record is not as it was written.
        CheckpointError: the source is no checkpoint.
        PlanError: the record does not say which source it was.
        VerificationError: the source is another one than the record names, by its hashes; or the folder's shards
            are on the Hub alone.
    """
    finished, progress = open_finished(pull_folder(folder).folder), progress or Silent()
    record = finished.record
    if isinstance(record, Manifest):
        _require_here(finished.folder, record)
    original = None if source is None else _open_source(finished, source)
    readable = 0 if original is None else sum(shard.header.file_size for shard in original.shards)
    progress.expect(sum(digest.size for digest in record.files.values()))
    progress.expect(readable * (2 if isinstance(record, Manifest) else 1))
    files = check_files(finished, progress)
    headers, of_headers = check_headers(finished)
    checks = [files, of_headers]
    if isinstance(record, Manifest):
        checks.append(_check_adapter(finished.folder, record, headers))
    if original is not None:
        require_shards(original, finished.sources, finished.kind, progress)
        if not isinstance(record, Manifest):
            checks.append(Check("hashes of the source", len(original.shards), ()))
        elif any(check.problems for check in checks[1:]):
            checks.append(Check("comparison with the source", 0, ("not possible on a folder with these faults",)))
        else:
            checks += compare(finished.folder, original, record, sample, progress)
    return Findings(tuple(checks))


def _require_here(folder: Path, manifest: Manifest) -> None:
    """Raises VerificationError if the shards went to the Hub as they were made."""
    place = None if all((folder / name).exists() for name in manifest.source.files) else published_place(folder)
    if place:
        raise VerificationError(f"the shards of {folder} are on the Hub alone", f"run `pissa-hub verify {place}`")


def _open_source(finished: Finished, source: str | Path) -> Checkpoint:
    if not finished.sources:
        raise PlanError(f"{finished.record_name} does not name the files of the original", "leave out --source")
    return pull_original(source) if isinstance(finished.record, Manifest) else pull_checkpoint(source)


def _misplaced_weights(manifest: Manifest, headers: Mapping[str, Header]) -> Iterator[str]:
    shards = [headers[name] for name in manifest.source.files if name in headers]
    stored = {entry.name: entry.shape for header in shards for entry in header.entries}
    for weight in manifest.weights:
        shape = weight.shape[::-1] if weight.is_transposed else weight.shape
        if stored.get(weight.tensor) != shape:
            yield f"no shard holds {weight.tensor} of shape {list(shape)}"


def _check_adapter(folder: Path, manifest: Manifest, headers: Mapping[str, Header]) -> Check:
    header = headers.get(_ADAPTER)
    if header is None:
        return Check("adapter", 0, (f"{_ADAPTER} cannot be read",))
    problems = [*_misplaced_weights(manifest, headers), *_config_problems(folder, manifest)]
    expected = {name for weight in manifest.weights for name in lora_names(weight.module)}
    stored = {entry.name for entry in header.entries}
    problems += [f"{_ADAPTER} lacks {name}" for name in sorted(expected - stored)]
    problems += [f"{_ADAPTER} holds {name}, which is of no weight" for name in sorted(stored - expected)]
    if not problems:
        with TensorFile(folder / _ADAPTER, header) as adapter:
            for weight in manifest.weights:
                problems += _factor_problems(weight, adapter, manifest.scaling(weight))
    return Check("adapter", len(manifest.weights), tuple(problems))


def _config_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    name = f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME}"
    try:
        config = parse_object(read_bounded(folder / name, manifest.files[name].size))
        expected = {
            "peft_type": "LORA",
            "r": manifest.settings["rank"],
            "use_rslora": manifest.settings["use_rslora"],
            "init_lora_weights": True,
        }
        for key, value in expected.items():
            if config[key] != value:
                yield f"{name} has {key} {config[key]!r} instead of {value!r}"
    except (OSError, ValueError, KeyError) as error:
        yield f"{name} cannot be read ({type(error).__name__}: {error})"


def _factor_problems(weight: WeightRecord, adapter: TensorFile, scaling: float) -> Iterator[str]:
    """A and B carry the square roots of the singular values: each row's and column's energy is sigma / s."""
    name_A, name_B = lora_names(weight.module)
    rows, columns = weight.shape
    if adapter.spec(name_A).shape != (weight.rank, columns) or adapter.spec(name_B).shape != (rows, weight.rank):
        yield f"the factors of {weight.module} have other shapes than rank {weight.rank} of {rows}x{columns}"
        return
    sigma = torch.tensor(weight.singular_values, dtype=torch.float64)
    tolerance = 1e-5 if adapter.spec(name_A).dtype == "F32" else 2e-2
    for energies in (
        adapter.read(name_A).double().square().sum(1),
        adapter.read(name_B).double().square().sum(0),
    ):
        if not torch.allclose(energies * scaling, sigma, rtol=tolerance, atol=1e-6 * float(sigma[0])):
            yield f"the factors of {weight.module} do not have the singular values of the manifest"
            return
