"""Plans, manifests and findings as text for people and as JSON for programs."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa_hub.adapter.record import ConversionRecord
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.comparison import Findings
from pissa_hub.errors import OutputError
from pissa_hub.manifest import Manifest, WeightRecord
from pissa_hub.pipeline.plan import Plan

if TYPE_CHECKING:
    from pissa_hub.hub.publish import Published

_LAYER = re.compile(r"\.\d+(?=\.|$)")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned by spaces; the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join(map(aligned, lines))


def size(nbytes: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def total_size(files: Mapping[str, FileDigest]) -> str:
    """Of a folder's files, see :func:`size`."""
    return size(sum(digest.size for digest in files.values()))


def plan_text(plan: Plan, free_bytes: int) -> str:
    """What ``--dry-run`` prints."""
    groups = defaultdict(list)
    for weight in plan.weights:
        groups[module_kind(weight.target.module.name)].append(weight)
    rows = []
    for kind, weights in groups.items():
        shapes = {(weight.target.out_features, weight.target.in_features) for weight in weights}
        ranks = {weight.target.rank for weight in weights}
        rows.append([kind, str(len(weights)), _shapes(shapes), _span(ranks), weights[0].stored.dtype])
    checkpoint = plan.checkpoint
    return "\n".join(
        [
            table(["module", "weights", "shape", "rank", "dtype"], rows),
            "",
            f"source    {checkpoint.place}: {len(plan.shards)} shard(s), {size(plan.input_bytes)}",
            f"model     {plan.layout.architecture or 'unknown'}, loads with {plan.layout.auto_class}",
            *([f"note      {plan.layout.note}"] if plan.layout.note else []),
            f"targets   {len(plan.weights)} weights, {_trainable(plan):,} trainable parameters",
            f"output    residual {size(plan.output_bytes - plan.adapter.file_size)}, "
            f"adapter {size(plan.adapter.file_size)}",
            f"disk      {size(plan.disk_bytes())} needed, {size(free_bytes)} free",
        ]
    )


def plan_json(plan: Plan, free_bytes: int) -> dict[str, Any]:
    return {
        "source": str(plan.checkpoint.place),
        "architecture": plan.layout.architecture,
        "auto_class": plan.layout.auto_class,
        "note": plan.layout.note,
        "settings": plan.settings.as_dict(),
        "weights": [
            {
                "tensor": weight.stored.name,
                "module": weight.target.module.name,
                "shape": [weight.target.out_features, weight.target.in_features],
                "dtype": weight.stored.dtype,
                "rank": weight.target.rank,
                "alpha": weight.target.alpha,
            }
            for weight in plan.weights
        ],
        "trainable_parameters": _trainable(plan),
        "input_bytes": plan.input_bytes,
        "output_bytes": plan.output_bytes,
        "adapter_bytes": plan.adapter.file_size,
        "disk_bytes": plan.disk_bytes(),
        "free_bytes": free_bytes,
        "digest": plan.digest,
    }


def manifest_text(manifest: Manifest) -> str:
    """A line per kind of module: shapes, ranks, energy and errors, the worst of each."""
    rows = []
    for kind, weights in _by_kind(manifest.weights).items():
        energy = [weight.energy for weight in weights]
        rows.append(
            [
                kind,
                str(len(weights)),
                _shapes({weight.shape for weight in weights}),
                _span({weight.rank for weight in weights}),
                f"{min(energy):.1%}-{max(energy):.1%}" if len(energy) > 1 else f"{energy[0]:.1%}",
                f"{max(weight.certificate.energy_loss for weight in weights):.1e}",
                f"{max(_sigma_error(weight) for weight in weights):.1e}",
                f"{max(weight.reconstruction.relative_frobenius for weight in weights):.1e}",
            ]
        )
    header = ["module", "weights", "shape", "rank", "energy", "energy loss <=", "sigma error <=", "rounding"]
    return table(header, rows)


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest without the singular values and file hashes, and the worst figures of all weights."""
    weights = manifest.weights
    return {
        "source": asdict(manifest.source),
        "settings": dict(manifest.settings),
        "environment": dict(manifest.environment),
        "weights": [
            {key: value for key, value in asdict(weight).items() if key != "singular_values"} for weight in weights
        ],
        "worst": {
            "energy_loss": max(weight.certificate.energy_loss for weight in weights),
            "sigma_error": _finite(max(_sigma_error(weight) for weight in weights)),
            "failure_probability": max(weight.certificate.failure_probability for weight in weights),
            "max_abs": max(weight.reconstruction.max_abs for weight in weights),
            "relative_frobenius": max(weight.reconstruction.relative_frobenius for weight in weights),
        },
    }


def conversion_text(record: ConversionRecord) -> str:
    """A line per kind of module: shapes, ranks, how much training changed it and how exact the result is."""
    groups = defaultdict(list)
    for module in record.modules:
        groups[module_kind(module.module)].append(module)
    rows = []
    for kind, modules in groups.items():
        updates = [module.update for module in modules if module.update is not None]
        rows.append(
            [
                kind,
                str(len(modules)),
                _shapes({module.shape for module in modules}),
                _span({module.rank for module in modules}),
                f"{max(updates):.1e}" if updates else "new",
                f"{max(module.error for module in modules):.1e}",
            ]
        )
    return table(["module", "modules", "shape", "rank", "change / s B A", "error"], rows)


def conversion_json(record: ConversionRecord) -> dict[str, Any]:
    return {**asdict(record), "largest_error": record.largest_error}


def findings_text(findings: Findings) -> str:
    """A line per check, and below it what failed."""
    lines = []
    for check in findings.checks:
        lines.append(f"{'FAILED' if check.problems else 'ok':7} {check.name}: {check.count}")
        lines += [f"        {problem}" for problem in check.problems]
    lines.append("sound" if findings.is_sound else "NOT sound: do not use this folder")
    return "\n".join(lines)


def findings_json(findings: Findings) -> dict[str, Any]:
    return {"is_sound": findings.is_sound, "checks": [asdict(check) for check in findings.checks]}


def published_text(published: Published, *, dry_run: bool) -> str:
    """What changed on the Hub, or for a dry run what would, a line per file."""
    if published.is_unchanged:
        return f"{published.url} has this release already; nothing to do"
    rows = [[name, size(nbytes)] for name, nbytes in published.uploaded.items()]
    rows += [[name, "deleted"] for name in published.deleted]
    uploaded = size(sum(published.uploaded.values()))
    if dry_run:
        last = f"{uploaded} of {size(published.nbytes)} would go to {published.url} in one commit"
    else:
        where = published.pull_request or f"{published.url} at commit {published.commit}"
        last = f"{uploaded} of {size(published.nbytes)} -> {where}"
    return "\n".join([table(["file", "size"], rows), "", last])


def plot_spectra(manifest: Manifest, path: Path) -> None:
    """Write :func:`spectra_png` to a file.

    Raises:
        ImportError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    picture = spectra_png(manifest)
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "give another path for the plot") from error


def spectra_png(manifest: Manifest) -> bytes:
    """Singular values per kind of module, relative to the largest, median and range over the layers, as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, weights in _by_kind(manifest.weights).items():
        count = min(weight.rank for weight in weights)
        curves = [
            # A logarithmic axis has no place for the zeros of a rank-deficient weight.
            [max(value / (weight.singular_values[0] or 1.0), 1e-8) for value in weight.singular_values[:count]]
            for weight in weights
        ]
        columns = [sorted(column) for column in zip(*curves, strict=True)]
        index = range(1, count + 1)
        (line,) = axes.plot(index, [column[len(column) // 2] for column in columns], label=kind)
        axes.fill_between(index, [c[0] for c in columns], [c[-1] for c in columns], alpha=0.15, color=line.get_color())
    axes.set_xlabel("index i")
    axes.set_ylabel(r"$\sigma_i / \sigma_1$")
    axes.set_title("Leading singular values (median and range over layers)")
    axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def module_kind(name: str) -> str:
    """A module's path with its layer numbers replaced, e.g. model.layers.*.mlp.up_proj."""
    return _LAYER.sub(".*", name)


def _by_kind(weights: Iterable[WeightRecord]) -> dict[str, list[WeightRecord]]:
    groups: dict[str, list[WeightRecord]] = defaultdict(list)
    for weight in weights:
        groups[module_kind(weight.module)].append(weight)
    return groups


def _sigma_error(weight: WeightRecord) -> float:
    error = weight.certificate.sigma_error
    return math.inf if error is None else error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _trainable(plan: Plan) -> int:
    return sum(weight.lora_A.numel + weight.lora_B.numel for weight in plan.weights)


def _shapes(shapes: set[tuple[int, int]]) -> str:
    return " ".join(f"{rows}x{columns}" for rows, columns in sorted(shapes)[:3]) + (" ..." if len(shapes) > 3 else "")


def _span(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values)}-{max(values)}"
