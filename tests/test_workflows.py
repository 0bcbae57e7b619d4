"""The workflows: what GitHub would refuse or an attacker could use, and that the commands in them exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pissa_hub.cli import cli

from .helpers import ROOT

FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
RECIPE = FOLDER / "recipe.yml"
KEYS = {"name", "on", "permissions", "concurrency", "env", "defaults", "jobs"}
JOB_KEYS = {
    *("name", "needs", "if", "runs-on", "environment", "permissions", "timeout-minutes", "strategy"),
    *("env", "defaults", "steps"),
}
STEP_KEYS = {"name", "id", "if", "uses", "with", "run", "env", "shell", "working-directory"}


def workflow(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads a bare `on` as true.
    table: dict[str, Any] = {
        "on" if key is True else key: value for key, value in yaml.safe_load(path.read_text()).items()
    }
    return table


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
class TestEveryWorkflow:
    def test_has_known_keys_only(self, path: Path) -> None:
        table = workflow(path)
        assert table.keys() <= KEYS
        for job in table["jobs"].values():
            assert job.keys() <= JOB_KEYS
            assert set([job["needs"]] if "needs" in job else []) <= table["jobs"].keys()
        for step in steps_of(path):
            assert step.keys() <= STEP_KEYS
            assert ("run" in step) != ("uses" in step)

    def test_may_read_and_no_more_by_default(self, path: Path) -> None:
        assert workflow(path)["permissions"] == {"contents": "read"}

    def test_pastes_nothing_into_a_script(self, path: Path) -> None:
        """What a user typed reaches a script as a variable only."""
        for step in steps_of(path):
            pasted = re.findall(r"\$\{\{(.*?)\}\}", step.get("run", ""))
            assert all(expression.strip().startswith("matrix.") for expression in pasted)

    def test_scripts_are_bash(self, path: Path) -> None:
        for step in steps_of(path):
            if "run" in step:
                done = subprocess.run(["bash", "-n"], input=step["run"], capture_output=True, text=True, check=False)
                assert (done.returncode, done.stderr) == (0, "")

    def test_inputs_exist(self, path: Path) -> None:
        inputs = (workflow(path)["on"].get("workflow_dispatch") or {}).get("inputs", {})
        assert set(re.findall(r"\binputs\.(\w+)", path.read_text())) == inputs.keys()

    def test_commands_and_options_exist(self, path: Path) -> None:
        for step in steps_of(path):
            for name, rest in re.findall(r"pissa-hub ([a-z]+)([^\n]*)", step.get("run", "")):
                assert name in cli.commands
                known = {
                    opt for param in cli.commands[name].params for opt in param.opts if isinstance(param, click.Option)
                }
                known |= {opt for param in cli.commands[name].params for opt in param.secondary_opts}
                assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) <= known


def test_the_token_is_where_it_is_needed_only() -> None:
    for path in FILES:
        for step in steps_of(path):
            if "secrets." in str(step):
                assert step["name"] in ("Decompose", "Verify", "Publish")
                assert step["env"] == {"HF_TOKEN": "${{ secrets.HF_TOKEN }}"}
    assert "secrets" not in (FOLDER / "release.yml").read_text()


def read_recipe(folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the step of recipe.yml that reads the recipe does, and the variables that it leaves to the next ones."""
    (script,) = (step["run"] for step in steps_of(RECIPE) if step.get("name") == "Read the recipe")
    for name, command in (("pissa-hub", "-m pissa_hub"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "RUNNER_TEMP": str(folder)},
        **{"GITHUB_ENV": str(folder / "env"), "PISSA_WORK": "", "RANK": "", "OWNER": "someone", **inputs},
    }
    command = ["bash", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done, (folder / "env").read_text().splitlines() if (folder / "env").exists() else []


def test_the_recipe_decides_names(tmp_path: Path) -> None:
    done, variables = read_recipe(tmp_path, RECIPE="llama-3.1-8b")
    assert done.returncode == 0, done.stderr
    name = "Llama-3.1-8B-pissa-r16"
    assert variables == ["RANK=16", "MODEL=meta-llama/Llama-3.1-8B", f"NAME={name}", f"OUTPUT={tmp_path / name}"]
    (tmp_path / "env").unlink()
    _, variables = read_recipe(tmp_path, RECIPE="llama-3.1-8b", RANK="8", PISSA_WORK="/data")
    assert variables[-1] == "OUTPUT=/data/Llama-3.1-8B-pissa-r8"


@pytest.mark.parametrize(
    "inputs", [{"RECIPE": "nonsense"}, {"RECIPE": "phi-4", "RANK": "1\nX=2"}, {"RECIPE": "phi-4", "OWNER": "a/../b"}]
)
def test_bad_inputs_stop_the_job(inputs: dict[str, str], tmp_path: Path) -> None:
    done, variables = read_recipe(tmp_path, **inputs)
    assert done.returncode == 1
    assert variables == []
