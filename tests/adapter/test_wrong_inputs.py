"""A convert that cannot be right is one clear line, exit code 1, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pissa_hub import convert, decompose

from ..helpers import ROOT, files_of, run_cli
from .kinds import KINDS, PEFT_OWN
from .trained import CONFIG, PEFTS_OWN_WARNINGS, RANK, WEIGHTS, Trained, Training, dense_updates, trained_update

pytestmark = PEFTS_OWN_WARNINGS

PLAIN = KINDS["plain"]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def done(trained: Training) -> Trained:
    """A plain adapter; its folders are for reading only."""
    return trained(PLAIN)


@pytest.fixture
def adapter(done: Trained, tmp_path: Path) -> Path:
    """A copy of the trained adapter, to be damaged."""
    return Path(shutil.copytree(done.adapter, tmp_path / "adapter"))


def refused(capfd: Capture, adapter: Path, init: object, output: Path, *options: object) -> str:
    """The line of the refusal; checks that no file changed and none was made."""
    kept = output.parent if output.parent.exists() else output.parent.parent
    before = files_of(kept), sorted(kept.rglob("*"))
    given = [] if init is None else ["--init", init]
    line = run_cli(capfd, "convert", adapter, *given, "-o", output, *options).error
    assert (files_of(kept), sorted(kept.rglob("*"))) == before
    return line


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_bytes())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Put tensors into a file, or take them out."""
    tensors = {**load_file(folder / WEIGHTS), **changes}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def moved(done: Trained, folder: Path, **options: Any) -> Path:
    """Another decomposition of the same source."""
    decompose(done.source, folder, **{"rank": RANK, **options})
    return folder


def leave_alone(folder: Path, source: Path) -> Path:
    """A copy of an adapter whose config does not say where its base lies."""
    shutil.copytree(source, folder)
    set_config(folder, base_model_name_or_path="/not/here")
    return folder


def converts_to(done: Trained, lora: Path) -> float:
    """The largest relative error of any module's change."""
    found, expected = dense_updates(lora), trained_update(done)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


# Adapter and initial state that do not belong together


def test_an_adapter_of_another_model(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    """Of the same architecture, shapes and singular values."""
    model = AutoModelForCausalLM.from_pretrained(done.source)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rows, columns = (torch.randperm(size, generator=generator) for size in parameter.shape)
                parameter.copy_(parameter[rows][:, columns].clone())
    model.save_pretrained(tmp_path / "model")
    other = tmp_path / "other"
    decompose(tmp_path / "model", other, rank=RANK)
    adapter = leave_alone(tmp_path / "adapter", done.adapter)
    line = refused(capfd, adapter, other, tmp_path / "lora")
    assert f"not trained from {other}" in line
    assert "--trust-init" in line


@pytest.mark.parametrize("options", [{"svd": "randomized", "niter": 1}, {"rank": 3}, {"targets": "q_proj"}])
def test_another_decomposition_is_known_by_the_base_that_the_adapter_names(
    capfd: Capture, done: Trained, tmp_path: Path, options: dict[str, Any]
) -> None:
    decompose(done.source, tmp_path / "other", **{"rank": RANK, **options})
    line = refused(capfd, done.adapter, tmp_path / "other", tmp_path / "lora")
    assert "another decomposition" in line
    assert f"give --init {done.base}" in line


def test_a_base_in_a_closed_folder_is_not_asked(adapter: Path, done: Trained, tmp_path: Path) -> None:
    """Or under a name that this system cannot have."""
    set_config(adapter, base_model_name_or_path="/" + "x" * 300)
    convert(adapter, done.init, tmp_path / "lora")
    assert converts_to(done, tmp_path / "lora") < 1e-6


@pytest.mark.parametrize("name", ["PEFT's", "PEFT's by few iterations"])
def test_pefts_own_singular_vectors_have_other_signs(
    capfd: Capture, trained: Training, tmp_path: Path, name: str
) -> None:
    done = trained(PEFT_OWN[name])
    targets = ",".join(done.kind.decompose["target_modules"])
    decompose(done.source, tmp_path / "init", rank=RANK, targets=targets)
    line = refused(capfd, done.adapter, tmp_path / "init", tmp_path / "lora")
    assert "not trained from" in line
    assert "reversed" in line
    convert(done.adapter, tmp_path / "init", tmp_path / "lora", trust_init=True)
    # Of exact vectors the product is the same whatever their signs; of PEFT's approximate ones it is not.
    error = converts_to(done, tmp_path / "lora")
    assert error < 1e-4 if name == "PEFT's" else error > 0.1


@pytest.mark.parametrize("options", [{"seed": 7}, {"svd": "full"}, {"svd": "randomized", "niter": 16}])
def test_another_svd_as_exact_is_as_good_a_start(done: Trained, tmp_path: Path, options: dict[str, Any]) -> None:
    """Ours have the same signs."""
    decompose(done.source, tmp_path / "init", **{"rank": RANK, **options})
    adapter = leave_alone(tmp_path / "adapter", done.adapter)
    convert(adapter, tmp_path / "init", tmp_path / "lora")
    assert converts_to(done, tmp_path / "lora") < 1e-4


def test_an_inexact_svd_is_another_start(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    decompose(done.source, tmp_path / "init", rank=RANK, svd="randomized", niter=0)
    adapter = leave_alone(tmp_path / "adapter", done.adapter)
    assert "not trained from" in refused(capfd, adapter, tmp_path / "init", tmp_path / "lora")


def test_another_rank(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    decompose(done.source, tmp_path / "init", rank=RANK - 1)
    adapter = leave_alone(tmp_path / "adapter", done.adapter)
    line = refused(capfd, adapter, tmp_path / "init", tmp_path / "lora")
    assert "has A [4, " in line
    assert "and A [3, " in line


def test_the_initial_state_of_another_architecture(
    capfd: Capture, done: Trained, trained: Training, tmp_path: Path
) -> None:
    line = refused(capfd, done.adapter, trained(KINDS["BERT"]).initial, tmp_path / "lora")
    assert f"{done.adapter / WEIGHTS} lacks bert" in line


def test_an_adapter_trained_in_another_class_of_model(capfd: Capture, adapter: Path, done: Trained) -> None:
    tensors = load_file(adapter / WEIGHTS)
    renamed = {name.replace(".model.model.", ".model.base.model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / WEIGHTS)
    line = refused(capfd, adapter, done.init, adapter.parent / "lora")
    assert "but base.model.layers.0.mlp.down_proj: trained in another class of model?" in line


def test_a_module_that_was_taken_out(capfd: Capture, adapter: Path, done: Trained) -> None:
    change_tensors(adapter, {f"{Q_PROJ}.lora_{side}.weight": None for side in "AB"})
    line = refused(capfd, adapter, done.init, adapter.parent / "lora")
    assert f"{adapter / WEIGHTS} lacks model.layers.0.self_attn.q_proj" in line


def test_an_initial_state_that_lacks_what_peft_split(capfd: Capture, trained: Training, tmp_path: Path) -> None:
    """Of a module that pissa_hub split and PEFT initialised afresh, nothing is missing; of PEFT's own there is."""
    done = trained(PEFT_OWN["PEFT's"])
    init = Path(shutil.copytree(done.initial, tmp_path / "init"))
    change_tensors(init, {f"{Q_PROJ}.lora_{side}.weight": None for side in "AB"})
    line = refused(capfd, done.adapter, init, tmp_path / "lora")
    assert f"{init / WEIGHTS} lacks model.layers.0.self_attn.q_proj" in line


def test_an_initial_state_that_its_manifest_does_not_name(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    init = Path(shutil.copytree(done.init, tmp_path / "init"))
    change_tensors(init / "pissa_init", {f"{Q_PROJ}.lora_A.weight": torch.ones(4, 64)})
    line = refused(capfd, done.adapter, init, tmp_path / "lora", "--trust-init")
    assert str(init / "pissa_init" / WEIGHTS) in line
    assert "pissa_manifest.json" in line


@pytest.mark.parametrize(
    ("init", "named"),
    [
        ("nothing/here/at/all", "does not exist"),
        ("someone/model", "hf download someone/model"),
        ("source", "has no adapter_config.json"),
    ],
)
def test_an_init_that_is_none(
    capfd: Capture, done: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, named: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(capfd, done.adapter, done.source if init == "source" else init, tmp_path / "lora")
    assert named in line


# No initial state given


def test_an_adapter_without_its_initial_state(capfd: Capture, adapter: Path) -> None:
    line = refused(capfd, adapter, None, adapter.parent / "lora")
    for place in ("decompose", "save_pretrained (PEFT)", "pissa_init/ (LLaMA-Factory", "initial_model/ (ms-swift)"):
        assert place in line


@pytest.mark.parametrize("adapter", ["nothing/here/at/all", "source"])
def test_no_adapter_and_no_initial_state(capfd: Capture, done: Trained, tmp_path: Path, adapter: str) -> None:
    """It is the adapter that is missing."""
    path = done.source if adapter == "source" else Path(adapter)
    line = refused(capfd, path, None, tmp_path / "lora")
    assert f"{path} is not a folder" in line or f"{path} has no {CONFIG}" in line


@pytest.mark.parametrize("place", ["adapter/pissa_init", "adapter/initial_model", "pissa_init", "initial_model"])
def test_an_initial_state_beside_the_adapter_is_named(capfd: Capture, adapter: Path, done: Trained, place: str) -> None:
    """In the trainer's output folder, or beside one of its checkpoints."""
    shutil.copytree(done.initial, adapter.parent / place)
    line = refused(capfd, adapter, None, adapter.parent / "lora")
    assert line.endswith(f"give --init {adapter.parent / place}")


# Layouts of trainers


@pytest.fixture
def own(trained: Training) -> Trained:
    """PiSSA that PEFT made in the training process."""
    return trained(PEFT_OWN["PEFT's"])


@pytest.fixture
def llama_factory(own: Trained, tmp_path: Path) -> Path:
    """Its output folder: the trained adapter, checkpoints, pissa_init, pissa_backup and pissa_converted."""
    output = Path(shutil.copytree(own.adapter, tmp_path / "output"))
    shutil.copytree(own.initial, output / "pissa_init")
    set_config(output / "pissa_init", init_lora_weights=True)
    for name in ("pissa_backup", "checkpoint-2"):
        shutil.copytree(own.adapter, output / name)
    converted_by_peft(own, output / "pissa_converted")
    return output


def converted_by_peft(own: Trained, folder: Path) -> None:
    """As a trainer does at its end: initial and trained factors beside each other, of rank 2r."""
    initial = shutil.copytree(own.initial, folder.with_name("initial"))
    set_config(initial, init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(own.source), own.adapter)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))
    shutil.rmtree(initial)


@pytest.mark.parametrize("adapter", [".", "pissa_backup", "checkpoint-2"])
@pytest.mark.parametrize("init", [".", "pissa_init"])
def test_the_folders_of_llama_factory(llama_factory: Path, own: Trained, adapter: str, init: str) -> None:
    lora = llama_factory.parent / "lora"
    convert(llama_factory / adapter, llama_factory / init, lora)
    assert converts_to(own, lora) < 1e-6


@pytest.mark.parametrize("adapter", [".", "checkpoint-2"])
@pytest.mark.parametrize("init", [".", "initial_model"])
def test_the_folders_of_ms_swift(own: Trained, tmp_path: Path, adapter: str, init: str) -> None:
    output = Path(shutil.copytree(own.adapter, tmp_path / "output"))
    shutil.copytree(own.initial, output / "initial_model")
    shutil.copytree(own.adapter, output / "checkpoint-2")
    convert(output / adapter, output / init, tmp_path / "lora")
    assert converts_to(own, tmp_path / "lora") < 1e-6


def test_an_adapter_that_peft_converted(capfd: Capture, llama_factory: Path) -> None:
    converted = llama_factory / "pissa_converted"
    assert json.loads((converted / CONFIG).read_bytes())["r"] == 2 * RANK
    lora = llama_factory.parent / "lora"
    line = refused(capfd, converted, llama_factory, lora)
    assert f"{converted} was converted by PEFT" in line
    assert "pissa_init" in refused(capfd, converted, None, lora)


def test_an_adapter_that_convert_wrote(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    convert(done.adapter, done.init, tmp_path / "lora")
    for init in (done.init, done.initial):
        line = refused(capfd, tmp_path / "lora", init, tmp_path / "again")
        assert f"{tmp_path / 'lora'} is converted already" in line


def test_a_folder_of_checkpoints(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(done.adapter, tmp_path / "output" / name)
    line = refused(capfd, tmp_path / "output", done.init, tmp_path / "lora")
    assert f"{tmp_path}/output/checkpoint-1, {tmp_path}/output/checkpoint-2" in line


# Bad files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("options", [[], ["--trust-init"]])
def test_factors_that_diverged(
    capfd: Capture, adapter: Path, done: Trained, side: str, value: float, options: list[str]
) -> None:
    name = f"{Q_PROJ}.lora_{side}.weight"
    tensor = load_file(adapter / WEIGHTS)[name]
    tensor[1, 2] = value
    change_tensors(adapter, {name: tensor})
    line = refused(capfd, adapter, done.init, adapter.parent / "lora", *options)
    assert f"{name} in {adapter / WEIGHTS} holds NaN or infinity" in line


def test_a_whole_weight_that_diverged(capfd: Capture, trained: Training, tmp_path: Path) -> None:
    done = trained(KINDS["whole output head"])
    folder = Path(shutil.copytree(done.adapter, tmp_path / "adapter"))
    name = "base_model.model.lm_head.weight"
    weight = load_file(folder / WEIGHTS)[name]
    weight[0, 0] = float("nan")
    change_tensors(folder, {name: weight})
    assert f"{name} in {folder / WEIGHTS} holds NaN" in refused(capfd, folder, done.init, tmp_path / "lora")


def test_trained_and_initial_the_wrong_way_round(capfd: Capture, adapter: Path, done: Trained) -> None:
    line = refused(capfd, done.base / "pissa_init", adapter, adapter.parent / "lora")
    assert "give the trained adapter first and what it started from with --init" in line


@pytest.mark.parametrize("name", ["model", "a/b`c", "a/b\nc", "../a", "a/" + "b" * 200, "<script>/x"])
def test_a_base_model_that_is_no_hub_id(capfd: Capture, done: Trained, tmp_path: Path, name: str) -> None:
    line = refused(capfd, done.adapter, done.init, tmp_path / "lora", "--base-model", name)
    assert "is no Hub id" in line


def test_the_current_folder_is_no_output(
    capfd: Capture, done: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_cli(capfd, "convert", done.adapter, "--init", done.init, "-o", ".")
    assert "is the current folder; give a new one" in ran.error
    assert not list(tmp_path.iterdir())


def test_an_output_behind_a_link(done: Trained, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(done.adapter, done.init, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / WEIGHTS).is_file()


def test_factors_that_are_all_zero(capfd: Capture, adapter: Path, done: Trained) -> None:
    change_tensors(adapter, {name: torch.zeros_like(tensor) for name, tensor in load_file(adapter / WEIGHTS).items()})
    assert "all zero" in refused(capfd, adapter, done.init, adapter.parent / "lora")


def test_nothing_was_trained(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    ran = run_cli(capfd, "convert", done.initial, "--init", done.init, "-o", tmp_path / "lora")
    assert ran.code == 0
    assert "note: nothing was trained" in ran.err
    assert not any(update.any() for update in dense_updates(tmp_path / "lora").values())


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-5])


def scramble(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:10] = b"}{"
    (folder / WEIGHTS).write_bytes(data)


def pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def widen(folder: Path) -> None:
    change_tensors(folder, {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 64, dtype=torch.float64)})


def reshape(folder: Path) -> None:
    change_tensors(folder, {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 63)})


def lose_a_factor(folder: Path) -> None:
    change_tensors(folder, {f"{Q_PROJ}.lora_B.weight": None})


DAMAGES = {
    "truncated": (cut, [WEIGHTS, "truncated: 5 bytes"]),
    "no header": (scramble, [WEIGHTS, "header does not begin"]),
    "a pickle": (pickle, ["a pickle, which is never opened", "safe_serialization"]),
    "float64": (widen, [f"{Q_PROJ}.lora_A.weight", "F64"]),
    "another shape": (reshape, [WEIGHTS, "q_proj", "[4, 63]", "[4, 64]"]),
    "A without B": (lose_a_factor, [WEIGHTS, "lacks lora_B of model.layers.0.self_attn.q_proj"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [f"has no {WEIGHTS}"]),
    "no config": (lambda folder: (folder / CONFIG).unlink(), [f"has no {CONFIG}"]),
    "a broken config": (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG, "not valid JSON"]),
    "another method": (lambda folder: set_config(folder, peft_type="IA3"), [CONFIG, "'IA3'"]),
    "an endless regex": (
        lambda folder: set_config(folder, rank_pattern={"(([a-z_.0-9])+)+X": 3}),
        [CONFIG, "rank_pattern", "for ever"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters(capfd: Capture, adapter: Path, done: Trained, damage: str) -> None:
    do, named = DAMAGES[damage]
    do(adapter)
    line = refused(capfd, adapter, done.init, adapter.parent / "lora")
    assert str(adapter) in line or Q_PROJ in line
    assert all(part in line for part in named), line


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_initial_states(capfd: Capture, own: Trained, tmp_path: Path, damage: str) -> None:
    init = Path(shutil.copytree(own.initial, tmp_path / "init"))
    do, _ = DAMAGES[damage]
    do(init)
    line = refused(capfd, own.adapter, init, tmp_path / "lora")
    assert str(init) in line


# Output and options


def test_outputs_that_may_not_be_written(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    assert f"{file} is not a folder" in refused(capfd, done.adapter, done.init, file)
    assert f"{full} is not empty" in refused(capfd, done.adapter, done.init, full)
    assert f"{file} cannot be written: File exists" in refused(capfd, done.adapter, done.init, file / "lora")


def test_the_adapters_own_folder_is_no_output(capfd: Capture, adapter: Path, done: Trained) -> None:
    assert f"{adapter} is not empty" in refused(capfd, adapter, done.init, adapter)


def test_a_folder_that_is_finished(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    convert(done.adapter, done.init, lora)
    before = files_of(lora)
    ran = run_cli(capfd, "convert", done.adapter, "--init", done.init, "-o", lora)
    assert (ran.code, ran.out.strip()) == (
        0,
        f"{lora} is finished already: same adapter, same init, same settings; nothing to do",
    )
    assert files_of(lora) == before
    assert "another conversion" in refused(capfd, done.adapter, done.init, lora, "--rank", 2)
    assert "another conversion" in refused(capfd, done.initial, done.init, lora)
    (lora / WEIGHTS).write_bytes(before[WEIGHTS][:-1] + b"x")
    assert f"{WEIGHTS} is damaged" in refused(capfd, done.adapter, done.init, lora)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rank", 0], "rank 0"),
        (["--rank", -1], "rank '-1'"),
        (["--rank", "most"], "rank 'most'"),
        (["--rank", "auto"], "--max-error"),
        (["--max-error", 0.1], "--rank auto"),
        (["--rank", "auto", "--max-error", 1e-4, "--dtype", "bfloat16"], "bfloat16 rounds by"),
        (["--rank", "auto", "--max-error", "nan"], "--max-error"),
        (["--rank", "auto", "--max-error", 1], "--max-error"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_options_that_cannot_be_used(
    capfd: Capture, done: Trained, tmp_path: Path, options: list[Any], named: str
) -> None:
    assert named in refused(capfd, done.adapter, done.init, tmp_path / "lora", *options)


def test_an_error_that_the_dtype_cannot_keep(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    """Only after the arithmetic is it known; nothing is left of it."""
    options = ["--rank", "auto", "--max-error", 1.2e-3, "--dtype", "bfloat16"]
    line = refused(capfd, done.adapter, done.init, tmp_path / "lora", *options)
    assert "--dtype" in line


@pytest.mark.parametrize(
    ("how", "left"), [(signal.SIGINT, []), (signal.SIGKILL, [".partial"])], ids=["interrupted", "killed"]
)
def test_a_run_that_is_stopped(done: Trained, tmp_path: Path, how: signal.Signals, left: list[str]) -> None:
    """While it writes: the output's name is not taken, and the same command does the work."""
    program = (
        "import os, sys, time\n"
        "from pissa_hub.adapter import convert\n"
        "from pissa_hub.cli import main\n"
        f"convert.lora_card = lambda *_: (os.kill(os.getpid(), {int(how)}), time.sleep(60))\n"
        "main(sys.argv[1:])\n"
    )
    lora = tmp_path / "lora"
    command = [sys.executable, "-c", program, "convert", done.adapter, "--init", done.init, "-o", lora]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == (130 if how == signal.SIGINT else -how), ran.stderr
    assert "Traceback" not in ran.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == left
    convert(done.adapter, done.init, lora)
    assert converts_to(done, lora) < 1e-6


# What is said


def test_one_json_object_and_notes_apart(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    command = ("convert", done.adapter, "--init", done.init, "-o", tmp_path / "lora", "--format", "json")
    for was_finished in (False, True):
        ran = run_cli(capfd, *command)
        assert ran.code == 0
        (line,) = ran.out.splitlines()
        said = json.loads(line)
        assert said["was_finished"] is was_finished
        assert said["output"] == str(tmp_path / "lora")
        assert said["largest_error"] < 1e-6
        assert {module["module"] for module in said["modules"]} == trained_update(done).keys()
        assert [f"note: {note}" for note in said["notes"]] == ran.err.splitlines()


def test_a_line_for_each_kind_of_module(capfd: Capture, done: Trained, tmp_path: Path) -> None:
    ran = run_cli(capfd, "convert", done.adapter, "--init", done.init, "-o", tmp_path / "lora")
    head, *rows, empty, last = ran.out.splitlines()
    assert head.split("  ")[0] == "module"
    assert {row.split()[0].rpartition(".")[2] for row in rows} == {
        name.rpartition(".")[2] for name in trained_update(done)
    }
    assert all(row.split()[1:2] == ["2"] and row.split()[3] == "8" for row in rows)
    assert empty == ""
    assert last.startswith(f"{done.adapter} -> {tmp_path / 'lora'}: ")


def test_the_help_names_every_option(capfd: Capture) -> None:
    out = run_cli(capfd, "convert", "--help").out
    for option in ("--init", "--rank", "--max-error", "--dtype", "--for", "--base-model", "--trust-init", "--device"):
        assert f"  {option} " in out
