"""An adapter as PEFT saves it: its modules, and all the rest that its file may hold. From headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from torch import Tensor

from pissa_hub.adapter.config import CONFIG_NAME, LoraConfig, read_config
from pissa_hub.checkpoint.encoding import require_plain
from pissa_hub.checkpoint.header import Header, TensorSpec, read_header
from pissa_hub.checkpoint.strict_json import shown
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.errors import AdapterError, MatrixError

WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)
CONVERSION_NAME = "pissa_conversion.json"
PREFIX = "base_model.model."

# Some trainers leave the adapter's name in: lora_A.default.weight.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(?(embedding)|\.weight)"
)
_BIAS = re.compile(r"(?P<module>.+)\.lora_B(\.default)?\.bias")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
_BASE_WEIGHT = re.compile(r"(?P<module>.+)\.base_layer\.weight")
# Cards, configs and messages quote these names.
_PATH = re.compile(r"[\w:@+-]+(\.[\w:@+-]+)*")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module.

    Attributes:
        name: its path in memory; of the inner of two parameters of one module it ends with ``.base_layer``.
        is_embedding: whether A and B are an embedding's, W^T (dim, rows) taking the place of W.
        lora_A: as stored: (r, in), (r, in, k, k) of a convolution, or (experts r, in), experts first.
        lora_B: as stored: (out, r), (out, r, 1, 1), or (out, r experts), experts last.
        rank: r.
        scaling: s of s B A.
        bias: lora_B's own bias (out,), scaled by s too; usually None.
        magnitude: DoRA's (out,); usually None.
    """

    name: str
    is_embedding: bool
    lora_A: TensorSpec
    lora_B: TensorSpec
    rank: int
    scaling: float
    bias: TensorSpec | None
    magnitude: TensorSpec | None

    @property
    def experts(self) -> int:
        """Matrices that the module's parameter holds; 1 but for fused experts."""
        return self.lora_A.shape[0] // self.rank

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def in_features(self) -> int:
        """Elements that a row of A has; of a convolution channels times kernel."""
        return prod(self.lora_A.shape[1:])

    @property
    def is_convolution(self) -> bool:
        return len(self.lora_A.shape) > 2


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        folder: where it lies.
        config: its adapter_config.json.
        header: of its adapter_model.safetensors.
        modules: by name, in the order of the file's names.
        saved: stored name -> key in memory of what is kept whole: modules_to_save, biases, trained tokens.
        base_weights: stored names of copies of the base's own weights, which belong to no adapter.
    """

    folder: Path
    config: LoraConfig
    header: Header = field(repr=False)
    modules: Mapping[str, LoraModule] = field(repr=False)
    saved: Mapping[str, str] = field(repr=False)
    base_weights: tuple[str, ...] = field(repr=False)

    @property
    def path(self) -> Path:
        """Its weights."""
        return self.folder / WEIGHTS_NAME


def open_adapter(folder: Path) -> Adapter:
    """Read the headers of an adapter.

    Raises:
        AdapterError: the folder holds no adapter, or one that PEFT would not have saved.
        HeaderError: its safetensors file is malformed.
    """
    _require_files(folder)
    config = read_config(folder)
    header = read_header(folder / WEIGHTS_NAME)
    modules, saved, base_weights = _sorted_out(folder, header, config)
    if not modules:
        raise AdapterError(f"{folder / WEIGHTS_NAME} holds no lora_A and lora_B", "give a LoRA adapter")
    return Adapter(folder, config, header, modules, saved, base_weights)


def read_finite(file: TensorFile, name: str) -> Tensor:
    """A tensor of an adapter in fp32. Raises AdapterError if it holds NaN or infinity."""
    tensor = file.read(name)
    if not bool(tensor.isfinite().all()):
        raise AdapterError(
            f"{name} in {file.path} holds NaN or infinity", "give a checkpoint from before training diverged"
        )
    return tensor


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder", f"give the folder of an adapter, with {CONFIG_NAME}")
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        remedy = (
            f"give one of its adapters: {', '.join(str(folder / name) for name in inside)}"
            if inside
            else "give the folder that PEFT's save_pretrained wrote"
        )
        raise AdapterError(f"{folder} has no {CONFIG_NAME}", remedy)
    if not (folder / WEIGHTS_NAME).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterError(
            f"{folder} has no {WEIGHTS_NAME}" + (" but a pickle, which is never opened" if pickled else ""),
            "load the adapter with PEFT and save it with safe_serialization=True",
        )


def _sorted_out(
    folder: Path, header: Header, config: LoraConfig
) -> tuple[dict[str, LoraModule], dict[str, str], tuple[str, ...]]:
    """Modules; what is kept whole; copies of base weights."""
    sides: dict[str, dict[str, TensorSpec]] = {"A": {}, "B": {}, "bias": {}, "magnitude": {}}
    embeddings: set[str] = set()
    saved: dict[str, str] = {}
    base_weights = []
    path = folder / WEIGHTS_NAME
    for entry in header.entries:
        key = entry.name.removeprefix(PREFIX)
        if not _PATH.fullmatch(key):
            raise AdapterError(
                f"{path} holds {shown(entry.name)}, which is no parameter's path", "save the adapter again"
            )
        if match := _FACTOR.fullmatch(key):
            side, name = sides[match["side"]], match["module"]
            if match["embedding"]:
                embeddings.add(name)
        elif match := _BIAS.fullmatch(key):
            side, name = sides["bias"], match["module"]
        elif match := _MAGNITUDE.fullmatch(key):
            side, name = sides["magnitude"], match["module"]
        elif _BASE_WEIGHT.fullmatch(key):
            base_weights.append(entry.name)
            continue
        elif ".lora_" in key:
            raise AdapterError(f"{path} holds {entry.name}, which is no LoRA's", "merge it with PEFT")
        else:
            if f"{PREFIX}{entry.name}" in header:
                raise AdapterError(f"{path} holds {key} twice", "save the adapter again")
            saved[entry.name] = key.replace(".base_layer.", ".")
            continue
        if name in side:
            raise AdapterError(f"{path} holds the factors of {name} twice", "save the adapter again")
        side[name] = entry.spec
    if config.table.get("bias", "none") == "none":
        # An adapted output head that is saved whole brings its bias along.
        for stored in [stored for stored in saved if stored.endswith(".base_layer.bias")]:
            del saved[stored]
            base_weights.append(stored)
    names = sorted({name for side in sides.values() for name in side})
    try:
        config.require_affordable(names)
    except ValueError as error:
        raise AdapterError(
            f"rank_pattern or alpha_pattern in {folder / CONFIG_NAME} {error}", "name modules instead"
        ) from None
    modules = {name: _module(folder, config, name, sides, is_embedding=name in embeddings) for name in names}
    return modules, saved, tuple(base_weights)


def _module(
    folder: Path, config: LoraConfig, name: str, sides: Mapping[str, Mapping[str, TensorSpec]], *, is_embedding: bool
) -> LoraModule:
    path = folder / WEIGHTS_NAME
    lora_A, lora_B, bias = (sides[side].get(name) for side in ("A", "B", "bias"))
    if lora_A is None or lora_B is None:
        raise AdapterError(f"{path} lacks lora_{'A' if lora_A is None else 'B'} of {name}", "save the adapter again")
    for spec in (lora_A, lora_B, *([bias] if bias else [])):
        try:
            require_plain(spec)
        except MatrixError as error:
            raise AdapterError(f"{path}: {error.fact}", "save the adapter in float32") from None
        if 0 in spec.shape or (len(spec.shape) < 2 and spec != bias):
            raise AdapterError(
                f"{path} holds {spec.name} of shape {list(spec.shape)}: the trainer's shards were not gathered",
                "gather them before save_pretrained",
            )
    parameters = list(_parameters_of(name, config)) if config.target_parameters else []
    names = parameters or [name]
    values = {(config.rank_of(key), config.scaling_of(key)) for key in names}
    if len(values) > 1:
        raise AdapterError(
            f"rank_pattern or alpha_pattern in {folder / CONFIG_NAME} tells apart {' and '.join(parameters)}, "
            "whose tensors do not say which is which",
            "merge it with PEFT",
        )
    rank, scaling = values.pop()
    module = LoraModule(name, is_embedding, lora_A, lora_B, rank, scaling, bias, sides["magnitude"].get(name))
    fits = lora_A.shape[0] % rank == 0 and lora_B.shape[1] == lora_A.shape[0] and prod(lora_B.shape[2:]) == 1
    if not fits or (module.experts > 1 and not parameters):
        raise AdapterError(
            f"{path} holds {lora_A.name} of shape {list(lora_A.shape)} and lora_B of shape {list(lora_B.shape)}, "
            f"where {CONFIG_NAME} says rank {rank}",
            "give the config that was saved with these weights",
        )
    if bias is not None and bias.shape != (module.out_features,):
        raise AdapterError(
            f"{path} holds {bias.name} of shape {list(bias.shape)}, where {name} has {module.out_features} outputs",
            "save the adapter again",
        )
    return module


def _parameters_of(name: str, config: LoraConfig) -> Iterator[str]:
    """Full paths of the ``target_parameters`` that this entry of the file may be of."""
    owner = name.removesuffix(".base_layer")
    for parameter in config.target_parameters:
        module = parameter.rpartition(".")[0]
        if f".{owner}".endswith(f".{module}") or owner.endswith(f".{module}"):
            yield f"{owner}.{parameter.rpartition('.')[2]}"
