"""What a Hub may refuse or spoil: one line with its remedy, never a token, and what is done so far stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..loopback.server import LoopbackHub
from .pulling import REPO, SETTINGS, Client, assert_same_but_source, shard_requests


def plan(repository: str) -> tuple[object, ...]:
    return "decompose", repository, *SETTINGS, "--dry-run"


def test_refusals(client: Client, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.commit("org/empty", {"README.md": b"hello"})
    hub.commit("org/gated", {"config.json": b"{}", "model.safetensors": b"\2\0\0\0\0\0\0\0{}"})
    hub.commit("org/torn", {"config.json": b"{}", "model.safetensors": b"\xff\0\0\0\0\0\0\0{}"})
    hub.commit("org/hostile", {"config.json": b"{}", "a/../../model.safetensors": b"x"})
    hub.gate("org/gated")
    out = tmp_path / "out"
    lines = [
        ran.error
        for ran in client.run_all(
            plan("org/absent"),
            plan(f"{REPO}@v9"),
            plan("org/pickled"),
            plan("org/empty"),
            plan("org/gated"),
            plan("org/torn"),
            plan("org/model--x"),
            plan("org/hostile"),
            ("convert", REPO, "--init", REPO, "-o", out),
            ("verify", REPO),
            ("inspect", REPO),
        )
    ]
    absent, revision, pickled, empty, gated, torn, name, hostile, adapter, unverified, uninspected = lines
    assert "org/absent is neither a folder here nor a model on the Hub" in absent
    assert "hf auth login" in absent
    assert f"{REPO} has no revision v9" in revision
    assert "org/pickled/pytorch_model.bin is a pickle" in pickled
    assert "org/empty holds no safetensors file" in empty
    assert (
        f"org/gated is gated, and this account has no access to it; accept its terms at {hub.endpoint}/org/gated"
        in gated
    )
    assert "org/torn/model.safetensors is truncated" in torn
    assert "org/model--x is neither a folder here nor a name that the Hub allows" in name
    assert "org/hostile names the file 'a/../../model.safetensors'; do not use it" in hostile
    assert "adapter_model.safetensors" in adapter
    assert "no pissa_manifest.json" in unverified
    assert "pissa_manifest.json" in uninspected
    assert not out.exists()


def test_without_a_token(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.gate(REPO)
    hub.commit("org/private", {"config.json": b"{}"}, private=True)
    anonymous = Client(hub, tmp_path / "home", token=None)
    gated, private = anonymous.run_all(plan(REPO), plan("org/private"))
    assert "is gated, and nobody is logged in; accept its terms at" in gated.error
    assert "org/private is neither a folder here nor a model on the Hub that this account may read" in private.error


def test_with_a_wrong_token(hub: LoopbackHub, tmp_path: Path) -> None:
    (ran,) = Client(hub, tmp_path / "home", token="hf_wrongTOKEN").run_all(plan(REPO))
    assert "hf auth login" in ran.error
    assert "hf_wrongTOKEN" not in ran.error


def test_offline(client: Client, tmp_path: Path) -> None:
    (ran,) = client.run_all(plan(REPO), HF_HUB_OFFLINE="1")
    assert f"{REPO} is not on this disk, and HF_HUB_OFFLINE forbids to fetch it" in ran.error
    assert f"hf download {REPO} --local-dir" in ran.error


@pytest.mark.slow
def test_unreachable(client: Client, hub: LoopbackHub) -> None:
    hub.stop()
    (ran,) = client.run_all(plan(REPO))
    line = next(line for line in ran.err.splitlines() if line.startswith("error: "))
    assert f"{hub.endpoint} cannot be reached (ConnectError); check the connection" in line


@pytest.mark.parametrize("keep", ["no", pytest.param("yes", marks=pytest.mark.slow)])
def test_passing_faults_change_nothing(
    client: Client, hub: LoopbackHub, local: Path, tmp_path: Path, keep: str
) -> None:
    hub.fail(r"/revision/main$", 503)
    hub.fail(r"/tree/", 429, retry_after=0)
    hub.fail(r"model-00002.*\.safetensors$", "cut", after_bytes=1000, origin="cdn", times=2)
    hub.fail(r"model-00003.*\.safetensors$", "cut", after_bytes=30_000, origin="cdn", times=2)
    hub.fail(r"model-00004.*\.safetensors$", 503, origin="cdn")
    hub.fail(r"config\.json$", 503)
    (ran,) = client.run_all(("decompose", REPO, "-o", tmp_path / "out", *SETTINGS, "--keep-source", keep))
    assert ran.code == 0, ran
    assert "?" not in "".join(line for line in ran.err.splitlines() if "http" in line)
    assert_same_but_source(tmp_path / "out", local)


@pytest.mark.parametrize("keep", ["no", pytest.param("yes", marks=pytest.mark.slow)])
def test_corrupt_shard_is_found_and_what_is_done_stays(
    client: Client, hub: LoopbackHub, local: Path, tmp_path: Path, keep: str
) -> None:
    """The client looks at sizes only: a changed byte in a tensor shows in the SHA-256 alone."""
    output = tmp_path / "out"
    command = ("decompose", REPO, "-o", output, *SETTINGS, "--keep-source", keep)
    stored = next(entry for path, entry in hub.commits(REPO)[0].tree.items() if path.startswith("model-00003"))
    path = hub.objects.path(stored.sha256)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    (ran,) = client.run_all(command)
    assert f"{REPO}/model-00003" in ran.error
    assert "arrived with another SHA-256 than the Hub has of it" in ran.error
    path.write_bytes(sound)
    if keep == "yes":
        blob = Path(ran.error.split("remove ")[1].split(" and run")[0])
        blob.unlink()
    fetched = len(shard_requests(hub))
    client.run(*command)
    assert not {name[:11] for name in shard_requests(hub)[fetched:]} & {"model-00001", "model-00002"}
    assert_same_but_source(output, local)
