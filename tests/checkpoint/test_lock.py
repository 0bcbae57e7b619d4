"""One process at a time, whoever dies or deletes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pissa_hub.checkpoint import lock
from pissa_hub.checkpoint.lock import locked
from pissa_hub.errors import OutputError

from ..helpers import ROOT

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="no such locks")

_HOLDER = """
import sys, time
from pathlib import Path
from pissa_hub.checkpoint.lock import locked

with locked(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_and_told_whose_the_lock_is(tmp_path: Path) -> None:
    path = tmp_path / "work" / "lock"
    with hold(path) as process:
        said = f"out is being written by process {process.pid} on {socket.gethostname()}; wait for it"
        with pytest.raises(OutputError, match=said), locked(path, Path("out")):
            pass
        process.communicate()
    with locked(path, Path("out")):
        assert path.read_text() == f"{socket.gethostname()} {os.getpid()}"
    assert not path.exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists()
    with locked(path, Path("out")):
        pass


def test_the_same_process_cannot_have_it_twice(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", Path("out")),
        pytest.raises(OutputError, match=f"out is being written by process {os.getpid()} on "),
        locked(tmp_path / "lock", Path("out")),
    ):
        pass


def test_who_waited_for_a_file_that_is_gone_takes_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder deletes the folder between the opening of the file and its lock."""
    path, try_lock, calls = tmp_path / "work" / "lock", lock._try_lock, []

    def deleted_first(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
            path.parent.rmdir()
        return try_lock(descriptor)

    monkeypatch.setattr(lock, "_try_lock", deleted_first)
    with locked(path, Path("out")):
        assert len(calls) == 2
        assert path.read_text().endswith(f" {os.getpid()}")


def test_the_lock_of_the_next_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, Path("out")):
        path.unlink()
        path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_lets_everybody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked(tmp_path / "lock", Path("out")), locked(tmp_path / "lock", Path("out")):
        pass


def test_a_full_disk_does_not_keep_anybody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds it is only for messages."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        locked(tmp_path / "lock", Path("out")),
        pytest.raises(OutputError, match="out is being written by another process; wait"),
        locked(tmp_path / "lock", Path("out")),
    ):
        pass


@pytest.mark.parametrize("what", ["link", "file in the way"])
def test_what_cannot_be_a_lock_is_refused(tmp_path: Path, what: str) -> None:
    path, other = tmp_path / "work" / "lock", tmp_path / "other"
    other.write_bytes(b"somebody's")
    if what == "link":
        path.parent.mkdir()
        path.symlink_to(other)
    else:
        path.parent.write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written: "), locked(path, Path("out")):
        pass
    assert other.read_bytes() == b"somebody's"
