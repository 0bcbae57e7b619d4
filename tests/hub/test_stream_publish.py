"""``decompose --publish``: a model larger than the disk goes to the Hub shard by shard and appears in one commit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import decompose, publish
from pissa_hub.errors import HubError, MatrixError, OutputError, VerificationError
from pissa_hub.pipeline import decompose as verb
from pissa_hub.pipeline import output as output_folder
from pissa_hub.pipeline.decompose import plan_decomposition, publishing_bytes
from pissa_hub.pipeline.settings import Settings

from ..conftest import SHARDED, Factory
from ..helpers import ADAPTER, MANIFEST, ROOT, files_of, manifest_of, run_cli
from ..interrupted import receipts_in, wait_until
from ..loopback import LoopbackHub
from ..loopback.repositories import Repository
from ..loopback.server import Storage
from .publishing import CLIENT_S_OWN_WARNINGS, decomposed, logged_in, put_base, stop_at, stored, trained_adapter
from .pulling import REPO, SETTINGS, Client, Hubs, shards_of
from .test_pull import Peak, upload_by_client

pytestmark = CLIENT_S_OWN_WARNINGS

NAME = "user/streamed"
UPLOAD = "/commit/pissa-upload"
# What a folder keeps whose shards are on the Hub alone.
PLACE = ".pissa_published.json"


@dataclass(frozen=True)
class Place:
    """Where a test decomposes to: a hub that this process is logged in to, a source, and a folder."""

    hub: LoopbackHub
    source: Path
    output: Path

    @property
    def command(self) -> list[str]:
        return ["decompose", str(self.source), "-o", str(self.output), "--rank", "4", "--publish", NAME]

    @property
    def local_shards(self) -> list[str]:
        return [path.name for path in shards_of(self.output)]

    @property
    def count(self) -> int:
        return len(shards_of(self.source))

    @property
    def waiting(self) -> str | None:
        """The branch that shards wait on."""
        if not self.hub.exists(NAME):
            return None
        refs = self.hub.repositories.load("model", NAME).refs
        return next((name for name in refs if name.startswith("refs/heads/pissa-upload-")), None)

    @property
    def waiting_shards(self) -> list[str]:
        assert self.waiting is not None
        return sorted(name for name in self.hub.files(NAME, self.waiting) if name.startswith("model-"))

    def decompose(self, **options: object) -> verb.Outcome:
        return decompose(self.source, self.output, **{"rank": 4, "publish": NAME, **options})

    def start(self) -> subprocess.Popen[str]:
        """The command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "pissa_hub", *self.command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def assert_published(self, reference: Path) -> None:
        """The branch went from empty to what publishing a local decomposition makes of it, and nothing is left over."""
        assert len(self.hub.commits(NAME)) == 2
        assert set(self.hub.commits(NAME)[-1].tree) == {".gitattributes"}
        assert self.waiting is None
        assert self.local_shards == []
        assert not (self.output / ".pissa").exists()
        here, there = files_of(self.output), files_of(reference)
        assert here.keys() == there.keys() - {path.name for path in shards_of(reference)} | {PLACE}
        assert all(here[name] == there[name] for name in here.keys() - {PLACE})
        assert publish(reference, NAME).is_unchanged


@pytest.fixture
def place(tiny_checkpoint: Factory, tmp_path: Path) -> Iterator[Place]:
    with logged_in(tmp_path / "hub") as hub:
        source = put_base(hub, tiny_checkpoint(shard_size=SHARDED))
        yield Place(hub, source, tmp_path / "out")


@pytest.fixture
def reference(place: Place, tmp_path: Path) -> Path:
    """The same decomposition, all of it here."""
    return decomposed(place.source, tmp_path / "reference")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between its attempts take no time."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


class ShardPeak(Peak):
    """Also of the output's shards, finished or not."""

    shards = 0

    def look(self) -> None:
        super().look()
        with suppress(FileNotFoundError), self._lock:
            self.shards = max(self.shards, sum(path.stat().st_size for path in self._output.glob("model-*")))


@pytest.mark.parametrize("storage", ["basic", pytest.param("xet", marks=pytest.mark.slow)])
def test_model_larger_than_the_disk(loopback_hub: Hubs, source: Path, tmp_path: Path, storage: Storage) -> None:
    hub = loopback_hub(storage)
    if storage == "xet":
        upload_by_client(hub, source, tmp_path / "uploader")
    else:
        hub.upload_folder(REPO, source)
    client, output, local = Client(hub, tmp_path / "home"), tmp_path / "out", tmp_path / "local"
    command = ("decompose", REPO, "-o", output, *SETTINGS, "--keep-source", "no", "--publish", NAME)
    with ShardPeak(output, client.home) as peak:
        hub.fail("", None, times=1000, action=peak.look)
        ran = client.run(*command)
    assert f"-> {NAME}: residual" in ran.out
    sizes = sorted(path.stat().st_size for path in shards_of(source))
    assert len(sizes) >= 11
    stayed = sum(len(data) for data in files_of(output).values())
    parts = (output / ADAPTER).stat().st_size + 2000 * len(sizes)
    written = {name: digest for name, digest in manifest_of(output)["files"].items() if name.startswith("model-")}
    logs = sum(path.stat().st_size for path in client.home.glob("xet/logs/*"))
    assert 0 < peak.source <= sizes[-1] + sizes[-2]
    largest = max(digest["size"] for digest in written.values())
    assert 0 < peak.shards <= largest
    assert peak.whole <= sizes[-1] + sizes[-2] + largest + parts + stayed
    assert peak.whole < sum(sizes)
    assert peak.home - logs < 300_000 + sizes[0]

    trained = tmp_path / "trained"
    again, other, here, there, made, restored, converted, unchanged = client.run_all(
        command,
        command[:-2],
        ("verify", output),
        ("verify", NAME, "--source", REPO),
        ("decompose", REPO, "-o", local, *SETTINGS),
        ("restore", REPO, "--init", output, "-o", tmp_path / "restored"),
        ("convert", trained_adapter(output, trained), "--init", output, "-o", tmp_path / "lora"),
        ("publish", local, NAME),
    )
    assert again.out == f"{hub.endpoint}/{NAME} has this release already; nothing to do\n"
    commit = hub.commits(NAME)[0].sha
    assert f"shards are on the Hub alone, as {NAME}@{commit}" in other.error
    assert f"are on the Hub alone; run `pissa-hub verify {NAME}@{commit}`" in here.error
    assert "sound" in there.out
    assert made.code == restored.code == converted.code == 0
    assert files_of(tmp_path / "restored") == files_of(local)
    assert "has this release already" in unchanged.out
    assert len(hub.commits(NAME)) == 2
    assert len(hub.repositories.load("model", NAME).refs) == 1
    assert not any(request.authorized for request in hub.requests if request.origin == "cdn")
    for folder in (output, client.home):
        assert not any(LoopbackHub.token.encode() in data for data in files_of(folder).values())


# Requests that the client does not outlive, after so many of the kind that it does.
REFUSED = {
    "before a shard counts": (UPLOAD, 2, "POST"),
    "at the next shard": ("/preupload/pissa-upload", 3, "POST"),
    "before the last commit": ("/commit/main", 0, "POST"),
    "before the branch is deleted": ("/branch/", 0, "DELETE"),
}
# Changes on the hub that the client never hears of; the first two make the repository and the branch.
DONE = {"after a shard counts": 5, "after the last commit": 9, "after the branch is deleted": 10}
QUICK_KILLS = {"before a shard counts", "after a shard counts", "before the last commit", "after the last commit"}


@pytest.mark.parametrize(
    "point",
    [pytest.param(kill, marks=[] if kill in QUICK_KILLS else [pytest.mark.slow]) for kill in (*REFUSED, *DONE)],
)
def test_killed_client_carries_on(place: Place, reference: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    running: list[subprocess.Popen[str]] = []
    save, changes = place.hub.repositories.save, 0

    def deadly(repository: Repository) -> None:
        nonlocal changes
        save(repository)
        changes += 1
        if changes == DONE.get(point):
            running[0].kill()

    if point in REFUSED:
        path, passing, method = REFUSED[point]
        place.hub.fail(path, None, times=passing, method=method)
        place.hub.fail(path, 503, action=lambda: running[0].kill(), method=method)
    with monkeypatch.context() as patch:
        patch.setattr(place.hub.repositories, "save", deadly)
        running.append(place.start())
        _, errors = running[0].communicate(timeout=100)
    assert running[0].returncode == -9, errors
    shards = [path.name for path in shards_of(reference)]
    is_finished = (place.output / MANIFEST).exists()
    assert is_finished == ("shard" not in point)
    assert len(place.hub.commits(NAME)) == (2 if is_finished and point != "before the last commit" else 1)
    here = {"before a shard counts": 2, "after a shard counts": 2, "at the next shard": 3}.get(point)
    there = {"before a shard counts": 2, "after a shard counts": 3, "at the next shard": 3}.get(point, len(shards))
    assert place.local_shards == ([] if here is None else [shards[here]])
    if point == "after the branch is deleted":
        assert place.waiting is None
    else:
        assert place.waiting_shards == shards[:there]

    outcome = place.decompose()
    assert outcome.published is not None
    assert outcome.was_finished == is_finished
    place.assert_published(reference)
    assert len(set(stored(place.hub))) == len(stored(place.hub)), "what was uploaded was sent again"
    again = place.decompose()
    assert again.was_finished
    assert again.published is not None
    assert again.published.is_unchanged
    place.assert_published(reference)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["basic", "xet"])
def test_killed_at_any_time(loopback_hub: Hubs, source: Path, tmp_path: Path, storage: Storage) -> None:
    """From the Hub to the Hub, and every time as much is done as was."""
    hub = loopback_hub(storage)
    hub.upload_folder(REPO, source)
    client, output, local = Client(hub, tmp_path / "home"), tmp_path / "out", tmp_path / "local"
    command = ("decompose", REPO, "-o", output, *SETTINGS, "--keep-source", "no", "--publish", NAME)
    chance, done = random.Random(0), 0
    for _ in range(2):
        over = Event()
        hub.fail(UPLOAD, None, times=4, seconds=0.05)
        hub.fail(UPLOAD, 503, times=100, action=over.wait)
        process = client.start(*command)
        try:
            wait_until(lambda done=done: len(receipts_in(output)) > done, process)
            time.sleep(chance.random() * 0.3)
            process.kill()
            process.communicate()
        finally:
            over.set()
            hub.heal()
        assert not hub.exists(NAME) or set(hub.files(NAME)) == {".gitattributes"}
        assert len(receipts_in(output)) >= done
        done = len(receipts_in(output))
    assert 0 < done < len(shards_of(source))
    finished, _, unchanged = client.run_all(
        command, ("decompose", REPO, "-o", local, *SETTINGS), ("publish", local, NAME)
    )
    assert f"carried on: {done} of" in finished.out
    assert "has this release already" in unchanged.out
    assert len(hub.commits(NAME)) == 2
    assert shards_of(output) == []


@pytest.mark.parametrize("stage", ["/upload/", UPLOAD, "/commit/main"])
def test_killed_server_carries_on(place: Place, reference: Path, no_waiting: None, stage: str) -> None:
    stopping = stop_at(place.hub, stage, passing=0 if "main" in stage else 2)
    with pytest.raises(HubError) as caught:
        place.decompose()
    assert "\n" not in str(caught.value)
    stopping.join()
    place.hub.heal()
    place.hub.start()
    assert set(place.hub.files(NAME)) == {".gitattributes"}
    place.decompose()
    place.assert_published(reference)


@pytest.mark.parametrize(("stage", "status"), [("/upload/", 503), (UPLOAD, 403), ("/preupload/", 403), ("/batch", 500)])
def test_refused_upload_is_one_line_and_can_be_carried_on(
    place: Place, reference: Path, no_waiting: None, capfd: pytest.CaptureFixture[str], stage: str, status: int
) -> None:
    place.hub.fail(stage, None, times=2)
    place.hub.fail(stage, status, times=100)
    line = run_cli(capfd, *place.command).err.splitlines()[-1]
    assert line.startswith("error: ")
    assert LoopbackHub.token not in line
    assert "Signature" not in line
    assert "right to write" in line if status == 403 else f"status {status}" in line
    shards = [path.name for path in shards_of(reference)]
    assert (place.local_shards, place.waiting_shards) == (shards[2:3], shards[:2])
    assert set(place.hub.files(NAME)) == {".gitattributes"}
    place.hub.heal()
    assert place.decompose().carried_over == 3
    place.assert_published(reference)
    assert len(set(stored(place.hub))) == len(stored(place.hub))


@pytest.mark.slow
def test_interrupt_does_not_wait_for_the_upload(place: Place, reference: Path) -> None:
    arrived, over = Event(), Event()
    place.hub.fail(UPLOAD, None, times=1)
    place.hub.fail(UPLOAD, None, action=lambda: (arrived.set(), over.wait()))
    process = place.start()
    try:
        wait_until(arrived.is_set, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        over.set()
    assert process.returncode == 130, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    place.decompose()
    place.assert_published(reference)


def test_bad_weight_leaves_nothing(place: Place, tmp_path: Path) -> None:
    path = shards_of(place.source)[3]
    tensors = load_file(path)
    name = next(name for name in tensors if "proj" in name)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MatrixError, match=re.escape(name)):
        place.decompose()
    assert not place.output.exists()
    assert place.waiting is None
    assert set(place.hub.files(NAME)) == {".gitattributes"}


def test_local_run_is_carried_on_with(place: Place, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutputError("the disk is full", "free some space")

    with monkeypatch.context() as patch:
        patch.setattr(verb, "finish", full)
        with pytest.raises(OutputError, match="the disk is full"):
            place.decompose(publish=None)
    assert len(place.local_shards) == place.count
    assert place.decompose().carried_over == place.count
    place.assert_published(reference)


def test_run_is_carried_on_with_without_publishing(place: Place, reference: Path, no_waiting: None) -> None:
    place.hub.fail(UPLOAD, None, times=2)
    place.hub.fail(UPLOAD, 503, times=100)
    with pytest.raises(HubError):
        place.decompose()
    assert place.decompose(publish=None).carried_over == 1, "the shard that is still here"
    assert files_of(place.output) == files_of(reference)


def test_shards_of_a_finished_folder_stay(place: Place, reference: Path) -> None:
    before = files_of(reference)
    outcome = decompose(place.source, reference, rank=4, publish=NAME)
    assert outcome.was_finished
    assert outcome.published is not None
    assert outcome.published.commit == place.hub.commits(NAME)[0].sha
    assert files_of(reference) == before
    assert publish(reference, NAME).is_unchanged


def test_finished_folder_names_its_place_and_takes_no_other(place: Place) -> None:
    place.decompose()
    at = f"{NAME}@{place.hub.commits(NAME)[0].sha}"
    with pytest.raises(OutputError, match=f"its shards are on the Hub alone, as {at}"):
        place.decompose(publish=None)
    with pytest.raises(VerificationError, match=r"neither in .* nor in user/another"):
        place.decompose(publish="user/another")
    assert set(place.hub.files("user/another")) == {".gitattributes"}


def test_new_release_takes_the_place_of_an_old_one(place: Place, tmp_path: Path) -> None:
    publish(decomposed(place.source, tmp_path / "first", rank=8), NAME)
    before = place.hub.files(NAME)
    heads: list[bool] = []
    place.hub.fail(UPLOAD, None, times=99, action=lambda: heads.append(place.hub.files(NAME) == before))
    place.decompose()
    assert heads == [True] * place.count
    assert len(place.hub.commits(NAME)) == 3
    assert publish(decomposed(place.source, tmp_path / "second"), NAME).is_unchanged


def test_what_is_wrong_is_said_before_any_work(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.hub.commit("stranger/model", {"config.json": b"{}"})
    refused = run_cli(capfd, *place.command[:-1], "stranger/model").error
    assert "stranger/model holds something else" in refused
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", LoopbackHub.read_token)
        assert "may only read" in run_cli(capfd, *place.command).error
    assert not place.output.exists()
    place.output.mkdir()
    (place.output / "mine.txt").touch()
    assert "is not empty" in run_cli(capfd, *place.command).error
    assert not place.hub.exists(NAME)
    assert run_cli(capfd, *place.command[:-2], "--private").code == 2


def test_release_of_a_gated_base_is_private(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.hub.gate("org/model")
    ran = run_cli(capfd, *place.command)
    assert ran.code == 0, ran
    assert f"note: {NAME} will be private, for org/model is gated" in ran.err
    assert place.hub.repositories.load("model", NAME).private


def test_room_for_one_shard_is_enough(
    place: Place, reference: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_decomposition(place.source, Settings(rank=4))
    enough = publishing_bytes(plan)
    assert enough < plan.disk_bytes() - plan.input_bytes // 2
    assert "kB are enough with --publish" in run_cli(capfd, *place.command, "--dry-run").err
    monkeypatch.setattr(output_folder, "free_space", lambda output: enough - 1)
    with pytest.raises(OutputError, match="are free"):
        place.decompose()
    monkeypatch.setattr(output_folder, "free_space", lambda output: enough)
    with pytest.raises(OutputError, match="are free"):
        place.decompose(publish=None)
    place.decompose()
    place.assert_published(reference)
