"""The whole way over the Hub, as a program that knows nothing but ids: ``python -m tests.hub.whole_way SOURCE FOLDER``.

Writes FOLDER/outputs.pt: step -> what the model computes there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import pissa_hub
from pissa_hub.cli import main

from ..helpers import example_inputs, outputs_of

MODEL, PISSA, LORA, ADAPTER_ONLY = "org/model", "org/PiSSA-model", "org/model-lora", "org/PiSSA-model-adapter"


def run(*arguments: object) -> None:
    """A command; ends the program unless it succeeds."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        if stopped.code:
            raise


def plain(place: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place)


def train(model: Any) -> None:
    """One step that shows in the outputs."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    tokens = example_inputs(model.get_base_model())["input_ids"]
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def whole_way(source: Path, folder: Path) -> dict[str, Tensor]:
    api, outputs = HfApi(), {}
    api.create_repo(MODEL)
    api.upload_folder(repo_id=MODEL, folder_path=source)
    outputs["original"] = outputs_of(plain(MODEL))

    run("decompose", MODEL, "-o", folder / "pissa", "--rank", 4)
    run("verify", folder / "pissa", "--source", MODEL)
    run("publish", folder / "pissa", PISSA)
    run("verify", PISSA, "--source", MODEL)

    model = PeftModel.from_pretrained(plain(PISSA), PISSA, subfolder="pissa_init", is_trainable=True)
    outputs["residual + initial"] = outputs_of(model)
    train(model)
    outputs["residual + trained"] = outputs_of(model)
    model.save_pretrained(folder / "trained")

    run("convert", folder / "trained", "--init", PISSA, "-o", folder / "lora")
    run("publish", folder / "lora", LORA)
    outputs["original + LoRA"] = outputs_of(PeftModel.from_pretrained(plain(MODEL), LORA))

    run("merge", PISSA, folder / "trained", "-o", folder / "merged")
    outputs["merged"] = outputs_of(plain(folder / "merged"))

    run("publish", folder / "pissa", ADAPTER_ONLY, "--adapter-only")
    run("restore", MODEL, "--init", ADAPTER_ONLY, "-o", folder / "restored")
    outputs["loaded"] = outputs_of(pissa_hub.load(MODEL, ADAPTER_ONLY))
    return outputs


if __name__ == "__main__":
    torch.save(whole_way(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[2], "outputs.pt"))
