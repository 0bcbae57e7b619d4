"""The corpus of hostile files and folders: each is refused in one harmless line, or gains nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..helpers import run_cli
from .case import Attack
from .corpus import ATTACKS
from .sound import write_sound

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and devices")

Capture = pytest.CaptureFixture[str]

# Of a line, wherever the folder is: paths in it are relative.
MAX_CHARS = 500
# A command that hangs on a pipe fails its test instead of hanging all.
PATIENCE = 60


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of ``sound``; for reading only."""
    folder = tmp_path_factory.mktemp("sound")
    write_sound(folder)
    return folder


@contextmanager
def patience() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError("the command waits for something")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every name below a folder with mode and size; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = f"{root}/{name}"
            status = os.lstat(path)
            found[path.removeprefix(f"{folder}/")] = (status.st_mode, 0 if name in folders else status.st_size)
    return found


@pytest.mark.parametrize(
    "attack", [pytest.param(attack, marks=[pytest.mark.slow] * attack.is_slow, id=attack.name) for attack in ATTACKS]
)
def test_attack(attack: Attack, sound: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "case"
    attack.build(sound, folder)
    monkeypatch.chdir(folder)
    before = tree(tmp_path)
    with patience():
        ran = run_cli(capfd, *attack.arguments)
    after = tree(tmp_path)
    added = after.keys() - before.keys()
    shutil.rmtree(folder, ignore_errors=True)  # hundreds of megabytes, some of them
    assert ran.code == attack.code, ran
    if attack.code == 0:
        assert attack.line in f"{ran.err}\n{ran.out}", ran
        assert {name.split("/")[1] for name in added} <= ({"out"} if attack.writes else set())
        lines = [*ran.err.splitlines(), *ran.out.splitlines()]
    else:
        assert before == after
        lines = ran.out.splitlines() if attack.command.startswith("verify") and ran.out else [ran.error]
        assert any(attack.line in line for line in lines), lines
    for line in lines:
        assert line.isprintable(), line
        assert len(line) <= MAX_CHARS, line


def test_names_are_unique_and_commands_many() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert sum(attack.code != 0 for attack in ATTACKS) >= 80
    assert {attack.arguments[0] for attack in ATTACKS} >= {
        *("decompose", "convert", "merge", "restore", "verify", "inspect", "publish", "recipes"),
    }
