"""A model of several shards, in a folder and on a loopback Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pissa_hub.pipeline.decompose import decompose

from ..conftest import Factory
from ..loopback.fixtures import loopback_hub as loopback_hub
from ..loopback.server import LoopbackHub
from .pulling import REPO, Client, Hubs


@pytest.fixture
def source(tiny_checkpoint: Factory, tmp_path: Path) -> Path:
    """Twelve shards, a tokenizer and a licence."""
    folder = tiny_checkpoint(shard_size="74KB", num_hidden_layers=6)
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}" * 100_000)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"another format" * 1000)
    return source


@pytest.fixture
def hub(loopback_hub: Hubs, source: Path) -> LoopbackHub:
    hub = loopback_hub()
    hub.upload_folder(REPO, source)
    return hub


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


@pytest.fixture
def local(source: Path, tmp_path: Path) -> Path:
    """What decompose makes of the folder."""
    decompose(source, tmp_path / "local", rank=4)
    return tmp_path / "local"
