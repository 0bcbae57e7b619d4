"""Tables, sizes and plots for people; the same as JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pissa_hub import decompose
from pissa_hub.comparison import Check, Findings
from pissa_hub.errors import OutputError
from pissa_hub.manifest import Manifest, load_manifest, weight_record
from pissa_hub.pipeline.decompose import plan_decomposition
from pissa_hub.pipeline.settings import Settings
from pissa_hub.report import (
    findings_text,
    manifest_json,
    manifest_text,
    module_kind,
    plan_json,
    plan_text,
    plot_spectra,
    size,
    table,
)

from .conftest import SHARDED, Factory


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    decompose(tiny_checkpoint(shard_size=SHARDED), folder, rank=4, rank_pattern={r"layers\.1\.mlp\.up_proj": 8})
    return folder


@pytest.fixture
def manifest(output: Path) -> Manifest:
    return load_manifest(output)


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (5e9, "5.0 GB"),
        (2.5e12, "2.50 TB"),
        (2.5e15, "2500.00 TB"),
    ],
)
def test_size(nbytes: float, shown: str) -> None:
    assert size(nbytes) == shown


def test_table_aligns_its_columns() -> None:
    assert table(["name", "n"], [["a", "1"], ["longer", "234"]]) == "name      n\na         1\nlonger  234"
    assert table(["name", "n"], []) == "name  n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("encoder.block.0.layer.1.wi_0", "encoder.block.*.layer.*.wi_0"),
        ("h.3", "h.*"),
        ("fc1", "fc1"),
    ],
)
def test_module_kind(name: str, kind: str) -> None:
    assert module_kind(name) == kind


def test_manifest_text_has_a_line_per_kind(manifest: Manifest) -> None:
    header, *lines = manifest_text(manifest).splitlines()
    assert header.split()[:4] == ["module", "weights", "shape", "rank"]
    assert len(lines) == 7
    line = next(line for line in lines if "up_proj" in line)
    assert line.split()[:4] == ["model.layers.*.mlp.up_proj", "2", "96x64", "4-8"]
    energies = [weight.energy for weight in manifest.weights if "up_proj" in weight.module]
    assert f"{min(energies):.1%}-{max(energies):.1%}" in line


def test_manifest_json_has_the_worst_of_all_weights(manifest: Manifest) -> None:
    table = json.loads(json.dumps(manifest_json(manifest), allow_nan=False))
    assert len(table["weights"]) == 14
    assert "singular_values" not in table["weights"][0]
    worst = max(weight.reconstruction.relative_frobenius for weight in manifest.weights)
    assert table["worst"]["relative_frobenius"] == worst
    assert table["worst"]["energy_loss"] == max(weight.certificate.energy_loss for weight in manifest.weights)


def test_sigma_error_without_a_bound_is_shown_as_such(manifest: Manifest) -> None:
    record: dict[str, Any] = json.loads(manifest.to_bytes())["weights"][0]
    record["certificate"]["sigma_error"] = None
    unbounded = Manifest(
        manifest.tool,
        manifest.source,
        manifest.settings,
        (weight_record(record), *manifest.weights),
        manifest.files,
        manifest.environment,
    )
    assert "inf" in manifest_text(unbounded)
    table = json.loads(json.dumps(manifest_json(unbounded), allow_nan=False))
    assert table["worst"]["sigma_error"] is None


def test_plan_as_text_and_json(tiny_checkpoint: Factory, output: Path) -> None:
    source = tiny_checkpoint(shard_size=SHARDED)
    plan = plan_decomposition(source, Settings(rank=4))
    text = plan_text(plan, 10**9)
    assert "LlamaForCausalLM, loads with AutoModelForCausalLM" in text
    assert "6 shard(s)" in text
    assert "1.0 GB free" in text
    parameters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert f"14 weights, {parameters:,} trainable parameters" in text
    table = json.loads(json.dumps(plan_json(plan, 7)))
    assert table["trainable_parameters"] == parameters
    assert table["free_bytes"] == 7
    assert table["input_bytes"] == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert table["weights"][0].keys() == {"tensor", "module", "shape", "dtype", "rank", "alpha"}


def test_findings_text_shows_what_failed() -> None:
    sound, unsound = Check("files", 3, ()), Check("adapter", 2, ("A is gone", "B too"))
    assert findings_text(Findings((sound,))) == "ok      files: 3\nsound"
    assert findings_text(Findings((sound, unsound))).splitlines() == [
        "ok      files: 3",
        "FAILED  adapter: 2",
        "        A is gone",
        "        B too",
        "NOT sound: do not use this folder",
    ]


def test_plot_is_a_png_whatever_its_name(manifest: Manifest, tmp_path: Path) -> None:
    for name in ("spectra.png", "spectra", "spectra.xyz"):
        plot_spectra(manifest, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (tmp_path / name).stat().st_size > 10_000


def test_plot_of_a_zero_weight(manifest: Manifest, tmp_path: Path) -> None:
    record: dict[str, Any] = json.loads(manifest.to_bytes())["weights"][0]
    record["singular_values"] = [0.0] * record["rank"]
    zero = Manifest(manifest.tool, manifest.source, manifest.settings, (weight_record(record),), {}, {})
    plot_spectra(zero, tmp_path / "zero.png")
    assert (tmp_path / "zero.png").stat().st_size > 1000


def test_plot_that_cannot_be_written(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        plot_spectra(manifest, tmp_path / "no" / "folder.png")
