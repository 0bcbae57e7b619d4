"""Fuzz the parsers: a million inputs shared out over them, each in a process of its own.

    python -m tests.fuzz
    python -m tests.fuzz header index --runs 100000 --seconds 60 --seed 1

Coverage-guided where atheris is installed (the extra `fuzz`), else by structural mutation alone. Exit 1 on a finding,
whose smallest input is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import machine, markdown_table, save, versions

from .targets import TARGETS

_ROOT = Path(__file__).parent.parent.parent
_SHOWN_BYTES = 300


def fuzz(name: str, runs: int, seconds: float, seed: int) -> dict[str, Any]:
    """The report of one target; a process that dies is a finding too."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.campaign", name, folder, str(runs), str(seconds), str(seed)],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        report: dict[str, Any] = json.loads(lines[-1])
        return report
    died = f"the process ended with {done.returncode}"
    counts = dict.fromkeys(("inputs", "accepted", "refused", "broken", "seconds"), 0)
    return {"target": name, "engine": "?", **counts, "findings": {died: ""}, "details": {died: done.stderr[-4000:]}}


def keep(report: dict[str, Any], folder: Path) -> None:
    """Print the findings of a report, and put their inputs into a folder."""
    for what, text in report["findings"].items():
        data = bytes.fromhex(text)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{report['target']}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"\n{report['target']}: {what}\n{report['details'][what]}\n{path}: {data[:_SHOWN_BYTES]!r}\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs, shared out over the targets")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=_ROOT / ".cache" / "fuzz", help="folder for their inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures; the table goes beside it as .md")
    options = parser.parse_args(arguments)
    names = options.targets or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    shares = sum(TARGETS[name].share for name in names)
    reports = []
    for name in names:
        runs = -(-options.runs * TARGETS[name].share // shares)
        reports.append(fuzz(name, runs, options.seconds, options.seed))
        print(_line(reports[-1]), flush=True)
        keep(reports[-1], options.findings)
    setting, table = _setting(), _table(reports)
    print(f"\n{setting}\n\n{table}")
    if options.json:
        rows = [{**report, "findings": list(report["findings"])} for report in reports]
        for row in rows:
            del row["details"]
        save(options.json, {"setting": setting, "seed": options.seed, "rows": rows}, f"{setting}\n\n{table}")
    return int(any(report["findings"] for report in reports))


def _line(report: dict[str, Any]) -> str:
    return (
        f"{report['target']} ({report['engine']}): {report['inputs']} inputs in {report['seconds']:.0f} s, "
        f"{report['accepted']} accepted, {report['refused']} refused, {len(report['findings'])} findings"
    )


def _table(reports: list[dict[str, Any]]) -> str:
    header = ["target", "engine", "inputs", "accepted", "refused", "findings", "time s"]
    rows = [
        [
            report["target"],
            report["engine"],
            f"{report['inputs']:,}",
            f"{report['accepted']:,}",
            f"{report['refused']:,}",
            str(len(report["findings"])),
            f"{report['seconds']:.0f}",
        ]
        for report in reports
    ]
    counts = [f"{sum(report[key] for report in reports):,}" for key in ("inputs", "accepted", "refused")]
    findings, seconds = (
        sum(len(report["findings"]) for report in reports),
        sum(report["seconds"] for report in reports),
    )
    return markdown_table(header, [*rows, ["all", "", *counts, str(findings), f"{seconds:.0f}"]])


def _setting() -> str:
    found = ", ".join(f"{name} {number}" for name, number in versions("pissa_hub", "torch", "atheris").items())
    return f"{machine()}; {found}"


if __name__ == "__main__":
    sys.exit(main())
