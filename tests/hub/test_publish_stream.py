"""A release that is uploaded shard by shard while it is made: the same one, in one commit, whatever is killed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import OutputError, VerificationError
from pissa_hub.hub import publish_remote
from pissa_hub.hub.card_data import source_metadata
from pissa_hub.hub.publish import publish
from pissa_hub.hub.publish_errors import MovedError
from pissa_hub.hub.publish_release import Base
from pissa_hub.hub.publish_stream import Publication
from pissa_hub.manifest import load_manifest

from ..conftest import SHARDED, Factory
from ..helpers import ROOT
from ..loopback import LoopbackHub
from ..loopback.server import Storage
from .publishing import BASE, CARD, CLIENT_S_OWN_WARNINGS, decomposed, logged_in, put_base, stored

pytestmark = CLIENT_S_OWN_WARNINGS

NAME = "user/streamed"
DIGEST = hashlib.sha256(b"plan").hexdigest()
WAITING = f"pissa-upload-{DIGEST[:12]}"


def publication(folder: Path, **options: bool) -> Publication:
    source = load_manifest(folder).source
    base = Base(BASE, source.revision, source.license)
    return Publication(
        NAME, DIGEST, base=base, metadata=source_metadata(CARD), auto_class="AutoModelForCausalLM", **options
    )


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def send(waiting: Publication, shard: Path) -> None:
    waiting.add(shard.name, shard, FileDigest(*sha256_file(shard)))
    assert not shard.exists()


@pytest.mark.parametrize("storage", ["basic", "multipart", "xet"])
def test_streamed_release_is_the_published_one(tiny_checkpoint: Factory, tmp_path: Path, storage: Storage) -> None:
    with logged_in(tmp_path / "hub", storage) as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        waiting = publication(folder)
        created = hub.files(NAME)
        for shard in shards_of(folder):
            send(waiting, shard)
            assert hub.files(NAME) == created
        published = waiting.commit(folder)
        assert published.commit == hub.commits(NAME)[0].sha
        assert len(hub.commits(NAME)) == 2
        assert not hub.repositories.load("model", NAME).ref(WAITING)

        again = decomposed(hub.folder / "cache/models--org--model/snapshots" / base_commit(hub), tmp_path / "again")
        assert publish(again, NAME).is_unchanged


def base_commit(hub: LoopbackHub) -> str:
    return hub.commits(BASE)[0].sha


STREAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.hub.test_publish_stream import publication, send, shards_of
folder = Path(sys.argv[2])
waiting = publication(folder)
for shard in shards_of(folder):
    send(waiting, shard)
waiting.commit(folder)
"""


@pytest.mark.parametrize("stage", ["third shard", "last commit"])
def test_killed_run_carries_on_without_the_files_that_are_gone(
    tiny_checkpoint: Factory, tmp_path: Path, stage: str
) -> None:
    with logged_in(tmp_path / "hub") as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        count = len(shards_of(folder))
        done = 2 if stage == "third shard" else count
        running: list[subprocess.Popen[bytes]] = []
        hub.fail("/commit/", None, times=done)
        hub.fail("/commit/", 503, action=lambda: running[0].kill(), retry_after=None)
        arguments = [sys.executable, "-c", STREAM, str(ROOT), str(folder)]
        running.append(subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE))
        _, errors = running[0].communicate(timeout=100)
        assert running[0].returncode == -9, errors
        assert set(hub.files(NAME)) == {".gitattributes"}
        left = shards_of(folder)
        assert len(left) == count - done
        waiting = publication(folder)
        digests = load_manifest(folder).files
        assert dict(waiting.held) == {name: digests[name] for name in sorted(waiting.held)}
        assert len(waiting.held) == done
        for shard in left:
            send(waiting, shard)
        waiting.commit(folder)
        assert len(set(stored(hub))) == len(stored(hub))
        again = decomposed(hub.folder / "cache/models--org--model/snapshots" / base_commit(hub), tmp_path / "again")
        assert publish(again, NAME).is_unchanged


def test_moved_branch_and_pull_request(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    with logged_in(tmp_path / "hub") as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        publish(decomposed(tiny_checkpoint(), tmp_path / "first"), NAME)
        before = hub.files(NAME)
        waiting = publication(folder, create_pr=True)
        for shard in shards_of(folder):
            send(waiting, shard)
        hub.fail("/commit/main", None, action=lambda: hub.move(NAME))
        with pytest.raises(MovedError):
            waiting.commit(folder)
        published = waiting.commit(folder)
        assert str(published.pull_request).endswith("/discussions/1")
        files = hub.files(NAME)
        files.pop("moved.txt")
        assert files == before
        assert "model.safetensors.index.json" in hub.files(NAME, "refs/pr/1")
        assert "model.safetensors" not in hub.files(NAME, "refs/pr/1")


def test_file_that_is_nowhere_stops_the_commit(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    with logged_in(tmp_path / "hub") as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        waiting = publication(folder)
        first, *others = shards_of(folder)
        for shard in others:
            send(waiting, shard)
        first.unlink()
        with pytest.raises(VerificationError, match=f"{first.name} is neither in"):
            waiting.commit(folder)
        assert set(hub.files(NAME)) == {".gitattributes"}


@pytest.mark.parametrize("read_whole", [10_000_000, 1000])
def test_file_that_changed_is_not_taken(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_whole: int
) -> None:
    monkeypatch.setattr(publish_remote, "_SMALL", read_whole)
    with logged_in(tmp_path / "hub") as hub:
        folder = decomposed(put_base(hub, tiny_checkpoint(shard_size=SHARDED)), tmp_path / "decomposed")
        waiting = publication(folder)
        shard = shards_of(folder)[0]
        digest = FileDigest(*sha256_file(shard))
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
        with pytest.raises(OutputError, match="changed while"):
            waiting.add(shard.name, shard, digest)
        assert not waiting.held
