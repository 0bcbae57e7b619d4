"""A receipt counts only with everything that it vouches for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pissa_hub.checkpoint.files import Folder
from pissa_hub.checkpoint.header import TensorSpec, build_header
from pissa_hub.checkpoint.source import Shard
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.errors import OutputError
from pissa_hub.manifest import CertificateRecord, ReconstructionRecord, WeightRecord
from pissa_hub.pipeline.receipts import Receipt, WorkFolder
from pissa_hub.seal import read_sealed, sealed

NAME = "model-00001-of-00002.safetensors"
WEIGHT = WeightRecord(
    tensor="a.weight",
    module="a",
    shape=(3, 4),
    is_transposed=False,
    source_dtype="F32",
    rank=2,
    alpha=2.0,
    singular_values=(0.1, 1 / 3),
    energy=0.7,
    certificate=CertificateRecord("dense", 1e-13, None, 0.0),
    reconstruction=ReconstructionRecord(1e-9, 1.1e-8),
)


def written(path: Path, data: bytes) -> FileDigest:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path / "out", "digest")
    folder.create({"rank": 2})
    return folder


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return Shard(NAME, tmp_path / "source" / NAME, build_header([TensorSpec("a.weight", "F32", (3, 4))], {}))


@pytest.fixture
def receipt(work: WorkFolder, shard: Shard, tmp_path: Path) -> Receipt:
    """One that was written, with its files."""
    made = Receipt(
        NAME,
        written(shard.path, b"source"),
        written(tmp_path / "out" / NAME, b"output"),
        written(work.adapter_part(NAME), b"adapter"),
        (WEIGHT,),
        {"torch": "2.13.0", "threads": 2},
    )
    work.write(made)
    return made


def test_comes_back_as_it_was(work: WorkFolder, shard: Shard, receipt: Receipt) -> None:
    assert work.receipt(shard.name, Folder(shard.path.parent)) == receipt


def test_shard_without_targets_has_no_adapter(work: WorkFolder, shard: Shard, receipt: Receipt) -> None:
    bare = replace(receipt, adapter=None, weights=())
    work.adapter_part(NAME).unlink()
    assert work.receipt(shard.name, Folder(shard.path.parent)) is None
    work.write(bare)
    assert work.receipt(shard.name, Folder(shard.path.parent)) == bare


@pytest.mark.parametrize("which", ["source", "output", "adapter"])
@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_is_void_without_its_files(
    work: WorkFolder, shard: Shard, receipt: Receipt, tmp_path: Path, which: str, damage: str
) -> None:
    path = {"source": shard.path, "output": tmp_path / "out" / NAME, "adapter": work.adapter_part(NAME)}[which]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"x" if damage == "other" else b""))
    assert work.receipt(shard.name, Folder(shard.path.parent)) is None


def test_output_may_be_elsewhere(work: WorkFolder, shard: Shard, receipt: Receipt, tmp_path: Path) -> None:
    (tmp_path / "out" / NAME).unlink()
    source = Folder(shard.path.parent)
    assert work.receipt(NAME, source, {NAME: receipt.output}) == receipt
    assert work.receipt(NAME, source, {NAME: replace(receipt.output, sha256="0" * 64)}) is None
    assert work.receipt(NAME, source, {"other": receipt.output}) is None
    work.adapter_part(NAME).unlink()
    assert work.receipt(NAME, source, {NAME: receipt.output}) is None


def test_is_void_for_another_plan_or_shard(work: WorkFolder, shard: Shard, receipt: Receipt, tmp_path: Path) -> None:
    assert WorkFolder(tmp_path / "out", "another").receipt(shard.name, Folder(shard.path.parent)) is None
    other = replace(shard, name="model-00002-of-00002.safetensors")
    assert work.receipt(other.name, Folder(other.path.parent)) is None
    (path,) = (tmp_path / "out" / ".pissa").glob("*.receipt.json")
    path.rename(path.with_name(f"{other.name}.receipt.json"))
    assert work.receipt(other.name, Folder(other.path.parent)) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"plan": "digest", "shard": "model-00001-of-00002.safetensors"}']
)
def test_torn_receipt_is_none(work: WorkFolder, shard: Shard, receipt: Receipt, tmp_path: Path, text: str) -> None:
    (path,) = (tmp_path / "out" / ".pissa").glob("*.receipt.json")
    path.write_text(text)
    assert work.receipt(shard.name, Folder(shard.path.parent)) is None


def test_receipt_of_other_fields_is_none(work: WorkFolder, shard: Shard, receipt: Receipt, tmp_path: Path) -> None:
    (path,) = (tmp_path / "out" / ".pissa").glob("*.receipt.json")
    table = read_sealed(path)
    del table["sha256"]
    for spoiled in (
        {**table, "source": {}},
        {**table, "environment": None},
        {**table, "adapter": {"size": 1}},
        {**table, "weights": [{}]},
        {**table, "weights": [{**table["weights"][0], "more": 1}]},
        {**table, "weights": [{**table["weights"][0], "singular_values": [1.0]}]},
        {**table, "weights": [{**table["weights"][0], "shape": []}]},
        {**table, "weights": [{**table["weights"][0], "source_dtype": [[[]]]}]},
        {**table, "environment": {"device": [[[]]]}},
        {**table, "weights": 3},
        {**table, "more": json.loads("[" * 40 + "]" * 40)},
    ):
        path.write_bytes(sealed(spoiled))
        assert work.receipt(shard.name, Folder(shard.path.parent)) is None
    path.write_bytes(sealed(table))
    assert work.receipt(shard.name, Folder(shard.path.parent)) == receipt


def test_every_byte_of_a_receipt_counts(work: WorkFolder, shard: Shard, receipt: Receipt, tmp_path: Path) -> None:
    """Its records go to the manifest."""
    (path,) = (tmp_path / "out" / ".pissa").glob("*.receipt.json")
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert work.read(shard.name) is None
    path.write_bytes(data)
    assert work.read(shard.name) == receipt


def test_folder_tells_whose_work_it_holds(work: WorkFolder, tmp_path: Path) -> None:
    assert work.exists
    assert WorkFolder(tmp_path / "out", "another").found_digest() == "digest"
    work.remove()
    assert not work.exists
    assert work.found_digest() is None
    work.remove()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be created"):
        WorkFolder(tmp_path / "file" / "out", "digest").create({})
