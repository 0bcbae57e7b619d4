"""PEFT's own way to a PiSSA checkpoint, as in its example: load, initialise, save adapter and residual.

    python -m benchmarks.peft_way SOURCE OUT --rank 64 --init pissa_niter_4

Prints one JSON object: seconds per phase and the peak resident set of this process.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from time import perf_counter

# The phases begin here, before anything large is imported.
_START = perf_counter()

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def convert(source: Path, out: Path, rank: int, init: str) -> dict[str, float]:
    """Write residual model and ``out/pissa_init``; seconds per phase."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    marks = [("import", perf_counter())]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    marks.append(("load", perf_counter()))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0,
        target_modules=TARGETS,
        init_lora_weights=init,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    marks.append(("initialise", perf_counter()))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(out / "pissa_init")
    marks.append(("save adapter", perf_counter()))
    wrapped.unload().save_pretrained(out)
    marks.append(("save residual", perf_counter()))
    starts = [_START, *(end for _, end in marks)]
    return {name: end - start for (name, end), start in zip(marks, starts, strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_way", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--init", default="pissa_niter_4", help="pissa or pissa_niter_N")
    options = parser.parse_args()
    phases = convert(options.source, options.out, options.rank, options.init)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"phases": phases, "peak_rss": peak}))


if __name__ == "__main__":
    main()
