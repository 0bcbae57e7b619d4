"""The loopback Hub against the client it stands in for: the real huggingface_hub, transformers and PEFT over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from . import LoopbackHub
from .fixtures import loopback_hub as loopback_hub
from .server import Storage

# The client's own uploads use what its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Start = Callable[..., LoopbackHub]
STORAGES: list[Storage] = ["basic", "multipart", "xet"]
REPO = "org/model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a shard of several parts, and a file in a folder."""
    made = tmp_path / "checkpoint"
    (made / "pissa_init").mkdir(parents=True)
    tensor = torch.randn(100, 500, generator=torch.Generator().manual_seed(0))
    save_file({"weight": tensor}, made / "model.safetensors")
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "README.md").write_text(
        "---\nlicense: apache-2.0\ntags: [pissa]\nlibrary_name: transformers\n---\nA model\n"
    )
    (made / "pissa_init" / "adapter_config.json").write_text("{}")
    return made


@pytest.fixture
def hub(loopback_hub: Start) -> LoopbackHub:
    return loopback_hub("basic")


def client(hub: LoopbackHub, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token if token is None else token)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


@pytest.mark.parametrize("storage", STORAGES)
def test_folder_goes_up_and_comes_down_unchanged(
    loopback_hub: Start, storage: Storage, folder: Path, tmp_path: Path
) -> None:
    hub = loopback_hub(storage)
    api = client(hub)
    assert api.create_repo(REPO).repo_id == REPO
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert without_attributes(hub.files(REPO)) == contents(folder)
    assert hub.commits(REPO)[0].sha == commit.oid == api.model_info(REPO).sha
    api.snapshot_download(REPO, local_dir=tmp_path / "snapshot")
    assert without_attributes(contents(tmp_path / "snapshot")) == contents(folder)
    path = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("storage", STORAGES)
def test_large_files_take_the_way_that_the_storage_asks_for(
    loopback_hub: Start, storage: Storage, folder: Path
) -> None:
    hub = loopback_hub(storage)
    client(hub).create_repo(REPO)
    client(hub).upload_folder(repo_id=REPO, folder_path=folder)
    parts = sum(request.path.startswith("/upload/") for request in hub.requests)
    tokens = sum("xet-write-token" in request.path for request in hub.requests)
    assert (parts, tokens > 0) == {"basic": (1, False), "multipart": (4, False), "xet": (0, True)}[storage]


@pytest.mark.parametrize("storage", STORAGES)
def test_preuploaded_files_appear_in_one_commit(loopback_hub: Start, storage: Storage, tmp_path: Path) -> None:
    hub = loopback_hub(storage)
    api = client(hub)
    api.create_repo(REPO)
    parent = hub.commits(REPO)[0].sha
    operations = []
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode() * 50_000)
        operation = CommitOperationAdd(name, tmp_path / name)
        api.preupload_lfs_files(REPO, [operation])
        (tmp_path / name).unlink()
        operations.append(operation)
    assert list(hub.files(REPO)) == [".gitattributes"]
    card = CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n")
    api.create_commit(REPO, [*operations, card], commit_message="All", parent_commit=parent)
    assert hub.files(REPO)["b.safetensors"] == b"b.safetensors" * 50_000
    assert [commit.title for commit in hub.commits(REPO)] == ["All", "initial commit"]


@pytest.mark.parametrize("storage", STORAGES)
def test_server_side_upload_is_found_by_the_client(
    loopback_hub: Start, storage: Storage, folder: Path, tmp_path: Path
) -> None:
    hub = loopback_hub(storage)
    hub.upload_folder(REPO, folder)
    client(hub, token=False).snapshot_download(REPO, local_dir=tmp_path / "snapshot")
    assert without_attributes(contents(tmp_path / "snapshot")) == contents(folder)
    assert any("xet-read-token" in request.path for request in hub.requests) == (storage == "xet")


@pytest.mark.parametrize("storage", STORAGES)
def test_processes_share_a_hub(loopback_hub: Start, storage: Storage, folder: Path) -> None:
    hub = loopback_hub(storage)
    client(hub).create_repo(REPO)
    client(hub).upload_folder(repo_id=REPO, folder_path=folder)
    script = f"""
from huggingface_hub import HfApi, hf_hub_download
HfApi().upload_file(repo_id={REPO!r}, path_or_fileobj=b"new" * 99_999, path_in_repo="new.safetensors")
print(len(open(hf_hub_download({REPO!r}, "model.safetensors"), "rb").read()))
"""
    assert int(process(hub, script)) == (folder / "model.safetensors").stat().st_size
    assert hub.files(REPO)["new.safetensors"] == b"new" * 99_999


def process(hub: LoopbackHub, script: str) -> str:
    """The stdout of a Python process whose client is set up by the environment alone."""
    environment = {**os.environ, **hub.environment()}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("storage", STORAGES)
def test_token_stays_on_the_hub(loopback_hub: Start, storage: Storage, folder: Path, tmp_path: Path) -> None:
    hub = loopback_hub(storage)
    api = client(hub)
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    api.get_safetensors_metadata(REPO)
    on_cdn = [request for request in hub.requests if request.origin == "cdn"]
    assert on_cdn
    assert not any(request.authorized for request in on_cdn)
    assert all(request.authorized for request in hub.requests if request.path.startswith("/api/models/"))
    assert hub.token not in repr(hub.requests)
    stored = [path.read_bytes() for path in hub.folder.rglob("*") if path.is_file()]
    assert not any(hub.token.encode() in content for content in stored)


def test_cdn_refuses_a_token_and_a_forged_signature(hub: LoopbackHub, folder: Path) -> None:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    hub.upload_folder(REPO, folder)
    path = f"/{REPO}/{hub.commits(REPO)[0].tree['model.safetensors'].sha256}/model.safetensors"
    with urlopen(hub.signed("cdn", path)) as answer:
        assert answer.read() == (folder / "model.safetensors").read_bytes()
    for url, headers in [(hub.signed("cdn", path), {"Authorization": "Bearer x"}), (hub.cdn + path, {})]:
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(url, headers=headers))
        with refused.value:
            assert refused.value.code in (400, 403)


def test_headers_are_read_by_ranges(hub: LoopbackHub, folder: Path) -> None:
    hub.upload_folder(REPO, folder)
    metadata = client(hub).get_safetensors_metadata(REPO)
    assert metadata.files_metadata["model.safetensors"].tensors["weight"].shape == [100, 500]
    assert hub.requests[-1].status == 206
    assert hub.requests[-1].length == 100_001


def test_file_system_reads_ranges(hub: LoopbackHub, folder: Path) -> None:
    hub.upload_folder(REPO, folder)
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token, skip_instance_cache=True)
    assert f"{REPO}/pissa_init" in files.ls(REPO, detail=False)
    with files.open(f"{REPO}/model.safetensors", "rb", block_size=1000) as file:
        file.seek(-5, 2)
        assert file.read() == (folder / "model.safetensors").read_bytes()[-5:]
    assert max(request.length for request in hub.requests if request.origin == "cdn") < 10_000


def test_model_info_tells_files_and_card(hub: LoopbackHub, folder: Path) -> None:
    hub.upload_folder(REPO, folder)
    info = client(hub).model_info(REPO, files_metadata=True)
    shard = next(sibling for sibling in info.siblings if sibling.rfilename == "model.safetensors")
    assert shard.lfs.sha256 == hub.commits(REPO)[0].tree["model.safetensors"].sha256
    assert shard.size == (folder / "model.safetensors").stat().st_size
    assert info.card_data.license == "apache-2.0"
    assert info.tags == ["pissa", "license:apache-2.0"]
    assert (info.private, info.gated, info.library_name) == (False, False, "transformers")


def test_tree_comes_in_pages(hub: LoopbackHub, folder: Path) -> None:
    hub.upload_folder(REPO, folder)
    hub.page_size = 2
    paths = [item.path for item in client(hub).list_repo_tree(REPO, recursive=True)]
    assert paths == sorted([".gitattributes", "pissa_init", *contents(folder)])
    assert sum("/tree/" in request.path for request in hub.requests) == 3
    assert [item.path for item in client(hub).get_paths_info(REPO, ["pissa_init", "absent"])] == ["pissa_init"]


def test_card_is_validated(hub: LoopbackHub) -> None:
    card = ModelCard("---\nlicense: mit\nbase_model_relation: finetune\n---\n")
    card.data.base_model_relation = "child"
    client(hub).create_repo(REPO)
    with pytest.raises(ValueError, match="base_model_relation"):
        client(hub).upload_file(repo_id=REPO, path_or_fileobj=str(card).encode(), path_in_repo="README.md")
    assert "README.md" not in hub.files(REPO)


def test_repository_is_created_once(hub: LoopbackHub) -> None:
    api = client(hub)
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_missing_things_are_told_apart(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.upload_folder(REPO, folder)
    api = client(hub)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="absent")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "absent.json", cache_dir=tmp_path)


def test_branches_tags_and_commits_name_revisions(hub: LoopbackHub, folder: Path) -> None:
    first = hub.upload_folder(REPO, folder).sha
    api = client(hub)
    api.create_branch(REPO, branch="feature/x")
    api.create_tag(REPO, tag="v1")
    hub.commit(REPO, {"config.json": b"{}"}, revision="feature/x")
    assert {ref.name for ref in api.list_repo_refs(REPO).branches} == {"main", "feature/x"}
    assert api.model_info(REPO, revision="v1").sha == api.model_info(REPO, revision=first).sha == first
    assert api.list_repo_commits(REPO, revision="feature/x")[0].title == "Change"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="feature/x")
    api.delete_branch(REPO, branch="feature/x")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")


def test_pull_request_leaves_the_branch_alone(hub: LoopbackHub, folder: Path) -> None:
    before = hub.upload_folder(REPO, folder)
    commit = client(hub).upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="config.json", create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert hub.files(REPO, "refs/pr/1")["config.json"] == b"{}"
    assert hub.commits(REPO)[0] == before


def test_stale_parent_changes_nothing(hub: LoopbackHub, folder: Path) -> None:
    stale = hub.upload_folder(REPO, folder).sha
    moved = hub.move(REPO)
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("config.json")]
    with pytest.raises(HfHubHTTPError, match="412"):
        client(hub).create_commit(REPO, operations, commit_message="Late", parent_commit=stale)
    assert hub.commits(REPO)[0] == moved
    client(hub).create_commit(REPO, operations, commit_message="Again", parent_commit=moved.sha)
    assert "new.txt" in hub.files(REPO)
    assert "config.json" not in hub.files(REPO)


def test_commit_of_a_file_that_was_not_uploaded_changes_nothing(hub: LoopbackHub, folder: Path) -> None:
    hub.upload_folder(REPO, folder)
    before = hub.commits(REPO)
    lost = CommitOperationAdd("lost.safetensors", b"lost")
    lost._is_uploaded, lost._upload_mode = True, "lfs"
    with pytest.raises(HfHubHTTPError, match="was not uploaded"):
        client(hub).create_commit(REPO, [CommitOperationAdd("a.txt", b"a"), lost], commit_message="Half")
    assert hub.commits(REPO) == before


def test_branch_that_moves_during_a_download(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    pinned = hub.upload_folder(REPO, folder).sha
    hub.fail("config.json", None, action=lambda: hub.commit(REPO, {"config.json": b"{}"}))
    path = client(hub).hf_hub_download(REPO, "config.json", revision=pinned, cache_dir=tmp_path)
    assert Path(path).read_bytes() == (folder / "config.json").read_bytes()
    assert hub.files(REPO)["config.json"] == b"{}"
    assert hub.move(REPO, to=pinned).sha == pinned


def test_gated_repository(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.upload_folder(REPO, folder)
    hub.gate(REPO)
    for token in (False, hub.token, hub.stranger_token):
        assert client(hub, token).model_info(REPO).gated == "manual"
        with pytest.raises(GatedRepoError):
            client(hub, token).hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
    hub.gate(REPO, granted=True)
    client(hub, hub.read_token).hf_hub_download(REPO, "config.json", cache_dir=tmp_path)


def test_private_repository_does_not_exist_for_others(hub: LoopbackHub, folder: Path) -> None:
    hub.upload_folder(REPO, folder, private=True)
    assert client(hub, hub.read_token).model_info(REPO).private
    for token in (False, hub.stranger_token):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).model_info(REPO)


def test_who_may_write(hub: LoopbackHub, folder: Path) -> None:
    before = hub.upload_folder(REPO, folder)
    assert client(hub).whoami()["auth"]["accessToken"]["role"] == "write"
    assert client(hub, hub.read_token).whoami()["auth"]["accessToken"]["role"] == "read"
    for token, status in [(hub.read_token, "403"), (hub.stranger_token, "403"), ("hf_wrong", "401")]:
        with pytest.raises(HfHubHTTPError, match=status):
            client(hub, token).upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt")
    assert hub.commits(REPO)[0] == before


@pytest.mark.parametrize("status", [503, 429])
def test_upload_outlasts_a_busy_hub(hub: LoopbackHub, folder: Path, status: int) -> None:
    client(hub).create_repo(REPO)
    hub.fail("/upload/|/preupload/", status, times=2)
    client(hub).upload_folder(repo_id=REPO, folder_path=folder)
    assert without_attributes(hub.files(REPO)) == contents(folder)
    assert sum(request.status == status for request in hub.requests) == 2


def test_download_outlasts_a_cut(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.upload_folder(REPO, folder)
    hub.fail(r"model\.safetensors", "cut", after_bytes=1000)
    path = client(hub).hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [request.origin for request in hub.requests if request.method == "GET"].count("cdn") == 2


def test_upload_outlasts_a_cut(hub: LoopbackHub, folder: Path) -> None:
    client(hub).create_repo(REPO)
    hub.fail("/upload/", "cut", after_bytes=1000)
    client(hub).upload_folder(repo_id=REPO, folder_path=folder)
    assert without_attributes(hub.files(REPO)) == contents(folder)
    assert [request.status for request in hub.requests if request.path.startswith("/upload/")] == [0, 200]


def test_commit_cut_short_changes_nothing(hub: LoopbackHub) -> None:
    client(hub).create_repo(REPO)
    hub.fail("/commit/", "cut", times=9)
    with pytest.raises(Exception, match="disconnected"):
        client(hub).create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="Cut")
    assert len(hub.commits(REPO)) == 1
    hub.heal()
    client(hub).create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="Whole")
    assert len(hub.commits(REPO)) == 2


def test_corrupt_download(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.upload_folder(REPO, folder)
    hub.fail(r"model\.safetensors", "corrupt")
    path = client(hub).hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    right = (folder / "model.safetensors").read_bytes()
    assert Path(path).read_bytes() == bytes([right[0] ^ 0xFF]) + right[1:]


def test_hub_that_is_killed_carries_on(hub: LoopbackHub, folder: Path) -> None:
    commit, endpoint = hub.upload_folder(REPO, folder), hub.endpoint
    hub.stop()
    with pytest.raises(Exception, match="refused"):
        client(hub).model_info(REPO, timeout=1)
    hub.start()
    assert hub.endpoint == endpoint
    assert client(hub).model_info(REPO).sha == commit.sha
    with LoopbackHub(hub.folder) as another:
        assert client(another).model_info(REPO).sha == commit.sha


def test_same_history_has_the_same_shas(loopback_hub: Start, folder: Path) -> None:
    assert loopback_hub().upload_folder(REPO, folder).sha == loopback_hub().upload_folder(REPO, folder).sha


def test_transformers_and_peft_push_and_load(loopback_hub: Start, tiny_checkpoint: Callable[..., Path]) -> None:
    hub = loopback_hub()
    hub.upload_folder("org/base", tiny_checkpoint())
    script = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("org/base")
adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
adapted.push_to_hub("org/adapter")
base = AutoModelForCausalLM.from_pretrained("org/base")
loaded = PeftModel.from_pretrained(base, "org/adapter")
words = torch.arange(8).unsqueeze(0)
print(torch.equal(adapted(words).logits, loaded(words).logits))
"""
    assert process(hub, script).strip().endswith("True")
    assert "adapter_model.safetensors" in hub.files("org/adapter")
    assert not any(request.authorized for request in hub.requests if request.origin == "cdn")
