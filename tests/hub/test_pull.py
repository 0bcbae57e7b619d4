"""Sources on the Hub give what the same files in a folder give, and cost no more than they must."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread

import pytest

from pissa_hub.checkpoint.header import read_header

from ..conftest import Factory
from ..helpers import ADAPTER, files_of, manifest_of
from ..loopback.server import LoopbackHub
from ..pipeline.watch import Watch
from .pulling import REPO, SETTINGS, Client, Hubs, assert_same_but_source, shard_requests, shards_of


def test_plan_transfers_headers_only(client: Client, hub: LoopbackHub, source: Path, tmp_path: Path) -> None:
    ran = client.run("decompose", REPO, *SETTINGS, "--dry-run", "--format", "json")
    assert json.loads(ran.out)["source"] == REPO
    assert shard_requests(hub) == []
    partial = [request.length for request in hub.requests if request.path.endswith(".safetensors")]
    assert sum(partial) <= len(shards_of(source)) * (16 << 10)
    assert not any("tokenizer" in request.path for request in hub.requests)
    (local,) = client.run_all(("decompose", source, *SETTINGS, "--dry-run", "--format", "json"))
    ours, theirs = json.loads(ran.out), json.loads(local.out)
    assert {key for key in ours if ours[key] != theirs[key]} <= {"source", "free_bytes"}


def test_header_longer_than_the_first_request(
    loopback_hub: Hubs,
    tiny_checkpoint: Factory,
    tmp_path: Path,
) -> None:
    hub, model = loopback_hub(), tiny_checkpoint(num_hidden_layers=20)
    assert read_header(model / "model.safetensors").data_start > 16 << 10
    hub.upload_folder(REPO, model)
    Client(hub, tmp_path / "home").run("decompose", REPO, *SETTINGS, "--dry-run")
    assert shard_requests(hub) == []


def test_same_bytes_as_from_a_folder(client: Client, hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    client.run("decompose", REPO, "-o", output, *SETTINGS)
    assert_same_but_source(output, local)
    record = manifest_of(output)["source"]
    assert record["repo_id"] == REPO
    assert record["revision"] == hub.commits(REPO)[0].sha
    assert record["license"] == "mit"
    assert not any("onnx" in request.path for request in hub.requests)
    assert not any(request.authorized for request in hub.requests if request.origin == "cdn")
    names = shard_requests(hub)
    assert len(names) == len(set(names)) == len(shards_of(output))
    again = client.run("decompose", REPO, "-o", output, *SETTINGS)
    assert "finished already" in again.out
    assert shard_requests(hub) == names


@pytest.mark.parametrize("keep", ["yes", "no"])
def test_several_processes_pull(client: Client, local: Path, tmp_path: Path, keep: str) -> None:
    """Each its own shards; which comes next may not be known before the last is done."""
    command = ("decompose", REPO, "-o", tmp_path / "out", *SETTINGS, "--keep-source", keep, "--devices", "cpu,cpu")
    watch = Watch(tmp_path / "log")
    (ran,) = client.run_all(command, **watch.environment())
    assert ran.code == 0, ran
    assert watch.ranks_at_work() == {0, 1}
    assert_same_but_source(tmp_path / "out", local)


def test_revision(client: Client, hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    commit = hub.commits(REPO)[0].sha
    hub.commit(REPO, {"config.json": b"{}"})
    here, named, folder = client.run_all(
        ("decompose", f"{REPO}@{commit}", "-o", tmp_path / "out", *SETTINGS),
        ("decompose", REPO, "--revision", commit, "-o", tmp_path / "out", *SETTINGS),
        ("decompose", local, "--revision", commit, "-o", tmp_path / "out", *SETTINGS),
    )
    assert here.code == 0, here
    assert "finished already" in named.out
    assert folder.code == 2
    assert_same_but_source(tmp_path / "out", local)


def test_folder_of_that_name_wins(
    client: Client, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "source", tmp_path / REPO)
    client.run("decompose", REPO, "-o", "out", *SETTINGS)
    assert hub.requests == []
    assert manifest_of(tmp_path / "out")["source"]["repo_id"] is None


@pytest.mark.parametrize("storage", ["basic", "xet"])
def test_two_source_shards_on_disk_at_most(
    loopback_hub: Hubs,
    source: Path,
    local: Path,
    tmp_path: Path,
    storage: str,
) -> None:
    hub = loopback_hub(storage)
    if storage == "xet":
        upload_by_client(hub, source, tmp_path / "uploader")
    else:
        hub.upload_folder(REPO, source)
    client, output = Client(hub, tmp_path / "home"), tmp_path / "out"
    sizes = sorted(path.stat().st_size for path in shards_of(source))
    with Peak(output, client.home) as peak:
        hub.fail("", None, times=1000, action=peak.look)
        client.run("decompose", REPO, "-o", output, *SETTINGS, "--keep-source", "no")
    assert_same_but_source(output, local)
    assert 0 < peak.source <= sizes[-1] + sizes[-2]
    assert peak.home < 300_000 + sizes[0]  # tokenizer and the like, no shard
    finished = sum(len(data) for data in files_of(output).values())
    adapter_parts = (output / ADAPTER).stat().st_size + 2000 * len(sizes)
    assert peak.whole <= finished + adapter_parts + sizes[-1] + sizes[-2] + 50_000
    assert not (output / ".pissa").exists()


def upload_by_client(hub: LoopbackHub, folder: Path, home: Path) -> None:
    """Only what came by Xet is given out by Xet."""
    script = (
        "import sys; from huggingface_hub import HfApi; a = HfApi(); a.create_repo(sys.argv[1]); "
        "a.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", script, REPO, str(folder)], env=Client(hub, home).environment(), check=True, timeout=120
    )


class Peak:
    """Most bytes seen on the disk: of source shards in the work folder, in the client's home, in the output.

    It looks as often as it can, which may miss anything, and whenever it is told to.
    """

    def __init__(self, output: Path, home: Path) -> None:
        self.source = self.home = self.whole = 0
        self._output, self._home = output, home
        self._stop, self._lock = Event(), Lock()
        self._thread = Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.look()

    def look(self) -> None:
        shards = bytes_in(self._output / ".pissa" / "source", (".safetensors", ".incomplete"))
        home, whole = bytes_in(self._home), bytes_in(self._output)
        with self._lock:
            self.source = max(self.source, shards)
            self.home = max(self.home, home)
            self.whole = max(self.whole, whole)


def bytes_in(folder: Path, endings: tuple[str, ...] = ("",)) -> int:
    """No more than the files with such names have at the end of the look: 0 if one of them went away meanwhile."""
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.endswith(endings)]
    with suppress(FileNotFoundError):
        total = sum(path.lstat().st_size for path in found)
        return total if all(path.exists() or path.is_symlink() for path in found) else 0
    return 0


@pytest.mark.slow
def test_cached_shards_are_neither_fetched_nor_removed(client: Client, hub: LoopbackHub, tmp_path: Path) -> None:
    client.run("decompose", REPO, "-o", tmp_path / "first", *SETTINGS)
    fetched = shard_requests(hub)
    client.run("decompose", REPO, "-o", tmp_path / "second", "--rank", 8, "--keep-source", "no")
    client.run("verify", tmp_path / "second", "--source", REPO)
    assert shard_requests(hub) == fetched


def test_whole_life_on_the_hub(client: Client, hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    """verify, inspect, restore, convert and merge of repositories."""
    hub.upload_folder("org/pissa", local)
    trained = Path(shutil.copytree(local / "pissa_init", tmp_path / "trained"))
    hub.upload_folder("org/trained", trained)
    verified, inspected, converted, merged, restored, mistaken = client.run_all(
        ("verify", "org/pissa", "--source", REPO),
        ("inspect", "org/pissa@main", "--format", "json"),
        ("convert", "org/trained", "--init", "org/pissa", "-o", tmp_path / "lora"),
        ("merge", "org/pissa", "org/trained", "-o", tmp_path / "merged", "--keep-source", "no"),
        ("restore", REPO, "--init", "org/pissa", "-o", tmp_path / "restored", "--keep-source", "no"),
        ("restore", "org/pissa", "--init", "org/pissa", "-o", tmp_path / "mistaken"),
    )
    assert "sound" in verified.out
    assert json.loads(inspected.out)["weights"]
    assert converted.code == merged.code == 0, (converted, merged)
    assert restored.code == 0, restored
    assert files_of(tmp_path / "restored") == files_of(local)
    assert "org/pissa is already decomposed" in mistaken.err


def test_initial_adapter_takes_no_more_than_it_is(hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    hub.upload_folder("org/pissa", local)
    hub.upload_folder("org/trained", local / "pissa_init")
    client = Client(hub, tmp_path / "home")
    client.run("convert", "org/trained", "--init", "org/pissa", "-o", tmp_path / "lora")
    assert {path.rsplit("/", 1)[-1] for path in shard_requests(hub)} == {"adapter_model.safetensors"}
    assert not any("tokenizer" in request.path for request in hub.requests)
