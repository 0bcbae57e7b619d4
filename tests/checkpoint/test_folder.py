"""A folder appears whole or not at all, whoever else is at it."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from pissa_hub.checkpoint import folder, lock
from pissa_hub.checkpoint.folder import folder_that_appears_whole
from pissa_hub.checkpoint.writer import write_file_atomic
from pissa_hub.errors import AdapterError, OutputError

from ..helpers import files_of

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="descriptors by name")
with_locks = pytest.mark.skipif(lock.fcntl is None, reason="no such locks")


@pytest.mark.parametrize("there", [False, True])
def test_it_takes_its_name_at_the_end(tmp_path: Path, there: bool) -> None:
    output = tmp_path / "a" / "out"
    if there:
        output.mkdir(parents=True)
    with folder_that_appears_whole(output) as partial:
        assert partial.parent == output.parent
        write_file_atomic(partial / "x", b"1")
        assert not files_of(output)
    assert files_of(tmp_path) == {"a/out/x": b"1"}


def fill(output: Path, error: BaseException) -> None:
    with folder_that_appears_whole(output) as partial:
        (partial / "x").write_bytes(b"1")
        raise error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("stop"), AdapterError("fact", "remedy"), OutputError("fact", "remedy")]
)
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match=str(error)):
        fill(tmp_path / "a" / "b" / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=f"^{tmp_path}/out/absent/x cannot be written: No such file"),
        folder_that_appears_whole(tmp_path / "out") as partial,
    ):
        write_file_atomic(partial / "absent" / "x", b"1")


def test_left_overs_go_and_what_only_looks_like_them_stays(tmp_path: Path) -> None:
    left = tmp_path / ".out.77-0123abcd.partial"
    others = [tmp_path / name for name in (".out.old.77-0123abcd.partial", ".out.mine.partial", "out.partial")]
    for path in (left, *others):
        path.mkdir()
        (path / "x").write_bytes(b"1")
    with folder_that_appears_whole(tmp_path / "out"):
        assert not left.exists()
    assert all(path.exists() for path in others)


@with_locks
def test_the_folder_of_a_run_that_is_alive_stays(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(folder_that_appears_whole(tmp_path / "out"))
        write_file_atomic(first / "x", b"1")
        with folder_that_appears_whole(tmp_path / "out") as second:
            write_file_atomic(second / "x", b"2")
        assert files_of(first) == {"x": b"1"}
        with pytest.raises(OutputError) as caught:
            stack.close()
    assert str(caught.value) == (
        f"{tmp_path / 'out'} was filled by somebody else meanwhile; "
        "run this command again to compare, or choose another folder"
    )
    assert files_of(tmp_path) == {"out/x": b"2"}


@with_locks
def test_a_folder_that_is_taken_for_a_left_over_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the moment between its making and its lock."""
    made = []
    opened_alone = folder.opened_alone

    def removed_first(path: Path) -> object:
        made.append(path)
        if len(made) == 1:
            path.rmdir()
        return opened_alone(path)

    monkeypatch.setattr(folder, "opened_alone", removed_first)
    with folder_that_appears_whole(tmp_path / "out") as partial:
        assert partial == made[1] != made[0]


@linux_only
def test_it_is_durable_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, list[str]]] = []

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            synced.append((path.name, sorted(entry.name for entry in path.iterdir())))

    monkeypatch.setattr(os, "fsync", noted)
    with folder_that_appears_whole(tmp_path / "a" / "out") as partial:
        write_file_atomic(partial / "x", b"1")
    assert (tmp_path.name, ["a"]) in synced
    assert synced.index((partial.name, ["x"])) < synced.index(("a", ["out"]))


def test_a_disk_that_takes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    for output, named in ((tmp_path / "out", "out"), (tmp_path / "a" / "out", "a")):
        with (
            pytest.raises(OutputError, match=rf"{tmp_path / named}: no space left \(\d+ free\); free some space"),
            folder_that_appears_whole(output),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
