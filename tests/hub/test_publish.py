"""Publishing: what is verified here appears there in one commit, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from pissa_hub import convert, merge, publish, restore, verify
from pissa_hub.errors import HubError, OutputError, PissaHubError, PlanError, VerificationError
from pissa_hub.hub import publish_remote
from pissa_hub.hub.publish_errors import MovedError
from pissa_hub.hub.publish_release import PLOT_NAME

from ..conftest import SHARDED, Factory
from ..helpers import ADAPTER, ADAPTER_CONFIG, MANIFEST, ROOT, files_of, run_cli, seal_again
from ..loopback import LoopbackHub
from ..loopback.server import Storage
from .publishing import (
    BASE,
    CARD,
    CLIENT_S_OWN_WARNINGS,
    decomposed,
    json_of,
    logged_in,
    put_base,
    stop_at,
    stored,
    trained_adapter,
)

pytestmark = CLIENT_S_OWN_WARNINGS

STORAGES = ["basic", "multipart", "xet"]
NAME = "user/model-pissa"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with logged_in(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def original(hub: LoopbackHub, tiny_checkpoint: Factory) -> Path:
    """The base, as downloaded from the hub."""
    return put_base(hub, tiny_checkpoint(shard_size=SHARDED))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return decomposed(original, tmp_path / "decomposed")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between its attempts take no time."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


def download(repo_id: str, folder: Path, revision: str | None = None) -> Path:
    path = Path(snapshot_download(repo_id, revision=revision, local_dir=folder))
    shutil.rmtree(path / ".cache")
    return path


@pytest.mark.parametrize("storage", STORAGES)
def test_published_folder_comes_back_sound(tiny_checkpoint: Factory, tmp_path: Path, storage: Storage) -> None:
    with logged_in(tmp_path / "hub", storage) as hub:
        original = put_base(hub, tiny_checkpoint(shard_size=SHARDED))
        folder = decomposed(original, tmp_path / "decomposed")
        before = files_of(folder)
        first = publish(folder, NAME)
        assert files_of(folder) == before
        assert hub.commits(NAME)[0].sha == first.commit
        assert len(hub.commits(NAME)) == 2, "creation and one commit"

        sent = len(stored(hub))
        again = publish(folder, NAME)
        assert again.is_unchanged
        assert again.commit is None
        assert len(hub.commits(NAME)) == 2
        assert len(stored(hub)) == sent

        back = download(NAME, tmp_path / "back")
        assert verify(back, original, sample=-1).is_sound
        published = files_of(back)
        changed = {name for name, data in published.items() if before.get(name) != data}
        assert changed == {".gitattributes", "README.md", ADAPTER_CONFIG, MANIFEST, PLOT_NAME}
        assert json_of(hub, NAME, ADAPTER_CONFIG)["base_model_name_or_path"] == NAME
        assert published[PLOT_NAME].startswith(b"\x89PNG")
        (back / ".gitattributes").unlink()
        assert publish(back, NAME).is_unchanged, "a downloaded copy is the release itself"
        assert not any(call.authorized for call in hub.requests if call.origin == "cdn")
        if storage != "xet":
            assert any(call.origin == "cdn" for call in hub.requests)


def test_branch_is_never_half_changed(hub: LoopbackHub, original: Path, folder: Path, tmp_path: Path) -> None:
    publish(folder, NAME)
    other = decomposed(original, tmp_path / "other", rank=8, exclude="k_proj")
    first, seen, sent = hub.files(NAME), [], len(hub.requests)
    hub.fail("", None, times=1000, action=lambda: seen.append(hub.files(NAME)))
    publish(other, NAME)
    last = hub.files(NAME)
    assert first != last
    assert len(seen) == len(hub.requests) - sent, "seen at every request"
    assert all(files in (first, last) for files in seen)


def test_what_an_earlier_release_left_is_deleted(
    hub: LoopbackHub, original: Path, folder: Path, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    publish(folder, NAME)
    hub.commit(NAME, {"images/cover.txt": b"mine"})
    single = put_base(hub, tiny_checkpoint(), repo_id="org/single")
    published = publish(decomposed(single, tmp_path / "single"), NAME)
    assert "model-00001-of-00006.safetensors" in published.deleted
    names = set(hub.files(NAME))
    assert "model.safetensors" in names
    assert not any("-of-" in name or "index" in name for name in names)
    assert "images/cover.txt" in names, "somebody's own file stays"


PUBLISH = "import sys; from pissa_hub.cli import main; main(['publish', *sys.argv[1:]])"


KILLS = [(storage, stage) for storage in STORAGES for stage in ("preupload", "upload", "commit")]
KILLS.remove(("xet", "upload"))  # Xet's bytes do not pass the hub
SLOW_KILLS = {("xet", "preupload"), *(kill for kill in KILLS if kill[0] == "multipart")}


@pytest.mark.parametrize(
    ("storage", "stage"),
    [pytest.param(*kill, marks=[pytest.mark.slow] if kill in SLOW_KILLS else []) for kill in KILLS],
)
def test_killed_client_carries_on(tiny_checkpoint: Factory, tmp_path: Path, storage: Storage, stage: str) -> None:
    with logged_in(tmp_path / "hub", storage) as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        hub.create(NAME)
        created = hub.files(NAME)
        running: list[subprocess.Popen[bytes]] = []
        if stage == "upload":
            hub.fail("/upload/", None, times=3)
        hub.fail(f"/{stage}/", 503, times=8, action=lambda: running[0].kill(), retry_after=None)
        arguments = [sys.executable, "-c", PUBLISH, str(folder), NAME]
        running.append(subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE))
        _, errors = running[0].communicate(timeout=100)
        assert running[0].returncode == -9, errors
        assert hub.files(NAME) == created
        hub.heal()
        if stage == "commit" and storage != "xet":
            assert len(stored(hub)) == 8, "six shards, the adapter, the picture"
        publish(folder, NAME)
        assert verify(download(NAME, tmp_path / "back")).is_sound
        assert len(set(stored(hub))) == len(stored(hub)), "what was uploaded was sent again"


def test_large_files_go_one_after_another(
    hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_remote, "_SMALL", 40_000)
    publish(folder, NAME)
    batches = [call for call in hub.requests if call.path.endswith("/objects/batch")]
    assert len(batches) == 8, "six shards and the picture each alone, the adapter with the small files"
    assert verify(download(NAME, tmp_path / "back")).is_sound
    assert publish(folder, NAME).is_unchanged


def test_result_of_another_kind_takes_the_place(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    convert(trained_adapter(folder, tmp_path / "trained"), folder, tmp_path / "lora")
    publish(tmp_path / "lora", NAME)
    assert set(publish(folder, NAME).deleted) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pissa_conversion.json",
    }
    assert verify(download(NAME, tmp_path / "back")).is_sound


def test_commit_whose_answer_was_lost_is_found(hub: LoopbackHub, folder: Path, no_waiting: None) -> None:
    hub.fail("/commit/", "cut", method="POST")
    with pytest.raises(HubError):
        publish(folder, NAME)
    publish(folder, NAME)
    assert len(hub.commits(NAME)) == 2


@pytest.mark.parametrize("stage", ["/upload/", "/commit/"])
def test_killed_server_carries_on(hub: LoopbackHub, folder: Path, no_waiting: None, stage: str) -> None:
    stopping = stop_at(hub, stage)
    with pytest.raises(HubError) as caught:
        publish(folder, NAME)
    assert "\n" not in str(caught.value)
    stopping.join()
    hub.heal()
    hub.start()
    assert set(hub.files(NAME)) == {".gitattributes"}
    publish(folder, NAME)
    assert PLOT_NAME in hub.files(NAME)


@pytest.mark.parametrize("status", [503, 429, 500])
def test_passing_faults_are_outlived(hub: LoopbackHub, folder: Path, no_waiting: None, status: int) -> None:
    hub.fail("/upload/", status, times=2)
    publish(folder, NAME)
    assert PLOT_NAME in hub.files(NAME)


def test_somebody_else_s_commit_is_not_overwritten(
    hub: LoopbackHub, original: Path, folder: Path, tmp_path: Path
) -> None:
    publish(folder, NAME)
    other = decomposed(original, tmp_path / "other", rank=8)
    hub.fail("/commit/", None, action=lambda: hub.move(NAME))
    before = hub.files(NAME)
    with pytest.raises(MovedError, match="somebody else changed"):
        publish(other, NAME)
    assert {name: data for name, data in hub.files(NAME).items() if name != "moved.txt"} == before
    publish(other, NAME)
    assert hub.files(NAME)["model.safetensors.index.json"]
    assert "moved.txt" in hub.files(NAME)


def test_pull_request_leaves_the_branch(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.create(NAME)
    before = hub.files(NAME)
    published = publish(folder, NAME, create_pr=True)
    assert published.pull_request == f"{hub.endpoint}/{NAME}/discussions/1"
    assert hub.files(NAME) == before
    assert verify(download(NAME, tmp_path / "back", "refs/pr/1")).is_sound


def test_branch_of_its_own(hub: LoopbackHub, original: Path, folder: Path, tmp_path: Path) -> None:
    publish(folder, NAME)
    before = hub.files(NAME)
    publish(decomposed(original, tmp_path / "other", rank=8), NAME, revision="rank-8")
    assert hub.files(NAME) == before
    back = download(NAME, tmp_path / "back", "rank-8")
    assert verify(back).is_sound
    assert f'"{NAME}", revision="rank-8"' in (back / "README.md").read_text()
    with pytest.raises(PlanError, match="pull request"):
        publish(folder, NAME, revision="rank-8", create_pr=True)


def test_initial_adapter_alone_restores_the_same_bytes(
    hub: LoopbackHub, original: Path, folder: Path, tmp_path: Path
) -> None:
    published = publish(folder, NAME, adapter_only=True)
    assert set(hub.files(NAME)) == {".gitattributes", "README.md", MANIFEST, ADAPTER, ADAPTER_CONFIG}
    assert published.nbytes < sum(map(len, files_of(folder).values())) / 3
    restore(original, download(NAME, tmp_path / "back"), tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(folder)
    assert publish(folder, NAME, adapter_only=True).is_unchanged


def test_full_release_restores_its_own_bytes(hub: LoopbackHub, original: Path, folder: Path, tmp_path: Path) -> None:
    publish(folder, NAME)
    back = download(NAME, tmp_path / "back")
    (back / ".gitattributes").unlink()
    restore(original, back, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(back)


def test_converted_and_merged(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(folder, tmp_path / "trained")
    convert(adapter, folder, tmp_path / "lora")
    merge(folder, adapter, tmp_path / "merged")
    for kind, record in (("lora", "pissa_conversion.json"), ("merged", "pissa_merge.json")):
        published = publish(tmp_path / kind, f"user/{kind}")
        assert record in published.uploaded
        back = download(f"user/{kind}", tmp_path / f"{kind}-back")
        (back / ".gitattributes").unlink()
        assert publish(back, f"user/{kind}").is_unchanged
        weights = [name for name in files_of(back) if name.endswith(".safetensors")]
        assert weights
        assert all(files_of(back)[name] == files_of(tmp_path / kind)[name] for name in weights)
        card = (back / "README.md").read_text()
        assert f'"user/{kind}"' in card
        assert f'base_model: "{BASE}"' in card
    assert json_of(hub, "user/lora", "adapter_config.json")["base_model_name_or_path"] == BASE


def test_dry_run_changes_nothing(hub: LoopbackHub, folder: Path) -> None:
    planned = publish(folder, NAME, dry_run=True)
    assert not hub.exists(NAME)
    assert not stored(hub)
    assert publish(folder, NAME).uploaded == planned.uploaded


def damage(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")


REFUSED = {
    "damaged": (damage, VerificationError, "not sound: model-"),
    "foreign file": (lambda folder: (folder / "secret.txt").write_text("x"), VerificationError, "secret.txt is not in"),
    "missing file": (lambda folder: (folder / "config.json").unlink(), VerificationError, "config.json"),
    "unfinished": (
        lambda folder: [(folder / MANIFEST).unlink(), (folder / ".pissa").mkdir()],
        OutputError,
        "is unfinished",
    ),
    "another's": (lambda folder: (folder / MANIFEST).unlink(), OutputError, "has no pissa_manifest.json"),
    "no folder": (shutil.rmtree, OutputError, "is not a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsound_folder_is_not_published(hub: LoopbackHub, folder: Path, case: str) -> None:
    change, kind, fact = REFUSED[case]
    change(folder)
    with pytest.raises(kind, match=fact):
        publish(folder, NAME)
    assert not hub.exists(NAME)


@pytest.mark.parametrize("kind", ["lora", "merged"])
@pytest.mark.parametrize("change", ["damaged", "foreign file", "outside"])
def test_unsound_result_is_not_published(
    hub: LoopbackHub, folder: Path, tmp_path: Path, kind: str, change: str
) -> None:
    adapter, result = trained_adapter(folder, tmp_path / "trained"), tmp_path / kind
    if kind == "lora":
        convert(adapter, folder, result)
    else:
        merge(folder, adapter, result)
    if change == "damaged":
        damage(result)
    elif change == "foreign file":
        (result / "notes.txt").write_text("x")
    else:
        record = next(result.glob("pissa_*.json"))
        record.write_text(record.read_text().replace('"README.md": {', '"../README.md": {'))
        seal_again(record)
    with pytest.raises(PissaHubError, match=r"has other content than|is not in|points out of the folder"):
        publish(result, NAME)
    assert not hub.exists(NAME)


@pytest.mark.parametrize(
    ("token", "repo_id", "fact"),
    [
        (None, NAME, "there is no Hub token"),
        (LoopbackHub.read_token, NAME, "only read|no right to write"),
        ("hf_expired", NAME, "does not accept the token"),
        (LoopbackHub.token, "stranger/model", "no right to write to stranger/model"),
        (LoopbackHub.token, "user/a b", "no name that the Hub allows"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    tiny_checkpoint: Factory, tmp_path: Path, token: str | None, repo_id: str, fact: str
) -> None:
    with logged_in(tmp_path / "hub", token=token):
        folder = decomposed(tiny_checkpoint(), tmp_path / "decomposed")
        with pytest.raises(HubError, match=fact) as caught:
            publish(folder, repo_id)
        assert "\n" not in str(caught.value)
        assert token is None or token not in str(caught.value)


def test_no_connection_is_one_line(
    hub: LoopbackHub, folder: Path, no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stop()
    with pytest.raises(HubError, match="cannot be reached"):
        publish(folder, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        publish(folder, NAME)


def test_something_else_is_not_overwritten(hub: LoopbackHub, folder: Path) -> None:
    hub.commit(NAME, {"model.gguf": b"GGUF", "README.md": b"mine"})
    before = hub.files(NAME)
    with pytest.raises(HubError, match=r"holds something else, such as model\.gguf"):
        publish(folder, NAME)
    hub.commit("user/ignoring", {".gitignore": b"*.safetensors"})
    with pytest.raises(HubError, match=r"\.gitignore"):
        publish(folder, "user/ignoring")
    hub.commit("stranger/hidden", {}, private=True)
    with pytest.raises(HubError, match="stranger/hidden"):
        publish(folder, "stranger/hidden")
    assert hub.files(NAME) == before


def is_private(hub: LoopbackHub, repo_id: str) -> bool:
    return bool(hub.repositories.load("model", repo_id).private)


def test_gated_base_makes_the_release_private(hub: LoopbackHub, folder: Path) -> None:
    hub.gate(BASE)
    published = publish(folder, NAME)
    assert published.private
    assert is_private(hub, NAME)
    assert any(f"{BASE} is gated" in note for note in published.notes)
    publish(folder, "user/open", private=False)
    assert not is_private(hub, "user/open")
    hub.create("user/public")
    with pytest.raises(HubError, match=f"user/public is public, and {BASE} is gated"):
        publish(folder, "user/public")
    assert set(hub.files("user/public")) == {".gitattributes"}


def test_open_base_leaves_it_to_the_account(hub: LoopbackHub, folder: Path) -> None:
    published = publish(folder, NAME)
    assert not is_private(hub, NAME)
    assert published.notes == ()
    assert publish(folder, "user/private", private=True).private
    assert is_private(hub, "user/private")
    assert publish(folder, "user/private").is_unchanged
    with pytest.raises(HubError, match="is public already"):
        publish(folder, NAME, private=True)


@pytest.mark.parametrize("licence", ["llama3.1", "gemma"])
def test_licence_that_has_to_be_accepted_makes_it_private(
    hub: LoopbackHub, source: Path, tmp_path: Path, licence: str
) -> None:
    (source / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    publish(decomposed(source, tmp_path / "out"), "user/Llama-x")
    assert is_private(hub, "user/Llama-x")


def test_llama_s_name(hub: LoopbackHub, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    folder = decomposed(source, tmp_path / "out")
    with pytest.raises(HubError, match='begins with "Llama"'):
        publish(folder, NAME, private=False)
    assert not hub.exists(NAME)
    assert any('begins with "Llama"' in note for note in publish(folder, NAME).notes)
    publish(folder, "user/Llama-3.1-pissa", private=False)
    assert "**Built with Llama**" in hub.files("user/Llama-3.1-pissa")["README.md"].decode()


def test_command(
    hub: LoopbackHub,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    no_waiting: None,
) -> None:
    hub.gate(BASE)
    hub.fail("/upload/", 503, times=2)
    planned = run_cli(capfd, "publish", folder, "model-pissa", "--dry-run")
    ran = run_cli(capfd, "publish", folder, "model-pissa")
    again = run_cli(capfd, "publish", folder, NAME, "--format", "json")
    assert (planned.code, ran.code, again.code) == (0, 0, 0), ran
    assert f"would go to {hub.endpoint}/{NAME}" in planned.out
    assert ran.out.rstrip().endswith(f"{hub.endpoint}/{NAME} at commit {hub.commits(NAME)[0].sha}")
    assert "note: user/model-pissa will be private, for org/model is gated" in ran.err
    assert '"commit": null' in again.out
    (folder / "config.json").unlink()
    assert "config.json" in run_cli(capfd, "publish", folder, NAME).error
    assert "503" in caplog.text, "the client's own warning"
    said = caplog.text + planned.out + planned.err + ran.out + ran.err + again.out + again.err
    assert hub.token not in said
    assert "Signature" not in said
    assert "Upload" not in ran.err, "a bar where there is no terminal"
    assert all(hub.token.encode() not in data for data in hub.files(NAME).values())


def test_card_takes_over_what_the_base_s_card_says(hub: LoopbackHub, folder: Path) -> None:
    publish(folder, NAME)
    text = hub.files(NAME)["README.md"].decode()
    for line in CARD.splitlines()[1:4]:
        key, _, value = line.partition(": ")
        assert f"{key}: " in text
        assert value.strip("[]'").split(",")[0] in text
