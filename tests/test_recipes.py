"""Recipes: each one's plan for its model in full size, what a recipe may not be, and the commands."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pissa_hub.cli import decompose
from pissa_hub.errors import CheckpointError, MatrixError, PlanError
from pissa_hub.licenses import duties
from pissa_hub.pipeline.decompose import plan_decomposition
from pissa_hub.pipeline.plan import Plan
from pissa_hub.pipeline.settings import Settings
from pissa_hub.recipes import MAX_BYTES, Recipe, list_recipes, load_recipe, parse_recipe

from .conftest import Factory
from .helpers import ROOT, manifest_of, run_cli, run_python
from .model.zoo import JUDGES_OWN_WARNINGS
from .skeletons import MODELS, parameters_of, write_skeleton

pytestmark = JUDGES_OWN_WARNINGS

Capture = pytest.CaptureFixture[str]

RECIPES = {recipe.name: recipe for recipe in list_recipes()}
# Their modules and tensors are those of another recipe's model, or of a smaller one.
SLOW = ("deepseek-r1", "qwen3-235b-a22b")

VALID: dict[str, Any] = {
    "model": '"org/name"',
    "license": '"mit"',
    "ranks": "[8, 4]",
    "repository": '"name-pissa-r{rank}"',
    "expected": "{weights = 14, features = 2, size = 3}",
}


def text_of(**keys: str | None) -> bytes:
    """A valid recipe but for the keys given, as TOML; None leaves one out."""
    return "".join(f"{key} = {value}\n" for key, value in {**VALID, **keys}.items() if value is not None).encode()


def plan_of(recipe: Recipe, folder: Path) -> Plan:
    return plan_decomposition(folder, Settings(**recipe.settings))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RECIPES]
)
def test_the_plan_is_the_one_expected(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    tensors = write_skeleton(tmp_path, name)
    assert parameters_of(name) == MODELS[name]["parameters"]
    assert recipe.expected.size == sum(spec.nbytes for spec in tensors.values())
    if recipe.needs == "fp8-blocks":
        with pytest.raises(MatrixError, match=r"F8_E4M3: quantised storage is not supported yet"):
            plan_of(recipe, tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()
        write_skeleton(tmp_path, name, dequantized=True)
    plan = plan_of(recipe, tmp_path)
    assert plan.layout.note is None
    assert len(plan.weights) == recipe.expected.weights
    assert sum(w.target.in_features + w.target.out_features for w in plan.weights) == recipe.expected.features
    adapter = sum(entry.nbytes for entry in plan.adapter.entries)
    assert adapter == recipe.adapter_size(recipe.ranks[0])
    smallest = min(min(weight.target.module.shape) for weight in plan.weights)
    assert max(recipe.ranks) <= smallest
    assert not any(word in weight.name for weight in plan.weights for word in ("experts", "vision", "lm_head", "embed"))


def test_a_pickled_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["deberta-v3-base"]["config"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="is a pickle"):
        plan_of(RECIPES["deberta-v3-base"], tmp_path)


PUBLISHED = {
    "llama-2-7b": {"model.layers.31.mlp.down_proj.weight": ("F16", (4096, 11008))},
    "llama-3.1-405b": {"model.layers.125.self_attn.k_proj.weight": ("BF16", (1024, 16384))},
    "mixtral-8x7b": {
        "model.layers.0.block_sparse_moe.gate.weight": ("BF16", (8, 4096)),
        "model.layers.0.block_sparse_moe.experts.7.w1.weight": ("BF16", (14336, 4096)),
        "model.layers.31.block_sparse_moe.experts.0.w2.weight": ("BF16", (4096, 14336)),
    },
    "qwen3-30b-a3b": {"model.layers.47.mlp.experts.127.up_proj.weight": ("BF16", (768, 2048))},
    "gemma-3-4b": {
        "language_model.model.layers.0.self_attn.q_proj.weight": ("BF16", (2048, 2560)),
        "vision_tower.vision_model.encoder.layers.26.mlp.fc1.weight": ("BF16", (4304, 1152)),
    },
    "phi-4": {"model.layers.0.self_attn.qkv_proj.weight": ("BF16", (7680, 5120))},
    "deepseek-v2-lite": {"model.layers.1.mlp.shared_experts.gate_proj.weight": ("BF16", (2816, 2048))},
    "deepseek-v3": {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (5, 56)),
        "model.layers.3.mlp.experts.255.down_proj.weight": ("F8_E4M3", (7168, 2048)),
        "model.layers.60.mlp.gate.weight": ("BF16", (256, 7168)),
        "model.layers.61.eh_proj.weight": ("BF16", (7168, 14336)),
    },
    "gpt-oss-20b": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", (32, 5760, 90, 16)),
        "model.layers.0.mlp.experts.down_proj_scales": ("U8", (32, 2880, 90)),
    },
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_skeletons_have_the_published_names(recipe: str, tmp_path: Path) -> None:
    tensors = write_skeleton(tmp_path, recipe)
    assert {name: (tensors[name].dtype, tensors[name].shape) for name in PUBLISHED[recipe]} == PUBLISHED[recipe]
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 30 << 20


def test_recipes_are_as_the_command_line_takes_them() -> None:
    names = {param.name for param in decompose.params}
    assert RECIPES.keys() == MODELS.keys()
    for recipe in RECIPES.values():
        assert recipe.settings.keys() <= names
        Settings(**recipe.settings)
        assert duties(recipe.license, recipe.license_name), recipe.name
        assert all(duties(license_id) for license_id in recipe.inherits), recipe.name
        assert recipe.repository_name(16).endswith("-pissa-r16")
    assert list(RECIPES).index("llama-3.1-8b") < list(RECIPES).index("llama-3.1-70b")


def test_names_follow_the_licenses() -> None:
    for recipe in RECIPES.values():
        for license_id in (recipe.license, *recipe.inherits):
            if license_id == "llama3":
                assert recipe.repository.startswith("Llama-3-"), recipe.name
            elif license_id.startswith("llama3."):
                assert recipe.repository.startswith("Llama-"), recipe.name
                assert any("'Built with Llama'" in duty for duty in duties(license_id))
    for license_id in ("llama3", "llama3.1", "llama3.3"):
        with pytest.raises(PlanError, match="starts with Llama"):
            parse_recipe(Path("x.toml"), text_of(license=f'"{license_id}"'))
        with pytest.raises(PlanError, match="starts with Llama"):
            parse_recipe(Path("x.toml"), text_of(inherits=f'["{license_id}"]'))
    assert duties("cc-by-4.0") == duties("other") == duties("other", "own") == ()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "x.toml lacks model, a Hub id org/name; add it"),
        ({"model": '"../name"'}, "not a Hub id"),
        ({"model": '"org/name@main"'}, "not a Hub id"),
        ({"model": "3"}, "model is '3', not a Hub id"),
        ({"rank": "16"}, "unknown key rank; did you mean ranks"),
        ({"revision": '"main"'}, "unknown key revision"),
        ({'"a\\nb"': "1"}, r"unknown key a\\nb"),
        ({"ranks": "16"}, "not a list of different ranks"),
        ({"ranks": "[]"}, "not a list of different ranks"),
        ({"ranks": "[8, 8]"}, "not a list of different ranks"),
        ({"ranks": "[0]"}, "not a list of different ranks"),
        ({"ranks": f"[{'9' * 5000}]"}, "is not valid TOML"),
        ({"ranks": f"[0x{'9' * 5000}]"}, "ranks is too large a number, not a list"),
        ({"ranks": "[true]"}, "not a list of different ranks"),
        ({"ranks": "[[8]]"}, "not a list of different ranks"),
        ({"alpha": "0"}, "not a positive number"),
        ({"alpha": "inf"}, "not a positive number"),
        ({"alpha": "true"}, "not a positive number"),
        ({"targets": '""'}, "not targets as of"),
        ({"exclude": '"a\\nb"'}, "not names or re:REGEX"),
        ({"rank_pattern": '{q_proj = "8"}'}, "not a table of ranks"),
        ({"gated": '"yes"'}, "not true or false"),
        ({"license": '"other"'}, "license_name and license_link go with"),
        ({"license_name": '"own"'}, "license_name and license_link go with"),
        ({"license": '"other"', "license_name": '"own"'}, "license_name and license_link go with"),
        ({"license": '"Apache 2"'}, "not a license id"),
        ({"repository": '"org/name-r{rank}"'}, "not a repository's name"),
        ({"repository": '"name"'}, "with {rank} in it"),
        ({"needs": '"luck"'}, "needs is 'luck', not one of fp8-blocks, safetensors"),
        ({"notes": '["a", "a"]'}, "not a list of different sentences"),
        ({"expected": None}, "lacks expected"),
        ({"expected": "{weights = 1, features = 2}"}, "lacks expected.size"),
        ({"expected": "{weights = 1, features = 2, size = 3, seize = 4}"}, "expected.seize; did you mean size"),
        ({"expected": "{weights = -1, features = 2, size = 3}"}, "expected.weights is '-1'"),
        ({"model =": "2"}, "is not valid TOML"),
        ({"license_link": '"https://a b"'}, "not an https link"),
    ],
)
def test_what_a_recipe_may_not_be(keys: dict[str, str | None], message: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse_recipe(Path("x.toml"), text_of(**keys))
    assert message.replace("\\\\", "\\") in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith("x.toml")


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    def error_of(path: str | Path) -> str:
        with pytest.raises(PlanError) as raised:
            load_recipe(path)
        return str(raised.value)

    big, binary, nested = tmp_path / "big.toml", tmp_path / "binary.toml", tmp_path / "nested.toml"
    big.write_bytes(text_of() + b"#" * MAX_BYTES)
    binary.write_bytes(b"model = '\xff'")
    nested.write_bytes(b"a = " + b"[" * 15_000)
    capital = tmp_path / "Own Recipe.toml"
    capital.write_bytes(text_of())
    assert "larger than 16384 bytes" in error_of(big)
    assert "is not UTF-8 (byte 9)" in error_of(binary)
    assert "is not valid TOML" in error_of(nested)
    assert "is no name for a recipe" in error_of(capital)
    assert "No such file" in error_of(tmp_path / "absent.toml")
    assert "cannot be read" in error_of(tmp_path.rename(tmp_path.with_suffix(".toml")))
    assert "did you mean llama-3.1-8b" in error_of("llama-3.1-8B-")
    for name in ("../manifests/phi-4", "/etc/passwd", "", "phi-4\n"):
        assert "there is no recipe" in error_of(name)


def test_a_recipe_of_one_s_own_says_everything(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(
        text_of(
            license='"other"', license_name='"own"', license_link='"https://example.org/license"', gated="true",
            alpha="16", targets='"q_proj,v_proj"', exclude="'re:.*\\.0\\..*'", rank_pattern="{v_proj = 2}",
            notes='["Slow."]',
        )
    )  # fmt: skip
    recipe = load_recipe(path)
    assert recipe.name == "own"
    assert recipe.settings == {
        "rank": 8,
        "alpha": 16,
        "targets": "q_proj,v_proj",
        "exclude": r"re:.*\.0\..*",
        "rank_pattern": {"v_proj": 2},
    }
    assert recipe.notes == ("Slow.",)
    assert recipe.repository_name(4) == "name-pissa-r4"
    assert recipe.adapter_size(4) == 4 * 4 * 2


class TestCommands:
    def test_recipes_are_listed(self, capfd: Capture) -> None:
        ran = run_cli(capfd, "recipes")
        assert (ran.code, ran.err) == (0, "")
        lines = ran.out.splitlines()
        assert len(lines) == len(RECIPES) + 4
        (line,) = [line for line in lines if line.startswith("llama-3.1-8b ")]
        assert line.split() == [
            *("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "llama3.1", "(gated)"),
            *("16,", "64,", "128", "224", "16.1", "GB", "167.8", "MB"),
        ]
        assert any(line.startswith("deepseek-v3* ") for line in lines)
        listed = json.loads(run_cli(capfd, "recipes", "--format", "json").out)
        assert [entry["name"] for entry in listed["recipes"]] == list(RECIPES)

    def test_a_recipe_is_explained(self, capfd: Capture) -> None:
        ran = run_cli(capfd, "recipes", "llama-3.1-8b")
        assert (ran.code, ran.err) == (0, "")
        assert "pissa-hub decompose --recipe llama-3.1-8b -o Llama-3.1-8B-pissa-r16" in ran.out
        assert "'Built with Llama'" in ran.out
        assert "gated" in ran.out
        assert "671.1 MB at rank 64" in ran.out
        fp8 = run_cli(capfd, "recipes", "deepseek-v3").out
        assert "needs     reading weights stored as FP8 blocks" in fp8
        assert "--recipe deepseek-v3 FOLDER -o" in fp8
        told = json.loads(run_cli(capfd, "recipes", "llama-3.1-8b", "--format", "json").out)
        assert told["repositories"]["64"] == "Llama-3.1-8B-pissa-r64"
        assert told["expected"]["weights"] == 224
        assert told["duties"] == list(duties("llama3.1"))
        assert "there is no recipe 'nonsense'" in run_cli(capfd, "recipes", "nonsense").error

    def test_decompose_by_a_recipe(self, tiny_checkpoint: Factory, tmp_path: Path, capfd: Capture) -> None:
        recipe = tmp_path / "own.toml"
        recipe.write_bytes(text_of(targets='"q_proj,down_proj"', notes='["Slow."]', alpha="2"))
        command = ("decompose", tiny_checkpoint(), "--recipe", recipe)
        ran = run_cli(capfd, *command, "-o", tmp_path / "out")
        assert ran.code == 0
        settings = manifest_of(tmp_path / "out")["settings"]
        assert (settings["rank"], settings["alpha"], settings["targets"]) == (8, 2, "q_proj,down_proj")
        assert ran.err.splitlines() == [
            "note: Slow.",
            "note: the plan decomposes 4 weights, recipe own expects 14: is this the model that it is for?",
        ]
        given = ("--rank", 4, "--targets", "all-linear", "--dry-run", "--format", "json")
        overridden = run_cli(capfd, *command, *given)
        assert overridden.err == "note: Slow.\n"
        plan = json.loads(overridden.out)
        assert (plan["settings"]["rank"], plan["settings"]["alpha"], len(plan["weights"])) == (4, 2, 14)
        # What is given counts, also where it is the default.
        default = run_cli(capfd, *command, "--rank", 16, "--dry-run", "--format", "json")
        assert json.loads(default.out)["settings"]["rank"] == 16

    def test_the_recipe_s_model_is_the_source(
        self, tiny_checkpoint: Factory, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org").mkdir()
        shutil.copytree(tiny_checkpoint(), tmp_path / "org" / "name")
        (tmp_path / "own.toml").write_bytes(text_of())
        (tmp_path / "fp8.toml").write_bytes(text_of(needs='"fp8-blocks"'))
        monkeypatch.chdir(tmp_path)
        ran = run_cli(capfd, "decompose", "--recipe", "own.toml", "-o", "out")
        assert (ran.code, ran.err) == (0, "")
        assert len(manifest_of(tmp_path / "out")["weights"]) == 14
        refused = run_cli(capfd, "decompose", "--recipe", "fp8.toml", "--dry-run").error
        assert "needs reading weights stored as FP8 blocks" in refused
        assert "convert org/name to a folder" in refused
        assert run_cli(capfd, "decompose", "org/name", "--recipe", "fp8.toml", "--dry-run").code == 0
        without = run_cli(capfd, "decompose", "--dry-run")
        assert without.code == 2
        assert "Missing argument 'SOURCE'" in without.err


def test_packages_are_all_listed() -> None:
    tool = _pyproject()["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pissa_hub").rglob("__init__.py")}
    assert set(tool["packages"]) == {*found, "pissa_hub.manifests"}
    assert tool["package-dir"] == {"pissa_hub.manifests": "manifests"}


def test_the_wheel_holds_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    for name in ("pissa_hub", "manifests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = (
        "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta; build_meta.build_wheel(sys.argv[2])"
    )
    built = run_python("-c", build, checkout, wheels)
    assert built.code == 0, built.err
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    listing = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pissa_hub import recipes;"
        "assert recipes.__file__.startswith(sys.argv[1]); print(*[recipe.name for recipe in recipes.list_recipes()])"
    )
    listed = run_python("-c", listing, tmp_path / "installed", PYTHONPATH="")
    assert listed.out.split() == list(RECIPES), listed.err


def _pyproject() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return table
