"""What several tests ask of folders, models and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pissa_hub.cli import main

ROOT = Path(__file__).parent.parent
MANIFEST = "pissa_manifest.json"
ADAPTER = "pissa_init/adapter_model.safetensors"
ADAPTER_CONFIG = "pissa_init/adapter_config.json"


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's shards, as stored."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def header_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def header_table(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(header_bytes(path)[8:])
    return table


def manifest_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return table


def write_record(path: Path, table: dict[str, Any]) -> None:
    """Write a changed manifest or other record so that it passes for one as it was written."""
    path.write_text(json.dumps({**table, "sha256": "0" * 64}, indent=1) + "\n")
    seal_again(path)


def seal_again(path: Path) -> None:
    """Give a changed record the hash of itself, as somebody who means to deceive would."""
    data = path.read_bytes()
    start = data.rindex(b'"sha256": "') + len(b'"sha256": "')
    before, after = data[:start], data[start + 64 :]
    sha256 = hashlib.sha256(before + b"0" * 64 + after).hexdigest()
    path.write_bytes(before + sha256.encode() + after)


def low_rank_of(folder: Path, record: dict[str, Any]) -> Tensor:
    """s B A of a weight from the files, float64, in the stored orientation."""
    config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    adapter = load_file(folder / ADAPTER)
    prefix = f"base_model.model.{record['module']}"
    A, B = (adapter[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
    scaling = record["alpha"] / (record["rank"] ** 0.5 if config["use_rslora"] else record["rank"])
    product = scaling * (B @ A)
    return product.t() if config["fan_in_fan_out"] else product


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error. Fails unless that is all that the command said."""
        assert self.code == 1, self
        assert self.out == "", self
        (line,) = self.err.splitlines()
        assert line.startswith("error: "), line
        fact, separator, remedy = line.removeprefix("error: ").rpartition("; ")
        assert fact, line
        assert separator, line
        assert remedy, line
        return line


def run_cli(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """The command line in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return Ran(int(stopped.value.code or 0), captured.out, captured.err)


def run_python(*arguments: object, **environment: str) -> Ran:
    """A Python process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def example_inputs(model: torch.nn.Module) -> dict[str, Tensor]:
    tokens = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "input_features": torch.randn(2, 8, 40, generator=generator),
    }
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {model.main_input_name: inputs[model.main_input_name], **decoder}


def outputs_of(model: torch.nn.Module) -> Tensor:
    """The first output, logits or hidden states, of a model on tokens, images or sound."""
    inputs = example_inputs(model.get_base_model() if hasattr(model, "get_base_model") else model)
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs)[0]
    return result


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())
