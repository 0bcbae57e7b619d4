"""Opening what a stranger made: nothing but regular files, without waiting, and no more than is allowed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pissa_hub.checkpoint.opening import open_regular, read_bounded
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.errors import ReadError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and devices")


@pytest.mark.parametrize(
    "make",
    [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/dev/tty")],
    ids=["pipe", "device", "terminal"],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        open_regular(path)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert read_bounded(tmp_path / "b", 7) == b"content"
    with pytest.raises(ValueError, match="is larger than 6 bytes"):
        read_bounded(tmp_path / "b", 6)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "c")


def test_hashing_a_pipe_waits_for_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReadError, match="pipe cannot be read: it is not a regular file"):
        sha256_file(tmp_path / "pipe")
