"""A decomposed folder against the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import VerificationError
from pissa_hub.factorization.methods import Factors, deviation_of, energy_of
from pissa_hub.factorization.svd import SVDSettings, TruncatedSVD, truncated_svd
from pissa_hub.factorization.workspace import Workspace
from pissa_hub.manifest import Manifest, WeightRecord, lora_names
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, ADAPTER_NAME
from pissa_hub.progress import Progress

# What another order of summation moves a measured deviation by: of itself, and of the weight's largest element.
_SLACK = 1e-4
_NOISE = 1e-12
# What rounding both factors to their dtype moves the low-rank part by, relative to its norm.
FACTOR_ROUNDING = {"F32": 2 * 2.0**-24, "F16": 2 * 2.0**-11, "BF16": 2 * 2.0**-9}


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


def require_source(original: Checkpoint, manifest: Manifest, progress: Progress) -> None:
    """Raises VerificationError unless the checkpoint's shards are those that the manifest names."""
    require_shards(original, manifest.source.files, "decomposition", progress)


def require_shards(original: Checkpoint, expected: Mapping[str, FileDigest], kind: str, progress: Progress) -> None:
    """Raises VerificationError unless the shards are those that a folder of this ``kind`` was made from."""
    wrong = sorted({shard.name for shard in original.shards} ^ set(expected))
    for shard in original.shards:
        if shard.name in expected:
            progress.working_on(shard.name)
            found = FileDigest(*sha256_file(original.files.path(shard.name)))
            progress.advance(found.size)
            if found != expected[shard.name]:
                wrong.append(shard.name)
    if wrong:
        raise VerificationError(
            f"{original.place} is not the source of this {kind}: {wrong[0]} differs",
            "give the checkpoint that it was made from",
        )


def compare(
    folder: Path, original: Checkpoint, manifest: Manifest, sample: int, progress: Progress
) -> tuple[Check, ...]:
    """Every tensor of the source against a decomposed folder whose headers and adapter are sound.

    Args:
        folder, manifest: what was made.
        original: what it was made from; see :func:`require_source`.
        sample: how many certificates to recompute; -1 for all.
        progress: told of the source's bytes.
    """
    records = {weight.tensor: weight for weight in manifest.weights}
    chosen = _spread(list(records), sample)
    wrong_weights: list[str] = []
    wrong_copies: list[str] = []
    wrong_certificates: list[str] = []
    copied = 0
    workspace = Workspace()
    with TensorFile(folder / ADAPTER_FOLDER / ADAPTER_NAME) as adapter:
        for shard in original.shards:
            path = original.files.path(shard.name)
            with TensorFile(path, shard.header) as before, TensorFile(folder / shard.name) as after:
                for entry in shard.header.entries:
                    progress.working_on(entry.name)
                    record = records.get(entry.name)
                    if entry.name not in after:
                        wrong_copies.append(f"{shard.name} lacks {entry.name}")
                    elif record is None:
                        copied += 1
                        if not after.is_copy(before, entry.name):
                            wrong_copies.append(f"{entry.name} differs from the source")
                    else:
                        matrix = before.read(entry.name)
                        factors = factors_of(record, adapter, manifest.scaling(record))
                        wrong_weights += _deviations(record, matrix, after.read(entry.name), factors, workspace)
                        if entry.name in chosen:
                            rounding = FACTOR_ROUNDING[adapter.spec(lora_names(record.module)[0]).dtype]
                            again = truncated_svd(
                                matrix,
                                record.rank,
                                SVDSettings(seed=int(manifest.settings["seed"]) + 1),
                                name=record.tensor,
                                workspace=workspace,
                            )
                            wrong_certificates += _contradictions(record, matrix, factors, rounding, again)
                    progress.advance(entry.nbytes)
    return (
        Check("W = W_res + s B A", len(records), tuple(wrong_weights)),
        Check("other tensors byte-equal", copied, tuple(wrong_copies)),
        Check("certificates recomputed", len(chosen), tuple(wrong_certificates)),
    )


def _deviations(
    record: WeightRecord, matrix: Tensor, base: Tensor, factors: Factors, workspace: Workspace
) -> Iterator[str]:
    found = deviation_of(matrix, factors, base, workspace=workspace)
    claimed = record.reconstruction
    floor = _NOISE * float(torch.linalg.vector_norm(matrix, ord=float("inf")))
    if found.max_abs > claimed.max_abs * (1 + _SLACK) + floor:
        yield f"{record.tensor} deviates by {found.max_abs:.2e}, not by {claimed.max_abs:.2e}"
    elif found.relative_frobenius > claimed.relative_frobenius * (1 + _SLACK) + _NOISE:
        yield (
            f"{record.tensor} deviates by {found.relative_frobenius:.2e} of its norm, "
            f"not by {claimed.relative_frobenius:.2e}"
        )


def _contradictions(
    record: WeightRecord, matrix: Tensor, factors: Factors, rounding: float, again: TruncatedSVD
) -> Iterator[str]:
    """Two certified results, the second from another start, have to agree within their certificates.

    The certificate is of the triplets; the factors as stored lose the square of their ``rounding`` on top.
    """
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


def factors_of(record: WeightRecord, adapter: TensorFile, scaling: float) -> Factors:
    """A weight's A and B in fp32, in the orientation that the weight is stored in."""
    A, B = (adapter.read(name) for name in lora_names(record.module))
    return Factors(A.t(), B.t(), scaling) if record.is_transposed else Factors(B, A, scaling)


def _spread(names: list[str], sample: int) -> set[str]:
    """``sample`` of the names, evenly over the model; all for -1."""
    if sample < 0 or sample >= len(names):
        return set(names)
    return {names[position * len(names) // sample] for position in range(sample)}
