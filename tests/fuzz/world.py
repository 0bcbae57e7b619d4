"""Valid documents of every kind, made by what makes them for users, and places to put their mutants."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pissa_hub.adapter.convert import convert
from pissa_hub.adapter.initial import Initial, open_initial
from pissa_hub.adapter.merge import merge
from pissa_hub.checkpoint.files import Pin
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.source import Checkpoint, read_checkpoint
from pissa_hub.checkpoint.writer import FileDigest
from pissa_hub.manifest import load_manifest
from pissa_hub.model.modules import ModelLayout, resolve_layout
from pissa_hub.pipeline.decompose import decompose
from pissa_hub.pipeline.receipts import Receipt, WorkFolder

from ..conftest import LLAMA, give_trained_weights
from ..model.zoo import COMPOSITE, DENSE, tiny_model

CARD = """---
license: other
license_name: llama-3.1
license_link: https://example.org/LICENSE
language:
- en
- 'no'
pipeline_tag: text-generation
tags: [x]
---
# A <b>model</b>
"""
MODULES = b"""[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
 {"idx": 1, "name": "1", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]"""
PLAN_DIGEST = "d" * 64
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "LlavaForConditionalGeneration",
)


class World:
    """Each thing is made when it is first asked for.

    Args:
        folder: empty; all lies in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def source(self) -> Path:
        """A sharded bf16 Llama with a card."""
        model = tiny_model("LlamaForCausalLM", **LLAMA)
        give_trained_weights(model)
        model.to(torch.bfloat16).save_pretrained(self.folder / "source", max_shard_size="64KB")
        (self.folder / "source" / "README.md").write_text(CARD)
        return self.folder / "source"

    @cached_property
    def decomposed(self) -> Path:
        decompose(self.source, self.folder / "decomposed", rank=2, targets="q_proj,v_proj", rank_pattern={"v_proj": 3})
        return self.folder / "decomposed"

    @cached_property
    def trained(self) -> Path:
        """The initial adapter with noise in every factor."""
        folder = Path(shutil.copytree(self.decomposed / "pissa_init", self.folder / "trained"))
        generator = torch.Generator().manual_seed(0)
        path = folder / "adapter_model.safetensors"
        tensors = {
            name: tensor + 0.1 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    @cached_property
    def converted(self) -> Path:
        convert(self.trained, self.decomposed, self.folder / "converted")
        return self.folder / "converted"

    @cached_property
    def merged(self) -> Path:
        merge(self.decomposed, self.trained, self.folder / "merged")
        return self.folder / "merged"

    @cached_property
    def initial(self) -> Initial:
        return open_initial(self.decomposed)

    @cached_property
    def residual(self) -> Checkpoint:
        return read_checkpoint(self.decomposed)

    @cached_property
    def layout(self) -> ModelLayout:
        """Of the source and of everything that is made from it."""
        tensors = {entry.name: entry.shape for _, entry in self.residual.tensors()}
        return resolve_layout(self.residual.config, tensors)

    @cached_property
    def unfinished(self) -> tuple[Path, str]:
        """A folder with the receipt of one shard, all that it vouches for, and the shard's name."""
        output = self.folder / "unfinished"
        shard = next(path.name for path in sorted(self.source.glob("*.safetensors")))
        work = WorkFolder(output, PLAN_DIGEST)
        work.create({"rank": 2}, [Pin("org/model", "main", "f" * 40)])
        shutil.copy(self.decomposed / shard, output / shard)
        shutil.copy(self.trained / "adapter_model.safetensors", work.adapter_part(shard))
        paths = (self.source / shard, output / shard, work.adapter_part(shard))
        read, written, part = (FileDigest(*sha256_file(path)) for path in paths)
        manifest = load_manifest(self.decomposed)
        work.write(Receipt(shard, read, written, part, manifest.weights[:2], manifest.environment))
        return output, shard

    @cached_property
    def configs(self) -> tuple[bytes, ...]:
        """config.json of several architectures, tiny, as transformers writes it."""
        return tuple(_config(name) for name in ARCHITECTURES)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Of all these architectures together."""
        return {
            name: tuple(tensor.shape)
            for architecture in ARCHITECTURES
            for name, tensor in tiny_model(architecture).state_dict().items()
        }

    @cached_property
    def scratch(self) -> Scratch:
        return Scratch(self.folder / "scratch")


class Scratch:
    """A folder that is filled anew for every input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self._files: set[str] = set()
        self._has_more = False

    def fill(self, files: Mapping[str, bytes], names: bytes = b"") -> Path:
        """A folder of these files, of those that have any bytes, and of empty ones by the names in a JSON list."""
        if self._has_more:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self._files.clear()
        wanted = {name for name, data in files.items() if data}
        for name in self._files - wanted:
            (self.folder / name).unlink()
        for name in wanted:
            (self.folder / name).write_bytes(files[name])
        self._files = wanted
        more = _names(names)
        self._has_more = bool(more)
        for name in more:
            path = self.folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except (OSError, ValueError):  # no name for this disk
                continue
        return self.folder


def _config(architecture: str) -> bytes:
    import transformers

    sizes = DENSE.get(architecture) or COMPOSITE[architecture]
    config = getattr(transformers, architecture).config_class(**sizes, architectures=[architecture])
    text: str = config.to_json_string()
    return text.encode()


def _names(data: bytes) -> list[str]:
    """Those of a JSON list that stay in the folder."""
    try:
        names = json.loads(data)
    except (ValueError, RecursionError):
        return []
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name for name in texts if not {"..", ""} & set(name.replace("\\", "/").split("/"))][:20]
