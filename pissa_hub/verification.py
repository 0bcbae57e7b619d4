"""``verify``: whether a decomposed folder is what its manifest says, and with the source, what the source was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from pissa_hub.checkpoint.header import Header, read_header
from pissa_hub.checkpoint.index import INDEX_NAME, check_index, parse_index
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.comparison import Check, Findings, compare, require_source
from pissa_hub.errors import CheckpointError, VerificationError
from pissa_hub.hub.publish_stream import published_place
from pissa_hub.hub.pull import pull_folder, pull_original
from pissa_hub.manifest import MANIFEST_NAME, Manifest, WeightRecord, load_manifest, lora_names
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
    """Check a decomposed folder.

    Without the source: every file's size and SHA-256, every safetensors header, the index, the adapter's tensors and
    configuration, and its factors against the singular values in the manifest. With the source also its own hashes,
    every decomposed weight W against W_res + s B A, that every other tensor is byte-equal, and a sample of
    certificates by decomposing anew with another seed.

    Args:
        folder: what ``decompose`` wrote.
        source: the checkpoint that it was made from. Both may be ``org/name[@revision]`` on the Hub; they are fetched
            into the client's cache.
        sample: how many certificates to recompute; -1 for all.
        progress: told how far it is.

    Raises:
        ManifestError: the folder has no manifest that can be read.
        CheckpointError: the source is no checkpoint.
        VerificationError: the source is another one than the manifest names, by its hashes; or the folder's shards
            are on the Hub alone.
    """
    folder, progress = pull_folder(folder).folder, progress or Silent()
    manifest = load_manifest(folder)
    _require_shards(folder, manifest)
    original = None if source is None else pull_original(source)
    readable = 0 if original is None else sum(shard.header.file_size for shard in original.shards)
    progress.expect(sum(digest.size for digest in manifest.files.values()) + 2 * readable)
    checks = [_check_files(folder, manifest, progress)]
    headers, headers_check = _check_headers(folder, manifest)
    checks += [headers_check, _check_adapter(folder, manifest, headers)]
    if original is not None:
        require_source(original, manifest, progress)
        if any(check.problems for check in checks[1:]):
            checks.append(Check("comparison with the source", 0, ("not possible on a folder with these faults",)))
        else:
            checks += compare(folder, original, manifest, sample, progress)
    return Findings(tuple(checks))


def _require_shards(folder: Path, manifest: Manifest) -> None:
    """Raises VerificationError if they went to the Hub as they were made."""
    place = published_place(folder)
    if place and not all((folder / name).exists() for name in manifest.source.files):
        raise VerificationError(f"the shards of {folder} are on the Hub alone", f"run `pissa-hub verify {place}`")


def _check_files(folder: Path, manifest: Manifest, progress: Progress) -> Check:
    problems = []
    for name, digest in manifest.files.items():
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or not parts:
            problems.append(f"{name!r} in the manifest points out of the folder")
            continue
        progress.working_on(name)
        path = folder / name
        try:
            size, sha256 = sha256_file(path)
        except CheckpointError as error:
            problems.append(error.fact)
            continue
        progress.advance(size)
        if size != digest.size:
            problems.append(f"{name} has {size} bytes instead of {digest.size}")
        elif sha256 != digest.sha256:
            problems.append(f"{name} has other content than the manifest says")
    known = {*manifest.files, MANIFEST_NAME}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and relative.as_posix() not in known and not relative.parts[0].startswith("."):
            problems.append(f"{relative.as_posix()} is not in the manifest")
    return Check("files and hashes", len(manifest.files), tuple(problems))


def _check_headers(folder: Path, manifest: Manifest) -> tuple[dict[str, Header], Check]:
    headers, problems = {}, []
    for name in manifest.files:
        if name.endswith(".safetensors"):
            try:
                headers[name] = read_header(folder / name)
            except CheckpointError as error:
                problems.append(error.fact)
    if not problems:
        problems += _misplaced_weights(manifest, headers)
    path = folder / INDEX_NAME
    if INDEX_NAME in manifest.files and not problems:
        try:
            index = parse_index(path, path.read_bytes())
            shards = {name: headers[name] for name in manifest.source.files}
            check_index(path, index, shards)
        except (CheckpointError, OSError, KeyError) as error:
            problems.append(f"{INDEX_NAME}: {error}")
    return headers, Check("headers and index", len(headers), tuple(problems))


def _misplaced_weights(manifest: Manifest, headers: dict[str, Header]) -> Iterator[str]:
    shards = [headers[name] for name in manifest.source.files if name in headers]
    if len(shards) != len(manifest.source.files):
        yield "a shard of the source has no counterpart"
    stored = {entry.name: entry.shape for header in shards for entry in header.entries}
    for weight in manifest.weights:
        shape = weight.shape[::-1] if weight.is_transposed else weight.shape
        if stored.get(weight.tensor) != shape:
            yield f"no shard holds {weight.tensor} of shape {list(shape)}"


def _check_adapter(folder: Path, manifest: Manifest, headers: dict[str, Header]) -> Check:
    header = headers.get(_ADAPTER)
    if header is None:
        return Check("adapter", 0, (f"{_ADAPTER} cannot be read",))
    problems = list(_config_problems(folder, manifest))
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
        config = json.loads((folder / name).read_bytes())
        expected = {
            "peft_type": "LORA",
            "r": manifest.settings["rank"],
            "use_rslora": manifest.settings["use_rslora"],
            "init_lora_weights": True,
        }
        for key, value in expected.items():
            if config[key] != value:
                yield f"{name} has {key} {config[key]!r} instead of {value!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
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
