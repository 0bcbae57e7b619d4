"""What every hostile input of the corpus costs before it is refused, beside the same command's own start-up.

    python -m benchmarks.attacks
    python -m benchmarks.attacks --only header --json FILE

Each case is a command line in a process of its own. Its start-up is that of the same command with a path that does not
exist or, where the case gets so far that transformers is imported, with sound inputs; it is measured again and again
between the cases, and the least counts. The goal: a case takes at most a second and 100 MB more. Seconds are those of
the processor, user and system; a command that waits is stopped after a minute and fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from threading import Timer

from benchmarks.processes import ROOT
from benchmarks.results import machine, markdown_table, save, versions

SECONDS = 1.0
MEGABYTES = 100.0
START_UPS = 3
CASES_PER_START_UP = 10
PATIENCE = 60.0

# The command line, which says last what it imported.
_COMMAND = """
import sys
from pissa_hub.cli import main
try:
    main(sys.argv[1:])
finally:
    print("transformers" in sys.modules, file=sys.stderr)
"""
# In a process of its own: on Linux a child starts with the peak memory of its parent, which torch would make large.
_BUILD = """
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tests.attacks.corpus import ATTACKS
from tests.attacks.sound import write_sound

folder = Path(sys.argv[1])
write_sound(folder / "sound")
cases = []
for attack in ATTACKS:
    if sys.argv[2] in attack.name:
        attack.build(folder / "sound", folder / str(len(cases)))
        cases.append({"name": attack.name, "arguments": attack.arguments, "code": attack.code})
(folder / "cases.json").write_text(json.dumps(cases))
"""


@dataclass(frozen=True)
class Run:
    """What a command did: exit code, last line, seconds, peak megabytes, and whether it imported transformers."""

    code: int
    line: str
    seconds: float
    megabytes: float
    is_late: bool


@dataclass(frozen=True)
class Cost:
    """A case, and its seconds and megabytes beyond the start-up of its command."""

    name: str
    code: int
    line: str
    seconds: float
    megabytes: float

    @property
    def is_within(self) -> bool:
        return self.seconds <= SECONDS and self.megabytes <= MEGABYTES


def measure(arguments: Sequence[str], folder: Path) -> Run:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        watch = Timer(PATIENCE, process.kill)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        watch.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        *lines, imported = said.read().decode(errors="replace").splitlines() or [""]
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(
        process.returncode,
        lines[-1] if lines else "",
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * unit / 1e6,
        imported == "True",
    )


class StartUps:
    """What commands take by themselves.

    Args:
        folder: holds ``sound``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: defaultdict[tuple[str, bool], list[Run]] = defaultdict(list)
        self._cases: defaultdict[tuple[str, bool], count[int]] = defaultdict(count)

    def beside(self, command: str, is_late: bool) -> None:
        """Measure a command's start-up beside one of its cases: several times beside the first, then now and then."""
        number = next(self._cases[command, is_late])
        for _ in range(0 if number % CASES_PER_START_UP else 1 if number else START_UPS):
            with tempfile.TemporaryDirectory(dir=self._folder) as work:
                for path in (self._folder / "sound").iterdir():
                    (Path(work) / path.name).symlink_to(path)
                run = measure(_sound(command) if is_late else _wrong(command), Path(work))
                self._runs[command, is_late].append(run)

    def least(self, command: str, is_late: bool) -> tuple[float, float]:
        """Seconds and megabytes of all runs so far."""
        runs = self._runs[command, is_late]
        return min(run.seconds for run in runs), min(run.megabytes for run in runs)


def _sound(command: str) -> list[str]:
    return {
        "decompose": "decompose source -o out --rank 2",
        "convert": "convert adapter --init done -o out",
        "merge": "merge done adapter -o out",
        "restore": "restore source --init done -o out",
        "verify": "verify done",
        "inspect": "inspect done",
        "publish": "publish merged org/name --dry-run",
        "recipes": "recipes",
    }[command].split()


def _wrong(command: str) -> list[str]:
    return [
        "nowhere" if argument in ("source", "adapter", "done", "merged") else argument for argument in _sound(command)
    ]


def measure_all(folder: Path, jobs: int) -> list[Cost]:
    """Cases in a folder that ``_BUILD`` made."""
    cases, start_ups = json.loads((folder / "cases.json").read_bytes()), StartUps(folder)
    start_ups.beside("decompose", True)  # so that no case pays for a cold disk

    def measure_case(number: int) -> Run:
        case = cases[number]
        run = measure(case["arguments"], folder / str(number))
        if run.code != case["code"]:
            raise SystemExit(f"{case['name']}: exit {run.code} instead of {case['code']}: {run.line}")
        start_ups.beside(case["arguments"][0], run.is_late)
        return run

    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(measure_case, range(len(cases))))
    costs = []
    for case, run in zip(cases, runs, strict=True):
        seconds, megabytes = start_ups.least(case["arguments"][0], run.is_late)
        costs.append(Cost(case["name"], run.code, run.line, run.seconds - seconds, run.megabytes - megabytes))
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="Cases whose name holds this.")
    parser.add_argument("--jobs", type=int, default=1, help="Cases at once.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", _BUILD, name, arguments.only], cwd=ROOT, check=True)
        costs = measure_all(folder, arguments.jobs)
    rows = [[found.name, f"{found.seconds:+.2f}", f"{found.megabytes:+.0f}", found.line[:100]] for found in costs]
    slowest = max(costs, key=lambda found: found.seconds)
    largest = max(costs, key=lambda found: found.megabytes)
    refused = sum(found.code != 0 for found in costs)
    beyond = [found.name for found in costs if not found.is_within]
    known = versions("torch", "transformers")
    summary = "\n\n".join(
        [
            f"{machine()}; {', '.join(f'{name} {number}' for name, number in known.items())}.",
            markdown_table(["case", "seconds", "MB", "says"], rows),
            f"{len(costs)} cases, {refused} refused. Worst: {slowest.seconds:+.2f} s ({slowest.name}), "
            f"{largest.megabytes:+.0f} MB ({largest.name}). "
            + (f"Beyond {SECONDS:g} s or {MEGABYTES:g} MB: {', '.join(beyond)}." if beyond else "All within the goal."),
        ]
    )
    print(summary)
    if arguments.json:
        save(arguments.json, {"machine": machine(), "costs": [asdict(found) for found in costs]}, summary)


if __name__ == "__main__":
    main()
