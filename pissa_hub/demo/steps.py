"""The steps of the demo: each says the command that a user would type, runs it and shows what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import pissa_hub
from pissa_hub.demo.experiment import METHODS, STEPS, compare_methods, experiment_text, plot_losses
from pissa_hub.demo.text import Pairs
from pissa_hub.demo.training import embeddings
from pissa_hub.errors import VerificationError
from pissa_hub.pipeline.plan import ADAPTER_FOLDER
from pissa_hub.progress import Bar
from pissa_hub.report import conversion_text, findings_text, manifest_text, size

RANK = 16


@dataclass(frozen=True)
class Steps:
    """The steps, in their order.

    Attributes:
        source: folder of the original model.
        output: folder that holds the results.
        pairs: text to train on; models are compared on the held-out sentences.
        say: told every line.
    """

    source: Path
    output: Path
    pairs: Pairs
    say: Callable[[str], None]

    @property
    def decomposed(self) -> Path:
        return self.output / "pissa"

    def decompose(self) -> None:
        weights = size((self.source / "model.safetensors").stat().st_size)
        self.say(
            f"1. decompose all-MiniLM-L6-v2 ({weights}, real weights) at rank {RANK}\n"
            f"   pissa-hub decompose <model> -o {self.decomposed} --rank {RANK}\n"
        )
        with Bar() as bar:
            outcome = pissa_hub.decompose(self.source, self.decomposed, rank=RANK, progress=bar)
        self._say_if_finished(outcome)
        self.say(manifest_text(outcome.manifest))

    def verify(self) -> None:
        """Raises VerificationError if the decomposition is not sound."""
        self.say(
            "\n2. verify every file, weight and certificate\n"
            f"   pissa-hub verify {self.decomposed} --source <model> --sample -1\n"
        )
        with Bar() as bar:
            findings = pissa_hub.verify(self.decomposed, self.source, sample=-1, progress=bar)
        self.say(findings_text(findings))
        if not findings.is_sound:
            raise VerificationError(f"{self.decomposed} is not sound", "report this with the output above")

    def load(self) -> float:
        """Largest difference of residual + initial adapter from the original."""
        self.say(
            "\n3. load with unchanged transformers and PEFT\n"
            f'   model = AutoModel.from_pretrained("{self.decomposed}")\n'
            f'   model = PeftModel.from_pretrained(model, "{self.decomposed}", subfolder="{ADAPTER_FOLDER}")\n'
        )
        original = self._embeddings(self.source)
        alone = _difference(self._embeddings(self.decomposed), original)
        both = _difference(self._embeddings(self.decomposed, self.decomposed / ADAPTER_FOLDER), original)
        self.say(f"embeddings differ from the original's by {both:.1e}, of the residual alone by {alone:.1e}")
        return both

    def train(self) -> Path:
        """Folder of the best PiSSA adapter."""
        training, held_out = len(self.pairs.training), len(self.pairs.held_out)
        self.say(
            f"\n4. train PiSSA and LoRA with PEFT on Python's manual, {STEPS} steps per run: {training} pairs of\n"
            f"   neighbouring sentences, {held_out} pairs from other sections held out (InfoNCE loss in nats)\n"
        )
        runs = self.output / "runs"
        experiment = compare_methods(self.source, self.decomposed, runs, self.pairs, self.say)
        self.say("\n" + experiment_text(experiment))
        curves = self.output / "training.png"
        plot_losses(experiment, curves)
        for method in METHODS:
            best = experiment.best(method)
            self.say(f"{method} is best at {best.learning_rate:g}: held-out loss {best.held_out.loss:.3f}")
        self.say(f"curves: {curves}")
        return runs / experiment.best("PiSSA").name

    def convert(self, adapter: Path) -> float:
        """Largest difference of the original + converted LoRA from residual + trained adapter."""
        lora = self.output / "lora"
        self.say(
            "\n5. convert the trained adapter to a LoRA of the original model\n"
            f"   pissa-hub convert {adapter} --init {self.decomposed} -o {lora}\n"
        )
        conversion = pissa_hub.convert(adapter, self.decomposed, lora)
        self._say_if_finished(conversion)
        self.say(conversion_text(conversion.record))
        trained = self._embeddings(self.decomposed, adapter)
        moved = _difference(trained, self._embeddings(self.source))
        difference = _difference(self._embeddings(self.source, lora), trained)
        self.say(
            f"\nembeddings differ from the trained model's by {difference:.1e}; training moved them by {moved:.1e}"
        )
        return difference

    def merge(self, adapter: Path) -> float:
        """Largest difference of the merged model from residual + trained adapter."""
        merged = self.output / "merged"
        self.say(
            "\n6. merge residual and trained adapter into a plain checkpoint\n"
            f"   pissa-hub merge {self.decomposed} {adapter} -o {merged}\n"
        )
        self._say_if_finished(pissa_hub.merge(self.decomposed, adapter, merged))
        difference = _difference(self._embeddings(merged), self._embeddings(self.decomposed, adapter))
        self.say(f"embeddings differ from the trained model's by {difference:.1e}")
        return difference

    def _say_if_finished(self, result: Any) -> None:
        if result.was_finished:
            self.say("finished already\n")

    def _embeddings(self, base: Path, adapter: Path | None = None) -> Tensor:
        """Embeddings of the held-out sentences by a model on disk."""
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(base)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
        texts = [sentence for pair in self.pairs.held_out for sentence in pair]
        return embeddings(model, AutoTokenizer.from_pretrained(self.source), texts)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of entries."""
    return float((found - expected).abs().max())
