"""What the tests of publishing share: a hub that this process is logged in to, and folders to publish."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file

from pissa_hub import decompose

from ..helpers import ADAPTER
from ..loopback import LoopbackHub
from ..loopback.server import Storage

# What the client warns of in its own calls.
CLIENT_S_OWN_WARNINGS = [pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")]
BASE = "org/model"
CARD = "---\nlicense: apache-2.0\nlanguage: [en, 'no']\npipeline_tag: text-generation\n---\n# Base\n"


@contextmanager
def logged_in(folder: Path, storage: Storage = "basic", token: str | None = LoopbackHub.token) -> Iterator[LoopbackHub]:
    """A running hub that the client in this process talks to."""
    with LoopbackHub(folder, storage) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(token).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_DISABLE_XET", storage != "xet")
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        close_session()
        yield hub
        close_session()


def stop_at(hub: LoopbackHub, path: str, passing: int = 0) -> threading.Thread:
    """Stop the hub at a request, as if it were killed: neither that one nor a later one of its kind has an answer.

    Args:
        hub: heal and start it once the thread has ended.
        path: of such requests, a regex.
        passing: of them, before.
    """
    stopping = threading.Thread(target=hub.stop)

    def stop() -> None:
        hub.fail(path, "cut", times=100)
        stopping.start()

    hub.fail(path, None, times=passing)
    hub.fail(path, None, action=stop)
    return stopping


def put_base(hub: LoopbackHub, source: Path, card: str = CARD, repo_id: str = BASE) -> Path:
    """The base on the hub, and its snapshot in a cache, which is known by its commit."""
    commit = hub.upload_folder(repo_id, source)
    commit = hub.commit(repo_id, {"README.md": card.encode()})
    snapshot = hub.folder / "cache" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit.sha
    shutil.copytree(source, snapshot)
    (snapshot / "README.md").write_text(card)
    return snapshot


def decomposed(source: Path, output: Path, **settings: object) -> Path:
    decompose(source, output, **{"rank": 4, **settings})
    return output


def trained_adapter(initial: Path, folder: Path) -> Path:
    """An adapter as PEFT saves it, every factor of ``initial``'s moved a little."""
    shutil.copytree(initial / "pissa_init", folder)
    tensors = load_file(initial / ADAPTER)
    generator = torch.Generator().manual_seed(0)
    moved = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_file(moved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def stored(hub: LoopbackHub) -> list[str]:
    """SHA-256 of every object that was uploaded whole, as often as it was."""
    method, path = ("POST", "/lfs-complete/") if hub.storage == "multipart" else ("PUT", "/upload/")
    done = (call for call in hub.requests if call.method == method and call.status == 200)
    return [call.path.rpartition("/")[2] for call in done if call.path.startswith(path)]


def json_of(hub: LoopbackHub, repo_id: str, name: str) -> dict[str, object]:
    table: dict[str, object] = json.loads(hub.files(repo_id)[name])
    return table
