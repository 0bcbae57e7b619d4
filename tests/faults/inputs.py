"""What the commands are given: a checkpoint of several shards, what decompose makes of it, and a trained adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.checkpoints import Shape, write_checkpoint

from .server import Run, Server

# Two large shards, which several processes cut; one small one, and one without a target.
SHAPE = Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=300, tied=False)
SHARD_BYTES = 70_000
# Carried over, one of them from a folder in a folder.
CARRIED = {"tokenizer_config.json": b"{}\n", "extra/deep/notes.json": b'{"a": 1}\n', "LICENSE": b"All of it.\n" * 20}
RANK = 4
COMMANDS = ("decompose", "merge", "restore", "convert")
MARKERS = {
    "decompose": "pissa_manifest.json",
    "restore": "pissa_manifest.json",
    "merge": "pissa_merge.json",
    "convert": "pissa_conversion.json",
}


@dataclass(frozen=True)
class Inputs:
    """Folders for reading only."""

    source: Path
    decomposed: Path
    adapter: Path

    @property
    def folders(self) -> tuple[str, ...]:
        return str(self.source), str(self.decomposed), str(self.adapter)

    def arguments(self, command: str, output: Path) -> tuple[str, ...]:
        """Of the command line."""
        given = {
            "decompose": (self.source, "--rank", RANK),
            "merge": (self.decomposed, self.adapter),
            "restore": (self.source, "--init", self.decomposed),
            "convert": (self.adapter, "--init", self.decomposed),
        }
        return (command, *map(str, given[command]), "-o", str(output), "--device", "cpu")


def write_source(folder: Path) -> Path:
    """The checkpoint to decompose."""
    write_checkpoint(folder, SHAPE, SHARD_BYTES)
    for name, data in CARRIED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_inputs(server: Server, source: Path, folder: Path) -> Inputs:
    """Decompose ``source`` and train what comes of it, after a fashion: every factor moves by a tenth."""
    inputs = Inputs(source, folder / "decomposed", folder / "adapter")
    (ended,) = server.run(Run(inputs.arguments("decompose", inputs.decomposed), str(folder)))
    if ended.code:
        raise RuntimeError(ended.err)
    shutil.copytree(inputs.decomposed / "pissa_init", inputs.adapter)
    weights, generator = inputs.adapter / "adapter_model.safetensors", np.random.default_rng(0)
    tensors = load_file(weights)
    for name, tensor in sorted(tensors.items()):
        noise = generator.standard_normal(tensor.shape, dtype=np.float32)
        tensors[name] = tensor + np.float32(0.1) * tensor.std() * noise
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads((inputs.adapter / "adapter_config.json").read_bytes())
    (inputs.adapter / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": True}))
    return inputs


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file, hidden ones too; folders that hold nothing end in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found
