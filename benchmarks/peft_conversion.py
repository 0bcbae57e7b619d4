"""PEFT's own conversion of a PiSSA adapter: the model in memory, the adapter on it, saved against the initial one.

    python -m benchmarks.peft_conversion ADAPTERS OUT --layers 32 --hidden 4096 --intermediate 11008

The base's values do not matter to the conversion; it is made in memory rather than read, which spares PEFT that time.
Prints one JSON object: seconds per phase.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

_START = perf_counter()


def convert(adapters: Path, out: Path, layers: int, hidden: int, intermediate: int) -> dict[str, float]:
    """Write the converted adapter; seconds per phase."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig

    marks = [("import", perf_counter())]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    marks.append(("make the base", perf_counter()))
    wrapped = PeftModel.from_pretrained(model, adapters / "trained", is_trainable=True)
    marks.append(("load the adapter", perf_counter()))
    wrapped.save_pretrained(out, path_initial_model_for_weight_conversion=str(adapters / "init"))
    marks.append(("convert and save", perf_counter()))
    starts = [_START, *(end for _, end in marks)]
    return {name: end - start for (name, end), start in zip(marks, starts, strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_conversion", description=__doc__)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    options = parser.parse_args()
    phases = convert(options.adapters, options.out, options.layers, options.hidden, options.intermediate)
    print(json.dumps({"phases": phases}))


if __name__ == "__main__":
    main()
