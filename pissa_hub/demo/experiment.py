"""PiSSA beside LoRA: same model, rank, modules, batches and steps, each at the same learning rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pissa_hub.checkpoint.writer import write_file_atomic
from pissa_hub.demo.text import Pairs
from pissa_hub.demo.training import SEED, Score, score, train
from pissa_hub.errors import OutputError
from pissa_hub.pipeline.plan import ADAPTER_FOLDER
from pissa_hub.report import table

METHODS = ("LoRA", "PiSSA")
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
STEPS = 20
RECORD_NAME = "training.json"
# The table shows the mean loss of so many parts of a run.
_PARTS = 5


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: one of METHODS.
        learning_rate: its peak.
        losses: of each step's batch, in nats.
        held_out: score on the held-out pairs after the last step.
    """

    method: str
    learning_rate: float
    losses: tuple[float, ...]
    held_out: Score

    @property
    def name(self) -> str:
        """Of the folder that its adapter is saved in."""
        return f"{self.method.lower()}-{self.learning_rate:g}"


@dataclass(frozen=True)
class Experiment:
    """All runs, and the score of the model that they start from."""

    before: Score
    runs: tuple[Run, ...]

    def best(self, method: str) -> Run:
        """The run of a method with the lowest held-out loss."""
        return min((run for run in self.runs if run.method == method), key=lambda run: run.held_out.loss)


def compare_methods(
    source: Path, decomposed: Path, folder: Path, pairs: Pairs, say: Callable[[str], None]
) -> Experiment:
    """Train every method at every learning rate and save the adapters in ``folder``, a line for each run.

    Runs that an earlier call has done are read back.
    """
    from transformers import AutoModel, AutoTokenizer

    record = folder / RECORD_NAME
    if record.exists():
        return _read(record)
    tokenizer = AutoTokenizer.from_pretrained(source)
    before = score(AutoModel.from_pretrained(source), tokenizer, pairs.held_out)
    runs = []
    for learning_rate in LEARNING_RATES:
        for method in METHODS:
            model = pissa_model(decomposed) if method == "PiSSA" else lora_model(source, decomposed)
            losses = train(model, tokenizer, pairs.training, learning_rate=learning_rate, steps=STEPS)
            run = Run(method, learning_rate, tuple(losses), score(model, tokenizer, pairs.held_out))
            model.save_pretrained(folder / run.name)
            say(f"   {run.name}: held-out loss {run.held_out.loss:.3f}")
            runs.append(run)
    experiment = Experiment(before, tuple(runs))
    write_file_atomic(record, json.dumps(asdict(experiment), indent=1).encode())
    return experiment


def pissa_model(decomposed: Path) -> Any:
    """Residual base and PiSSA adapter, trainable."""
    from peft import PeftModel
    from transformers import AutoModel

    model = AutoModel.from_pretrained(decomposed)
    return PeftModel.from_pretrained(model, str(decomposed), subfolder=ADAPTER_FOLDER, is_trainable=True)


def lora_model(source: Path, decomposed: Path) -> Any:
    """The original with a fresh LoRA (random A, B = 0) of the PiSSA adapter's rank, scaling and modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    config = LoraConfig.from_pretrained(str(decomposed / ADAPTER_FOLDER))
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return get_peft_model(AutoModel.from_pretrained(source), config)


def experiment_text(experiment: Experiment) -> str:
    """A line per run: learning rate, loss on the way, loss and recall on the held-out pairs after it."""

    def held_out(score: Score) -> list[str]:
        return [f"{score.loss:.3f}", f"{score.recall:.1%}"]

    header = ["method", "lr", *(f"{part[0] + 1}-{part[-1] + 1}" for part in _parts(experiment.runs[0]))]
    rows = [["before", "", *[""] * _PARTS, *held_out(experiment.before)]]
    for run in experiment.runs:
        losses = [f"{loss:.2f}" for loss in _means(run)]
        rows.append([run.method, f"{run.learning_rate:.0e}", *losses, *held_out(run.held_out)])
    return table([*header, "held-out loss", "recall@1"], rows)


def plot_losses(experiment: Experiment, path: Path) -> None:
    """Training loss on the way and held-out loss against the learning rate, as PNG.

    Raises:
        ImportError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out = figure.subplots(1, 2)
    for method, colour in zip(METHODS, ("tab:blue", "tab:orange"), strict=True):
        runs = sorted((run for run in experiment.runs if run.method == method), key=lambda run: run.learning_rate)
        for run, style in zip(runs, (":", "-.", "--", "-"), strict=False):
            steps = [part[-1] + 1 for part in _parts(run)]
            training.plot(steps, _means(run), color=colour, linestyle=style, label=f"{method} {run.learning_rate:g}")
        rates, losses = [run.learning_rate for run in runs], [run.held_out.loss for run in runs]
        held_out.plot(rates, losses, color=colour, marker="o", label=method)
    held_out.axhline(experiment.before.loss, color="grey", linestyle=":", label="before")
    training.set_title("Training, mean of the last batches")
    training.set_xlabel("step")
    held_out.set_title("After training, on held-out pairs")
    held_out.set_xlabel("learning rate")
    held_out.set_xscale("log")
    for axes in (training, held_out):
        axes.set_ylabel("InfoNCE loss (nats)")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "give another path for the plot") from error


def _parts(run: Run) -> list[range]:
    """The run's steps, counted from 0, in parts of about the same length."""
    steps = len(run.losses)
    return [range(part * steps // _PARTS, (part + 1) * steps // _PARTS) for part in range(_PARTS)]


def _means(run: Run) -> list[float]:
    """Mean loss of each part."""
    return [sum(run.losses[step] for step in part) / len(part) for part in _parts(run)]


def _read(record: Path) -> Experiment:
    try:
        table = json.loads(record.read_bytes())
        runs = [{**run, "losses": tuple(run["losses"]), "held_out": Score(**run["held_out"])} for run in table["runs"]]
        return Experiment(Score(**table["before"]), tuple(Run(**run) for run in runs))
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{record} cannot be read", f"remove {record.parent} to train again") from None
