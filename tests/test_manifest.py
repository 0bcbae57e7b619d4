"""The manifest: complete, of the published schema, and free of anything that is not the same the next time."""

from __future__ import annotations

import copy
import hashlib
import platform
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import pissa_hub
from pissa_hub import decompose
from pissa_hub.errors import ManifestError
from pissa_hub.manifest import load_manifest, manifest_schema
from pissa_hub.schema import violations

from .conftest import SHARDED, Factory
from .helpers import MANIFEST, files_of, manifest_of, seal_again, tensors_of

Table = dict[str, Any]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source in the Hub's cache, and its decomposition."""
    folder = tmp_path_factory.mktemp("manifest")
    source = folder / "models--some-org--some--model" / "snapshots" / COMMIT
    shutil.copytree(tiny_checkpoint(dtype=torch.bfloat16, shard_size=SHARDED), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    decompose(source, folder / "out", rank=4, alpha=8, rank_pattern={"k_proj": 2}, exclude="o_proj")
    return source, folder / "out"


@pytest.fixture
def table(pair: tuple[Path, Path]) -> Table:
    return manifest_of(pair[1])


def test_says_where_the_weights_came_from(pair: tuple[Path, Path], table: Table) -> None:
    source = table["source"]
    assert source["repo_id"] == "some-org/some--model" or source["repo_id"] == "some-org/some/model"
    assert source["revision"] == COMMIT
    assert source["license"] == "apache-2.0"
    for path in pair[0].glob("*.safetensors"):
        data = path.read_bytes()
        assert source["files"].pop(path.name) == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert source["files"] == {}


def test_vouches_for_every_other_file(pair: tuple[Path, Path], table: Table) -> None:
    written = files_of(pair[1])
    del written[MANIFEST]
    assert table["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in written.items()
    }


def test_says_what_was_asked_for_and_with_what(table: Table) -> None:
    assert table["format"] == "pissa-hub-manifest"
    assert table["version"] == 1
    assert table["tool"] == {"name": "pissa_hub", "version": pissa_hub.__version__}
    assert table["settings"] == {
        "method": "pissa",
        "rank": 4,
        "alpha": 8,
        "use_rslora": False,
        "targets": "all-linear",
        "exclude": "o_proj",
        "rank_pattern": {"k_proj": 2},
        "adapter_dtype": "float32",
        "residual_dtype": "source",
        "svd": "krylov",
        "niter": None,
        "tolerance": 1e-5,
        "iterations": None,
        "seed": 0,
    }
    environment = table["environment"]
    assert environment["python"] == platform.python_version()
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()


def test_has_a_record_for_every_weight(pair: tuple[Path, Path], table: Table) -> None:
    weights = tensors_of(pair[0])
    assert len(table["weights"]) == 12
    for record in table["weights"]:
        assert tuple(record["shape"]) == tuple(weights[record["tensor"]].shape)
        assert record["module"] == record["tensor"].removesuffix(".weight")
        assert record["rank"] == len(record["singular_values"]) == (2 if "k_proj" in record["module"] else 4)
        assert record["singular_values"] == sorted(record["singular_values"], reverse=True)
        assert record["alpha"] == 8
        assert record["source_dtype"] == "BF16"
        assert 0 < record["energy"] < 1
        assert record["certificate"]["kind"] == "dense"


def test_fits_the_schema(pair: tuple[Path, Path], table: Table, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(manifest_schema())
    jsonschema.validate(table, manifest_schema())
    decompose(
        tiny_checkpoint("GPT2Model"), tmp_path / "out", rank=2, svd="randomized", niter=0, adapter_dtype="bfloat16"
    )
    other = manifest_of(tmp_path / "out")
    assert any(record["is_transposed"] for record in other["weights"])
    jsonschema.validate(other, manifest_schema())


def test_reads_back_to_the_same_bytes(pair: tuple[Path, Path]) -> None:
    assert load_manifest(pair[1]).to_bytes() == (pair[1] / MANIFEST).read_bytes()


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


def at(table: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        table = table[key]
    return table


def test_schema_wants_every_field_and_no_other(table: Table) -> None:
    """But for the environment and the keys of maps, which are open."""
    table["weights"] = table["weights"][:1]
    validator = jsonschema.Draft202012Validator(manifest_schema())
    for path in nodes(table):
        value = at(table, path)
        if not isinstance(value, dict) or path in (("files",), ("source", "files"), ("settings", "rank_pattern")):
            continue
        if path != ("environment",):
            assert not validator.is_valid(changed(table, path, {**value, "additional": 1})), path
        for name in value:
            without = {key: item for key, item in value.items() if key != name}
            assert not validator.is_valid(changed(table, path, without)), (path, name)


def changed(table: Table, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    table = copy.deepcopy(table)
    at(table, path[:-1])[path[-1]] = value
    return table


# But for 1.0, which is an integer to jsonschema.
_STRANGE = [None, True, -1, 0, 1, 2, 0.5, 1.5, "", "x", "f" * 64, "/x", [], [1], [1, 2], {}, {"a": 1}]


def test_our_reading_of_the_schema_is_jsonschema_s(table: Table) -> None:
    table["weights"] = table["weights"][:1]
    schema = manifest_schema()
    validator = jsonschema.Draft202012Validator(schema)
    dice = random.Random(0)
    verdicts = {True: 0, False: 0}
    for path in nodes(table):
        for value in dice.sample(_STRANGE, 8):
            strange = changed(table, path, value)
            found = list(violations(strange, schema))
            assert (not found) == validator.is_valid(strange), (path, value, found)
            assert all("\n" not in clause for clause in found)
            verdicts[not found] += 1
    assert min(verdicts.values()) > 20


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_no_numbers_are_refused(pair: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    original = (pair[1] / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(re.sub(r'"energy": [\d.e-]+', f'"energy": {text}', original, count=1))
    seal_again(tmp_path / MANIFEST)
    with pytest.raises(ManifestError, match=r"is not JSON|too large"):
        load_manifest(tmp_path)


def test_no_path_and_no_time_in_any_file(pair: tuple[Path, Path]) -> None:
    source, output = pair
    for name, data in files_of(output).items():
        if name.endswith(".safetensors"):
            data = data[8 : 8 + int.from_bytes(data[:8], "little")]
        text = data.decode()
        for local in (str(source), str(output), str(output.parent), str(Path.home()) + "/", str(Path.cwd())):
            assert local not in text, name
        if name not in ("config.json", "generation_config.json"):
            assert not re.search(r"\b20\d\d-\d\d-\d\d|\b1[6-9]\d{8}\b|seconds|duration|\btime\b", text), name
