"""A model on a loopback Hub, and the command line in processes of its own that pull it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..helpers import MANIFEST, ROOT, Ran, files_of, manifest_of
from ..loopback.server import LoopbackHub

Hubs = Callable[..., LoopbackHub]
REPO = "org/model"
SETTINGS = ("--rank", 4)

# Several commands in one process: importing torch takes longer than all of them.
_DRIVER = """
import contextlib, io, json, sys
from pissa_hub.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@dataclass(frozen=True)
class Client:
    """A machine of its own: its cache lies in ``home``."""

    hub: LoopbackHub
    home: Path
    token: str | None = LoopbackHub.token

    def environment(self, **extra: str) -> dict[str, str]:
        known = self.hub.environment(token=self.token, home=self.home)
        return {**os.environ, "OMP_NUM_THREADS": "1", **known, "PYTHONPATH": str(ROOT), **extra}

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """A command that goes on while the test does something else."""
        return subprocess.Popen(
            [sys.executable, "-m", "pissa_hub", *map(str, arguments)],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object) -> Ran:
        """One command; fails unless it succeeds."""
        (ran,) = self.run_all(arguments)
        assert ran.code == 0, ran
        return ran

    def run_all(self, *commands: Sequence[object], **extra: str) -> list[Ran]:
        """Commands one after the other in one process."""
        arguments = json.dumps([[str(argument) for argument in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, arguments],
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        results = [Ran(*json.loads(line)) for line in done.stdout.splitlines()]
        assert len(results) == len(commands), done.stderr
        for text in (done.stdout, done.stderr):
            assert "hf_loopback" not in text
            assert "Signature" not in text
        # What bypasses the redirection, as a library's own handler of its log does.
        return [*results[:-1], Ran(results[-1].code, results[-1].out, results[-1].err + done.stderr)]


def shard_requests(hub: LoopbackHub) -> list[str]:
    """Names of the shards that were transferred whole, in the order of the requests."""
    return [
        request.path.rsplit("/", 1)[-1]
        for request in hub.requests
        if request.method == "GET" and request.status == 200 and request.path.endswith(".safetensors")
    ]


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def assert_same_but_source(found: Path, local: Path) -> None:
    """Byte-equal files; card and manifest name the repository besides."""
    named = {"README.md", MANIFEST}
    first, second = files_of(found), files_of(local)
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= named
    ours, theirs = manifest_of(found), manifest_of(local)
    for manifest in (ours, theirs):
        del manifest["files"]["README.md"], manifest["sha256"]
    assert {**ours, "source": None} == {**theirs, "source": None}
    assert ours["source"]["files"] == theirs["source"]["files"]
