"""This tool beside PEFT's own way, on the same checkpoint, as whole processes in turn.

python -m benchmarks.compare                 time, memory and accuracy on a checkpoint of about 1 GB
python -m benchmarks.compare --memory        this tool's peak memory on 8 and on 32 layers of the same width
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import CACHE, Measured, ProcessError, call, run, warm
from benchmarks.results import machine, markdown_table, save, small, versions

OURS = "pissa-hub"
PEFT_WAYS = ("pissa_niter_4", "pissa_niter_16")
PACKAGES = ("pissa_hub", "torch", "transformers", "peft", "safetensors", "numpy")


def checkpoint(layers: int, hidden: int, intermediate: int, shard_mb: int) -> Path:
    """Generate the checkpoint unless it is there, in a process of its own, and read it once."""
    heads, kv_heads = hidden // 64, max(hidden // 512, 1)
    folder = CACHE / f"llama-l{layers}-h{hidden}-i{intermediate}-{shard_mb}mb"
    print(f"checkpoint: {folder.name}", file=sys.stderr)
    run(
        "benchmarks.checkpoints", folder,
        "--layers", str(layers), "--hidden", str(hidden), "--intermediate", str(intermediate),
        "--heads", str(heads), "--kv-heads", str(kv_heads), "--shard-mb", str(shard_mb),
    )  # fmt: skip
    warm(sorted(folder.glob("*.safetensors")))
    return folder


def run_once(method: str, source: Path, out: Path, rank: int) -> Measured:
    """One whole process into a fresh folder."""
    shutil.rmtree(out, ignore_errors=True)
    print(f"{method}, rank {rank} ...", end=" ", file=sys.stderr, flush=True)
    if method == OURS:
        measured = run("pissa_hub", "decompose", source, "-o", out, "--rank", str(rank), "--format", "json")
    else:
        measured = run("benchmarks.peft_way", source, out, "--rank", str(rank), "--init", method)
    print(f"{measured.wall:.1f} s, {measured.peak_rss / 1e9:.2f} GB", file=sys.stderr)
    return measured


def compare(source: Path, ranks: list[int], methods: list[str], repeat: int) -> list[dict[str, Any]]:
    """All methods in turn, ``repeat`` times over, for each rank; accuracy of the first run."""
    rows = []
    out = CACHE / f"out-{os.getpid()}"
    for rank in ranks:
        runs: dict[str, list[Measured]] = {method: [] for method in methods}
        accuracy = {}
        for _ in range(repeat):
            for method in methods:
                try:
                    runs[method].append(run_once(method, source, out, rank))
                    if method not in accuracy:
                        accuracy[method] = call("benchmarks.accuracy", source, out)
                finally:
                    shutil.rmtree(out, ignore_errors=True)
        rows += [_row(method, rank, runs[method], runs[methods[0]], accuracy[method]) for method in methods]
    return rows


def _row(
    method: str, rank: int, runs: list[Measured], ours: list[Measured], accuracy: dict[str, Any]
) -> dict[str, Any]:
    weights = accuracy["weights"]
    return {
        "method": method,
        "rank": rank,
        "wall": [each.wall for each in runs],
        "cpu": [each.cpu for each in runs],
        "peak_rss": [each.peak_rss for each in runs],
        "ours_to_this": median(own.wall / each.wall for own, each in zip(ours, runs, strict=True)),
        "phases": _median_phases(runs),
        "accuracy": {key: max(weight[key] for weight in weights) for key in _ERRORS},
        "certified": accuracy["certified"],
        "weights": weights,
    }


_ERRORS = ("loss", "sigma_error", "reconstruction", "rounding")


def _median_phases(runs: list[Measured]) -> dict[str, float]:
    """Seconds per phase, for processes that report them as ``phases``."""
    reports = [each.report.get("phases") or {} for each in runs]
    return {name: median(report[name] for report in reports) for name in reports[0]}


def comparison_table(rows: list[dict[str, Any]]) -> str:
    header = [
        "method", "rank", "wall s", "spread", "ours / this", "CPU s", "peak RSS",
        "loss", "sigma error", "certified loss", "certified sigma", "W - (W_res + sBA)", "rounding alone",
    ]  # fmt: skip
    cells = []
    for row in rows:
        certified, errors = row["certified"] or {}, row["accuracy"]
        cells.append(
            [
                row["method"] if row["method"] == OURS else f"PEFT {row['method']}",
                str(row["rank"]),
                f"{median(row['wall']):.1f}",
                f"{min(row['wall']):.1f}-{max(row['wall']):.1f}",
                f"{row['ours_to_this']:.2f}",
                f"{median(row['cpu']):.1f}",
                f"{median(row['peak_rss']) / 1e9:.2f} GB",
                small(errors["loss"]),
                small(errors["sigma_error"]),
                small(certified.get("energy_loss")),
                small(certified.get("sigma_error")),
                small(errors["reconstruction"]),
                small(errors["rounding"]),
            ]
        )
    return markdown_table(header, cells)


def phases_table(rows: list[dict[str, Any]]) -> str:
    """Seconds per phase, as each process reports them; start-up and exit of the interpreter are missing."""
    lines = []
    for row in rows:
        if row["phases"]:
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["phases"].items())
            lines.append(f"- {row['method']}, rank {row['rank']}: {parts}")
    return "\n".join(lines)


def memory(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Peak memory of this tool on a shallow and on a deep checkpoint of the same width."""
    peaks: dict[int, list[int]] = {layers: [] for layers in (8, 32)}
    sources = {layers: checkpoint(layers, options.hidden, options.intermediate, options.shard_mb) for layers in peaks}
    out = CACHE / f"out-{os.getpid()}"
    for _ in range(options.repeat):
        for layers, source in sources.items():
            try:
                peaks[layers].append(run_once(OURS, source, out, options.rank[0]).peak_rss)
            finally:
                shutil.rmtree(out, ignore_errors=True)
    shallow, deep = (median(values) for values in peaks.values())
    difference = deep / shallow - 1
    rows = [[str(layers), f"{median(values) / 1e6:.0f} MB"] for layers, values in peaks.items()]
    table = markdown_table(["layers", "peak RSS"], rows) + f"\n\nDifference: {100 * difference:+.1f} %"
    return {"rank": options.rank[0], "peak_rss": peaks, "difference": difference}, table


def speed(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    source = checkpoint(options.layers, options.hidden, options.intermediate, options.shard_mb)
    methods = [OURS, *PEFT_WAYS, *(["pissa"] if options.full else [])]
    rows = compare(source, options.rank, methods, options.repeat)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    summary = f"{comparison_table(rows)}\n\nSeconds per phase (medians):\n\n{phases_table(rows)}"
    return {"layers": options.layers, "bytes": size, "rows": rows}, summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", action="store_true", help="peak memory at 8 and at 32 layers instead")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, help="default 2048; with --memory 1024")
    parser.add_argument("--intermediate", type=int, help="default 2.75 times the hidden size")
    parser.add_argument("--shard-mb", type=int, default=250, help="size of a shard; default 250")
    parser.add_argument("--rank", type=int, action="append", help="repeatable; default 64 and 128")
    parser.add_argument("--repeat", type=int, help="times that every process runs; default 3, with --memory 1")
    parser.add_argument("--full", action="store_true", help="PEFT's full SVD too (slow)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results; the table goes beside it as .md")
    options = parser.parse_args()
    options.rank = options.rank or [64, 128]
    options.repeat = options.repeat or (1 if options.memory else 3)
    options.hidden = options.hidden or (1024 if options.memory else 2048)
    options.intermediate = options.intermediate or options.hidden * 11 // 4
    if options.hidden % 512:
        parser.error("--hidden must be a multiple of 512")
    try:
        result, table = memory(options) if options.memory else speed(options)
    except ProcessError as error:
        sys.exit(str(error))
    setting = {"machine": machine(), "versions": versions(*PACKAGES), "hidden": options.hidden}
    summary = f"{_title(options, setting)}\n\n{table}"
    print(summary)
    if options.json:
        save(options.json, setting | result, summary)


def _title(options: argparse.Namespace, setting: dict[str, Any]) -> str:
    layers = "8 and 32" if options.memory else options.layers
    found = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    width = f"{options.hidden} / {options.intermediate}"
    shape = f"Llama-shaped, bf16, {layers} layers of width {width}, shards of {options.shard_mb} MB"
    return f"{shape}. {setting['machine']}; {found}. Runs of each: {options.repeat}."


if __name__ == "__main__":
    main()
