"""Conversion of a trained 7B-shaped adapter: this tool from files, PEFT with the model in memory, as whole processes.

python -m benchmarks.conversion                    224 modules, rank 128
python -m benchmarks.conversion --peft-layers 16   where memory does not hold PEFT's whole model
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

PACKAGES = ("pissa_hub", "torch", "transformers", "peft", "safetensors", "numpy")


def adapters(layers: int, options: argparse.Namespace) -> Path:
    """Generate both adapters in a process of their own and read them once."""
    folder = CACHE / f"adapters-l{layers}-h{options.hidden}-i{options.intermediate}-r{options.rank}-{options.change:g}"
    if not (folder / "trained" / "adapter_model.safetensors").exists():
        run(
            "benchmarks.adapters", folder, "--layers", str(layers), "--hidden", str(options.hidden),
            "--intermediate", str(options.intermediate), "--rank", str(options.rank), "--change", str(options.change),
        )  # fmt: skip
    warm(sorted(folder.rglob("*.safetensors")))
    return folder


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: ours at full size and at PEFT's, and PEFT's."""
    out = CACHE / f"converted-{os.getpid()}"
    methods: dict[str, tuple[int, list[str]]] = {
        "pissa-hub": (options.layers, ["--dtype", "float32"]),
        "pissa-hub, bf16": (options.layers, ["--dtype", "bfloat16"]),
        "PEFT": (options.peft_layers, []),
    }
    if options.peft_layers != options.layers:
        methods["pissa-hub, PEFT's size"] = (options.peft_layers, ["--dtype", "float32"])
    runs: dict[str, list[Measured]] = {method: [] for method in methods}
    errors: dict[str, float] = {}
    try:
        for _ in range(options.repeat):
            for method, (layers, arguments) in methods.items():
                folder = adapters(layers, options)
                shutil.rmtree(out, ignore_errors=True)
                runs[method].append(_run_once(method, folder, out, layers, arguments, options))
                if method not in errors:
                    report = call("benchmarks.delta_error", folder, out)
                    errors[method] = report["as_stored"]
                    errors[f"{method} cast"] = report["in_bf16"]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return [
        {
            "method": method,
            "layers": layers,
            "wall": median(measured.wall for measured in runs[method]),
            "walls": [measured.wall for measured in runs[method]],
            "peak_rss": max(measured.peak_rss for measured in runs[method]),
            "error": errors[method],
            "error_in_bf16": errors[f"{method} cast"],
            "phases": runs[method][0].report.get("phases"),
        }
        for method, (layers, _) in methods.items()
    ]


def _run_once(
    method: str, folder: Path, out: Path, layers: int, arguments: list[str], options: argparse.Namespace
) -> Measured:
    print(f"{method}, {layers} layers ...", end=" ", file=sys.stderr, flush=True)
    if method == "PEFT":
        measured = run(
            "benchmarks.peft_conversion", folder, out, "--layers", str(layers),
            "--hidden", str(options.hidden), "--intermediate", str(options.intermediate),
        )  # fmt: skip
    else:
        measured = run(
            "pissa_hub", "convert", folder / "trained", "--init", folder / "init", "-o", out,
            "--format", "json", *arguments,
        )  # fmt: skip
    print(f"{measured.wall:.1f} s, {measured.peak_rss / 1e9:.2f} GB", file=sys.stderr)
    return measured


def table(rows: list[dict[str, Any]]) -> str:
    return markdown_table(
        ["method", "modules", "wall s", "peak RSS", "error of the change", "the same, cast to bf16"],
        [
            [
                row["method"],
                str(7 * row["layers"]),
                f"{row['wall']:.1f}",
                f"{row['peak_rss'] / 1e9:.2f} GB",
                small(row["error"]),
                small(row["error_in_bf16"]),
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--peft-layers", type=int, help="of PEFT's model; default all")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--change", type=float, default=0.01, help="of a factor's entry, relative; default 0.01")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results; the table goes beside it as .md")
    options = parser.parse_args()
    options.peft_layers = options.peft_layers or options.layers
    try:
        rows = measure(options)
    except ProcessError as error:
        sys.exit(str(error))
    setting = {"machine": machine(), "versions": versions(*PACKAGES), "rank": options.rank, "change": options.change}
    found = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    summary = (
        f"Llama-shaped adapter, width {options.hidden} / {options.intermediate}, rank {options.rank}, entries moved by "
        f"{options.change:g} of their size. {setting['machine']}; {found}. Runs of each: {options.repeat}."
        f"\n\n{table(rows)}"
    )
    print(summary)
    if options.json:
        save(options.json, setting | {"rows": rows}, summary)


if __name__ == "__main__":
    main()
