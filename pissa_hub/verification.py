"""``verify``: whether a decomposed folder is what its manifest says, and with the source, what the source was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from pissa_hub.checkpoint.encoding import decode
from pissa_hub.checkpoint.header import Header, TensorEntry, read_header
from pissa_hub.checkpoint.index import INDEX_NAME, check_index, parse_index
from pissa_hub.checkpoint.reader import ShardReader, sha256_file
from pissa_hub.checkpoint.source import Checkpoint, open_checkpoint
from pissa_hub.errors import CheckpointError, VerificationError
from pissa_hub.factorization.methods import Factors, deviation_of, energy_of
from pissa_hub.factorization.svd import SVDSettings, truncated_svd
from pissa_hub.factorization.workspace import Workspace
from pissa_hub.manifest import MANIFEST_NAME, Manifest, WeightRecord, load_manifest
from pissa_hub.pipeline.plan import ADAPTER_CONFIG_NAME, ADAPTER_FOLDER, ADAPTER_NAME
from pissa_hub.pipeline.stream import Progress, Silent

_ADAPTER = f"{ADAPTER_FOLDER}/{ADAPTER_NAME}"
# Another summation order moves a measured deviation by less than this.
_SLACK = 0.01
# What rounding both factors to their dtype moves the low-rank part by, relative to its norm.
_FACTOR_ROUNDING = {"F32": 2 * 2.0**-24, "F16": 2 * 2.0**-11, "BF16": 2 * 2.0**-9}


@dataclass(frozen=True)
class Check:
    """One kind of test: how many things it looked at, and a line for each that failed."""

    name: str
    count: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """All checks of a folder."""

    checks: tuple[Check, ...]

    @property
    def is_sound(self) -> bool:
        return not any(check.problems for check in self.checks)


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
        source: the checkpoint that it was made from.
        sample: how many certificates to recompute; -1 for all.
        progress: told how far it is.

    Raises:
        ManifestError: the folder has no manifest that can be read.
        CheckpointError: the source is no checkpoint.
        VerificationError: the source is another one than the manifest names, by its hashes.
    """
    folder, progress = Path(folder), progress or Silent()
    manifest = load_manifest(folder)
    original = None if source is None else open_checkpoint(source)
    readable = 0 if original is None else sum(shard.header.file_size for shard in original.shards)
    progress.expect(sum(digest.size for digest in manifest.files.values()) + 2 * readable)
    checks = [_check_files(folder, manifest, progress)]
    headers, headers_check = _check_headers(folder, manifest)
    checks += [headers_check, _check_adapter(folder, manifest, headers)]
    if original is not None:
        _check_source(original, manifest, progress)
        checks += _compare(folder, original, manifest, headers, sample, progress)
    return Findings(tuple(checks))


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
    path = folder / INDEX_NAME
    if INDEX_NAME in manifest.files and not problems:
        try:
            index = parse_index(path, path.read_bytes())
            shards = {name: headers[name] for name in manifest.source.files}
            check_index(path, index, shards)
        except (CheckpointError, OSError, KeyError) as error:
            problems.append(f"{INDEX_NAME}: {error}")
    return headers, Check("headers and index", len(headers), tuple(problems))


def _check_adapter(folder: Path, manifest: Manifest, headers: dict[str, Header]) -> Check:
    header = headers.get(_ADAPTER)
    if header is None:
        return Check("adapter", 0, (f"{_ADAPTER} cannot be read",))
    problems = list(_config_problems(folder, manifest))
    expected = {name for weight in manifest.weights for name in _factor_names(weight)}
    stored = {entry.name for entry in header.entries}
    problems += [f"{_ADAPTER} lacks {name}" for name in sorted(expected - stored)]
    problems += [f"{_ADAPTER} holds {name}, which is of no weight" for name in sorted(stored - expected)]
    if not problems:
        with _Tensors(folder / _ADAPTER, header) as adapter:
            for weight in manifest.weights:
                problems += _factor_problems(weight, adapter, _scaling(manifest, weight))
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


def _factor_problems(weight: WeightRecord, adapter: _Tensors, scaling: float) -> Iterator[str]:
    """A and B carry the square roots of the singular values: each row's and column's energy is sigma / s."""
    name_A, name_B = _factor_names(weight)
    rows, columns = weight.shape
    if adapter.shape(name_A) != (weight.rank, columns) or adapter.shape(name_B) != (rows, weight.rank):
        yield f"the factors of {weight.module} have other shapes than rank {weight.rank} of {rows}x{columns}"
        return
    sigma = torch.tensor(weight.singular_values, dtype=torch.float64)
    tolerance = 1e-5 if adapter.dtype(name_A) == "F32" else 2e-2
    for energies in (
        adapter.read(name_A).double().square().sum(1),
        adapter.read(name_B).double().square().sum(0),
    ):
        if not torch.allclose(energies * scaling, sigma, rtol=tolerance, atol=1e-6 * float(sigma[0])):
            yield f"the factors of {weight.module} do not have the singular values of the manifest"
            return


def _check_source(original: Checkpoint, manifest: Manifest, progress: Progress) -> None:
    """Raises VerificationError unless the checkpoint's shards are those that the manifest names."""
    expected = manifest.source.files
    names = [shard.name for shard in original.shards]
    wrong = sorted(set(names) ^ set(expected))
    for shard in original.shards:
        if shard.name in expected:
            progress.working_on(shard.name)
            size, sha256 = sha256_file(shard.path)
            progress.advance(size)
            if (size, sha256) != (expected[shard.name].size, expected[shard.name].sha256):
                wrong.append(shard.name)
    if wrong:
        raise VerificationError(
            f"{original.root} is not the source of this decomposition: {wrong[0]} differs",
            "give the checkpoint that the manifest names",
        )


def _compare(
    folder: Path,
    original: Checkpoint,
    manifest: Manifest,
    headers: dict[str, Header],
    sample: int,
    progress: Progress,
) -> list[Check]:
    records = {weight.tensor: weight for weight in manifest.weights}
    chosen = _spread(list(records), sample)
    weight_problems: list[str] = []
    copy_problems: list[str] = []
    certificate_problems: list[str] = []
    copied = 0
    workspace = Workspace()
    with ExitStack() as files:
        adapter = files.enter_context(_Tensors(folder / _ADAPTER, headers[_ADAPTER]))
        for shard in original.shards:
            before = files.enter_context(_Tensors(shard.path, shard.header))
            if shard.name not in headers:
                weight_problems.append(f"{shard.name} cannot be compared")
                continue
            after = files.enter_context(_Tensors(folder / shard.name, headers[shard.name]))
            for entry in shard.header.entries:
                progress.working_on(entry.name)
                record = records.get(entry.name)
                if entry.name not in after:
                    copy_problems.append(f"{shard.name} lacks {entry.name}")
                elif record is None:
                    copied += 1
                    if not after.is_copy(before, entry.name):
                        copy_problems.append(f"{entry.name} differs from the source")
                else:
                    matrix = before.read(entry.name)
                    factors = _factors(record, adapter, _scaling(manifest, record))
                    weight_problems += _weight_problems(record, matrix, after.read(entry.name), factors, workspace)
                    if entry.name in chosen:
                        rounding = _FACTOR_ROUNDING[adapter.dtype(_factor_names(record)[0])]
                        certificate_problems += _certificate_problems(
                            record, matrix, factors, rounding, manifest, workspace
                        )
                progress.advance(entry.nbytes)
    return [
        Check("W = W_res + s B A", len(records), tuple(weight_problems)),
        Check("other tensors byte-equal", copied, tuple(copy_problems)),
        Check("certificates recomputed", len(chosen), tuple(certificate_problems)),
    ]


def _weight_problems(
    record: WeightRecord, matrix: Tensor, base: Tensor, factors: Factors, workspace: Workspace
) -> Iterator[str]:
    found = deviation_of(matrix, factors, base, workspace=workspace)
    claimed = record.reconstruction
    floor = 1e-7 * float(torch.linalg.vector_norm(matrix, ord=float("inf")))
    if found.max_abs > claimed.max_abs * (1 + _SLACK) + floor:
        yield f"{record.tensor} deviates by {found.max_abs:.2e}, not by {claimed.max_abs:.2e}"
    elif found.relative_frobenius > claimed.relative_frobenius * (1 + _SLACK) + 1e-7:
        yield (
            f"{record.tensor} deviates by {found.relative_frobenius:.2e} of its norm, "
            f"not by {claimed.relative_frobenius:.2e}"
        )


def _certificate_problems(
    record: WeightRecord,
    matrix: Tensor,
    factors: Factors,
    rounding: float,
    manifest: Manifest,
    workspace: Workspace,
) -> Iterator[str]:
    """Decompose anew from another start: two certified results have to agree within their certificates.

    The certificate is of the triplets; the factors as stored lose the square of their ``rounding`` on top.
    """
    settings = SVDSettings(seed=int(manifest.settings["seed"]) + 1)
    again = truncated_svd(matrix, record.rank, settings, name=record.tensor, workspace=workspace)
    low_rank = factors.left * factors.scaling @ factors.right
    energy, outside = float(energy_of(matrix)), float(energy_of(matrix - low_rank))
    # A difference of large sums: fp32 leaves 1e-6 of the whole undecided.
    captured, noise = energy - outside, 1e-6 * energy
    if captured + noise < float(again.s.square().sum()) * (1 - record.certificate.energy_loss - rounding**2):
        yield f"{record.tensor} captures less energy than its certificate says"
    if abs(record.energy * energy - captured) > 1e-3 * captured + noise:
        yield f"{record.tensor} does not capture the share of energy that the manifest says"
    sigma = torch.tensor(record.singular_values, dtype=torch.float64)
    error = (record.certificate.sigma_error or 0.0) + again.certificate.sigma_error + 1e-6
    visible = sigma > 1e-6 * sigma[0]
    if bool(((sigma - again.s).abs() > error * sigma)[visible].any()):
        yield f"{record.tensor} has other singular values than the manifest says"


def _factors(record: WeightRecord, adapter: _Tensors, scaling: float) -> Factors:
    A, B = (adapter.read(name) for name in _factor_names(record))
    return Factors(A.t(), B.t(), scaling) if record.is_transposed else Factors(B, A, scaling)


def _factor_names(weight: WeightRecord) -> tuple[str, str]:
    prefix = f"base_model.model.{weight.module}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _scaling(manifest: Manifest, weight: WeightRecord) -> float:
    return weight.alpha / (weight.rank**0.5 if manifest.settings["use_rslora"] else weight.rank)


def _spread(names: list[str], sample: int) -> set[str]:
    """``sample`` of the names, evenly over the model; all for -1."""
    if sample < 0 or sample >= len(names):
        return set(names)
    return {names[position * len(names) // sample] for position in range(sample)}


class _Tensors:
    """The tensors of one safetensors file, one at a time."""

    def __init__(self, path: Path, header: Header) -> None:
        self._header = header
        self._reader = ShardReader(path, header)

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header[name].shape

    def dtype(self, name: str) -> str:
        return self._header[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor, fp32."""
        entry = self._header[name]
        out = torch.empty(entry.shape)
        decode(entry.spec, self._bytes(entry), out)
        return out

    def is_copy(self, other: _Tensors, name: str) -> bool:
        """Whether ``other`` holds the same dtype, shape and bytes under this name."""
        mine, theirs = self._header[name], other._header[name]
        return mine.spec == theirs.spec and self._bytes(mine) == other._bytes(theirs)

    def _bytes(self, entry: TensorEntry) -> memoryview:
        data = memoryview(bytearray(entry.nbytes))
        self._reader.read_into(entry, data)
        return data
