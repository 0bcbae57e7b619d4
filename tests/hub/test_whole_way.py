"""A model on the Hub becomes a release there, is trained, converted, merged and restored, by ids alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ..conftest import SHARDED, Factory
from ..helpers import ADAPTER_CONFIG, MANIFEST, ROOT, deviation, files_of, manifest_of
from ..loopback import LoopbackHub
from .pulling import Client
from .whole_way import ADAPTER_ONLY, LORA, MODEL, PISSA

RELEASES = (PISSA, LORA, ADAPTER_ONLY)
UPLOADS = {"basic": r"/upload/\w+", "multipart": r"/upload/\w+/\d+", "xet": r".*/xet-write-token/main"}


@dataclass(frozen=True)
class Way:
    """What the program left: on the hub, in its folder and its caches, in its outputs."""

    hub: LoopbackHub
    folder: Path
    home: Path
    said: str
    outputs: dict[str, Tensor]


@pytest.fixture(
    scope="module",
    params=[pytest.param(way, marks=[pytest.mark.slow] if way == "multipart" else []) for way in UPLOADS],
)
def way(
    request: pytest.FixtureRequest, tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Way]:
    source, root = tiny_checkpoint(shard_size=SHARDED), tmp_path_factory.mktemp("way")
    folder, home = root / "work", root / "home"
    folder.mkdir()
    with LoopbackHub(root / "hub", request.param) as hub:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.hub.whole_way", str(source), str(folder)],
            cwd=ROOT,
            env=Client(hub, home).environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        said = ran.stdout + ran.stderr
        assert ran.returncode == 0, said
        yield Way(hub, folder, home, said, torch.load(folder / "outputs.pt"))


def test_outputs_are_equal_at_every_step(way: Way) -> None:
    original, trained = way.outputs["original"], way.outputs["residual + trained"]
    for step in ("residual + initial", "loaded"):
        assert deviation(way.outputs[step], original) < 1e-5, step
    for step in ("original + LoRA", "merged"):
        assert deviation(way.outputs[step], trained) < 1e-5, step
    assert deviation(trained, original) > 1e-2


def test_large_files_went_the_way_they_should(way: Way) -> None:
    ways = {
        storage
        for storage, path in UPLOADS.items()
        if any(re.fullmatch(path, request.path) for request in way.hub.requests)
    }
    assert ways == {way.hub.storage}


def test_verified_on_both_sides(way: Way) -> None:
    assert way.said.count("\nsound\n") == 2


def test_bytes_of_the_release(way: Way) -> None:
    """All but what names its own place is what decompose wrote, and one commit brought it."""
    written, published = files_of(way.folder / "pissa"), way.hub.files(PISSA)
    assert {name for name in written if published[name] != written[name]} == {"README.md", ADAPTER_CONFIG, MANIFEST}
    assert [len(way.hub.commits(name)) for name in RELEASES] == [2, 2, 2]


def test_release_names_its_source(way: Way) -> None:
    commit = way.hub.commits(MODEL)[0].sha
    record = manifest_of(way.folder / "pissa")["source"]
    assert (record["repo_id"], record["revision"]) == (MODEL, commit)
    for name in RELEASES:
        card = way.hub.files(name)["README.md"].decode()
        assert f'base_model: "{MODEL}"' in card
        assert f"at commit `{commit}`" in card
    for name, config, base in ((PISSA, ADAPTER_CONFIG, PISSA), (LORA, "adapter_config.json", MODEL)):
        assert json.loads(way.hub.files(name)[config])["base_model_name_or_path"] == base


def test_restored_from_the_adapter_alone(way: Way) -> None:
    assert files_of(way.folder / "restored") == files_of(way.folder / "pissa")
    assert not [name for name in way.hub.files(ADAPTER_ONLY) if name.startswith("model")]


def test_no_secret_is_left_anywhere(way: Way) -> None:
    """Not on the screen, on either disk or on the Hub; and other origins are not sent the token."""
    secrets = (way.hub.token.encode(), b"Signature=")
    published = {f"{repo_id}/{name}": data for repo_id in RELEASES for name, data in way.hub.files(repo_id).items()}
    for place, data in {**files_of(way.folder), **files_of(way.home), **published, "said": way.said.encode()}.items():
        assert not any(secret in data for secret in secrets), place
    elsewhere = [request for request in way.hub.requests if request.origin != "hub"]
    assert elsewhere
    assert not any(request.authorized for request in elsewhere)
    for request in way.hub.requests:
        assert way.hub.token not in f"{request.path} {dict(request.headers)}", request.path
