"""What every hostile input of the corpus costs before it is refused, beside the same command's own start-up.

    python -m benchmarks.attacks
    python -m benchmarks.attacks --only header --json FILE

Each case is a command line in a process of its own. Its start-up is that of the same command with a path that does not
exist or, where the case gets so far that transformers is imported, with sound inputs. The goal: a case takes at most a
second and 100 MB more. Seconds are those of the processor, user and system, which other work on the machine hardly
changes; a command that waits is stopped after a minute and fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

from benchmarks.processes import ROOT
from benchmarks.results import machine, markdown_table, save, versions

SECONDS = 1.0
MEGABYTES = 100.0
START_UPS = 3
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


class StartUp:
    """What commands take by themselves.

    Args:
        folder: holds ``sound``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.of = cache(self._of)

    def _of(self, command: str, is_late: bool) -> tuple[float, float]:
        """Seconds and megabytes, the median and the least of several runs."""
        arguments = _sound(command) if is_late else _wrong(command)
        runs = []
        for _ in range(START_UPS):
            with tempfile.TemporaryDirectory(dir=self._folder) as work:
                for path in (self._folder / "sound").iterdir():
                    (Path(work) / path.name).symlink_to(path)
                runs.append(measure(arguments, Path(work)))
        return sorted(run.seconds for run in runs)[START_UPS // 2], min(run.megabytes for run in runs)


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


def cost(case: dict[str, Any], folder: Path, start_up: StartUp) -> Cost:
    """Of one case."""
    run = measure(case["arguments"], folder)
    if run.code != case["code"]:
        raise SystemExit(f"{case['name']}: exit {run.code} instead of {case['code']}: {run.line}")
    seconds, megabytes = start_up.of(case["arguments"][0], run.is_late)
    return Cost(case["name"], run.code, run.line, run.seconds - seconds, run.megabytes - megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="Cases whose name holds this.")
    parser.add_argument("--jobs", type=int, default=1, help="Cases at once.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", _BUILD, name, arguments.only], cwd=ROOT, check=True)
        cases = json.loads((folder / "cases.json").read_bytes())
        start_up = StartUp(folder)
        for command in sorted({case["arguments"][0] for case in cases}):
            start_up.of(command, False)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            costs = list(
                pool.map(lambda number: cost(cases[number], folder / str(number), start_up), range(len(cases)))
            )
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
