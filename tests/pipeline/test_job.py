"""What a job that several processes share does at its ends: who comes late, who is elsewhere, what two have done."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from pissa_hub import decompose
from pissa_hub.errors import OutputError, PeerError
from pissa_hub.pipeline import job, shared
from pissa_hub.pipeline.receipts import WorkFolder
from pissa_hub.pipeline.share import Share
from pissa_hub.pipeline.shared import Shared
from pissa_hub.pipeline.store import host_store

from ..conftest import SHARDED, Factory
from ..helpers import files_of

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def source(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint(shard_size=SHARDED, num_hidden_layers=1)


@pytest.fixture
def reference(source: Path, tmp_path: Path) -> Path:
    decompose(source, tmp_path / "reference", rank=4)
    return tmp_path / "reference"


def become(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    """One of two processes, and one that does not wait long."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for owner, name, seconds in (
        (shared, "GRACE_SECONDS", 0.5),
        (shared, "JOIN_SECONDS", 0.5),
        (job, "_LAG_SECONDS", 0.5),
    ):
        monkeypatch.setattr(owner, name, seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_whoever_comes_when_all_is_finished_and_gone_loads_it(
    source: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(reference)
    become(monkeypatch, 1, free_port())
    assert decompose(source, reference, rank=4).was_finished
    assert files_of(reference) == before


def test_whoever_finds_nobody_says_so(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, 1, free_port())
    with pytest.raises(
        PeerError, match=r"the rendezvous store at 127\.0\.0\.1:\d+ cannot be reached .*; look at rank 0"
    ):
        decompose(source, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_another_folder_than_rank_0s_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though rank 0 may be through already."""
    store = host_store()
    become(monkeypatch, 1, store.port)
    monkeypatch.setattr(Shared, "join", lambda schedule: None)
    with pytest.raises(OutputError, match="out is not the folder that rank 0 writes; give every rank one folder"):
        decompose(source, tmp_path / "out", rank=4)


@pytest.mark.parametrize("suffix", ["", ".adapter"])
def test_what_two_have_written_is_looked_at_again(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """One of them was taken for dead, had other bits, and put its file in the other one's place before it died."""
    become(monkeypatch, 0, free_port())
    add, written = Share.add, []

    def overwritten(share: Any, name: str, path: Path, *arguments: Any) -> None:
        add(share, name, path, *arguments)
        written.append(name)
        if len(written) == 2:
            target = WorkFolder(tmp_path / "out", "").adapter_part(name) if suffix else path
            data = target.read_bytes()
            target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(Share, "add", overwritten)
    monkeypatch.setattr(Shared, "inherited", lambda schedule: [1])
    decompose(source, tmp_path / "out", rank=4)
    assert written.count(written[1]) == 2
    assert files_of(tmp_path / "out") == files_of(reference)
