"""One of several processes, or two runs at once: nobody waits in vain, nobody disturbs another."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from pissa_hub import decompose
from pissa_hub.errors import OutputError
from pissa_hub.pipeline import pieces, shared
from pissa_hub.pipeline.decompose import plan_decomposition
from pissa_hub.pipeline.settings import Settings
from pissa_hub.pipeline.share import Share

from ..conftest import Factory
from ..helpers import files_of
from ..interrupted import receipts_in, wait_until
from .processes import COMMAND, ended, free_port, start
from .test_threads import in_time
from .watch import Watch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")


def alone_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be rank 0, whose other never comes."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)


def test_full_disk_ends_the_wait_for_the_last_piece(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has nothing left to read and waits for the very piece that cannot be written, to join it."""
    monkeypatch.setattr(pieces, "MIN_PIECE_BYTES", 20_000)
    monkeypatch.setattr(shared, "GRACE_SECONDS", 1.0)  # for the one that never comes
    source, output = tiny_checkpoint(), tmp_path / "out"
    (shard,) = plan_decomposition(source, Settings(rank=4)).shards
    *others, last = sorted(pieces.cut(shard, 20_000), key=lambda piece: -pieces.bytes_read(piece))

    def full(share: Share[Any], name: str) -> bool:
        if name == last.name:
            raise OutputError("the disk is full", "free some space")
        return True

    with monkeypatch.context() as patch:
        patch.setattr(Share, "permits", full)
        for prepare in (lambda: alone_of_two(patch), lambda: patch.delenv("RANK")):
            prepare()
            with pytest.raises(OutputError, match="the disk is full"):
                in_time(lambda: decompose(source, output, rank=4))
            assert receipts_in(output) == {Path(piece.name).name for piece in others}
    decompose(source, output, rank=4)
    decompose(source, tmp_path / "fresh", rank=4)
    assert files_of(output) == files_of(tmp_path / "fresh")


def test_waiting_for_rank_0_can_be_interrupted(sharded: Path, tmp_path: Path) -> None:
    watch = Watch(tmp_path / "log")
    nobody = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    process = start(watch, [*COMMAND, "decompose", sharded, "-o", tmp_path / "out", "--rank", "4"], **nobody)
    wait_until(lambda: [event.what for event in watch.events()] == ["reaching"], process)
    process.send_signal(signal.SIGINT)
    ((code, _, err),) = ended([process])
    assert code == 130
    assert err.strip() == "interrupted; run the same command again to carry on"


def test_the_second_run_on_a_folder_is_refused(sharded: Path, sharded_by_one: dict[str, bytes], tmp_path: Path) -> None:
    watch, output = Watch(tmp_path / "log"), tmp_path / "out"
    command = [*COMMAND, "decompose", sharded, "-o", output, "--rank", "4"]
    watch.hold()
    first = start(watch, command)
    wait_until(lambda: bool(watch.done()), first)
    ((code, out, err),) = ended([start(watch, command)])
    assert (code, out) == (1, "")
    fact = f"{output} is being written by process {first.pid} on {socket.gethostname()}"
    assert err == f"error: {fact}; wait for it, or stop it and run this command again\n"
    assert first.poll() is None
    watch.release()
    ((code, _, err),) = ended([first])
    assert code == 0, err
    assert files_of(output) == sharded_by_one
