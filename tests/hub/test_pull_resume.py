"""A run that was stopped carries on at the commit that it began with, without what it has done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..helpers import files_of
from ..interrupted import receipts_in, wait_until
from ..loopback.server import LoopbackHub
from .pulling import REPO, SETTINGS, Client, assert_same_but_source, shard_requests


def stopped_after(
    client: Client, output: Path, command: tuple[object, ...], count: int, how: signal.Signals
) -> tuple[int, str]:
    """Start a command, stop it once it has so many receipts and waits for the next shard; exit status and stderr."""
    hub, arrived, over = client.hub, Event(), Event()

    def hold() -> None:
        if sum(name.startswith("model-") for name in shard_requests(hub)) == count:
            arrived.set()
            over.wait()

    hub.fail(r"\.safetensors$", None, times=100, action=hold, origin="cdn")
    process = client.start(*command)
    try:
        wait_until(lambda: arrived.is_set() and len(receipts_in(output)) == count, process)
        process.send_signal(how)
        _, err = process.communicate(timeout=120)
    finally:
        over.set()
        hub.heal()
    return process.returncode, err


@pytest.mark.parametrize(
    ("how", "keep"),
    [
        ("SIGKILL", "no"),
        pytest.param("SIGINT", "no", marks=pytest.mark.slow),
        pytest.param("SIGKILL", "yes", marks=pytest.mark.slow),
    ],
)
def test_stopped_run_carries_on_though_the_branch_moved(
    client: Client, hub: LoopbackHub, local: Path, tmp_path: Path, how: str, keep: str
) -> None:
    output = tmp_path / "out"
    command = ("decompose", REPO, "-o", output, *SETTINGS, "--keep-source", keep)
    code, err = stopped_after(client, output, command, 3, signal.Signals[how])
    assert code == (130 if how == "SIGINT" else -9), err
    done, fetched = receipts_in(output), len(shard_requests(hub))
    assert len(done) == 3
    began_with = hub.commits(REPO)[0].sha
    hub.commit(REPO, {"config.json": b"{}", "tokenizer.json": b"other", "new.json": b"{}"})
    client.run(*command)
    assert_same_but_source(output, local)
    assert began_with.encode() in files_of(output)["pissa_manifest.json"]
    assert not done & set(shard_requests(hub)[fetched:])


def test_stopped_restoration_carries_on_though_both_branches_moved(
    client: Client, hub: LoopbackHub, local: Path, tmp_path: Path
) -> None:
    hub.upload_folder("org/pissa", local)
    output = tmp_path / "out"
    command = ("restore", REPO, "--init", "org/pissa", "-o", output, "--keep-source", "no")
    code, err = stopped_after(client, output, command, 3, signal.SIGKILL)
    assert code == -9, err
    done, fetched = receipts_in(output), len(shard_requests(hub))
    hub.commit(REPO, {"config.json": b"{}", "tokenizer.json": b"other"})
    hub.commit("org/pissa", {"pissa_manifest.json": b"{}"})
    client.run(*command)
    assert files_of(output) == files_of(local)
    assert not done & set(shard_requests(hub)[fetched:])


def test_lost_hub_leaves_what_is_done(client: Client, hub: LoopbackHub, local: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("decompose", REPO, "-o", output, *SETTINGS, "--keep-source", "no")
    hub.fail(r"resolve/.*/model-00005.*\.safetensors$", 403, times=20, method="HEAD")
    (ran,) = client.run_all(command)
    assert f"the Hub answers {REPO}/model-00005-of-00012.safetensors with status 403" in ran.error
    assert len(receipts_in(output)) == 4
    hub.heal()
    client.run(*command)
    assert_same_but_source(output, local)


def test_bad_weight_leaves_nothing(loopback_hub: Callable[..., LoopbackHub], source: Path, tmp_path: Path) -> None:
    path = sorted(source.glob("model-*.safetensors"))[4]
    tensors = load_file(path)
    name = next(name for name in tensors if "proj" in name)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, path, {"format": "pt"})
    hub = loopback_hub()
    hub.upload_folder(REPO, source)
    (ran,) = Client(hub, tmp_path / "home").run_all(
        ("decompose", REPO, "-o", tmp_path / "parent" / "out", *SETTINGS, "--keep-source", "no")
    )
    assert name in ran.error
    assert not (tmp_path / "parent").exists()
