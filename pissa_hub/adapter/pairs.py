"""Which module of a trained adapter started from which of the initial one, and whether it really did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pissa_hub.adapter.initial import Initial, looks_initial
from pissa_hub.adapter.peft_files import CONVERSION_NAME, Adapter, LoraModule, read_finite
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.errors import AdapterError
from pissa_hub.manifest import MANIFEST_NAME, load_manifest

# Training turns a row of A and a column of B by far less than a right angle. Those of another model are perpendicular;
# those of another decomposition of the same model have signs of their own, every other one reversed.
_LEAST_MEAN_COSINE = 0.2
_REVERSED = -0.5
_MOST_REVERSED = 0.1


@dataclass(frozen=True)
class Pair:
    """A trained module and what it started from; ``initial`` is None where training added the module."""

    trained: LoraModule
    initial: LoraModule | None


def pair_up(adapter: Adapter, initial: Initial) -> tuple[Pair, ...]:
    """Every module of a trained adapter with its initial state, by names and shapes.

    Raises:
        AdapterError: the adapter was converted before, or the two do not fit.
    """
    _refuse_other_base(adapter, initial)
    before = initial.adapter.modules
    whole = {key.removesuffix(".weight") for key in adapter.saved.values()}
    for name in before:
        if name not in adapter.modules and name not in whole:
            near = next((other for other in adapter.modules if other.endswith(f".{name}")), None)
            hint = f" (but {near}: trained in another class of model?)" if near else ""
            raise AdapterError(
                f"{adapter.path} lacks {name}, which {initial.adapter.path} has{hint}",
                "give the initial state that this very adapter was trained from",
            )
    if adapter.config.initialisation or initial.adapter.config.initialisation:
        for name in adapter.modules.keys() - before:
            raise AdapterError(
                f"{initial.adapter.path} lacks {name}, which {adapter.path} has and PEFT initialised by PiSSA",
                "give the whole initial state that this very adapter was trained from",
            )
    pairs = tuple(Pair(module, before.get(name)) for name, module in adapter.modules.items())
    for pair in pairs:
        if pair.trained.name in whole:
            raise AdapterError(
                f"{adapter.path} holds both factors and a whole weight of {pair.trained.name}",
                "train it either as LoRA or in modules_to_save",
            )
        if pair.initial is not None:
            _require_same_shapes(adapter, initial, pair.trained, pair.initial)
    return pairs


def require_descent(cosines: list[Tensor], initial: Initial) -> None:
    """Refuse an adapter that was not trained from the initial one, by its content.

    Args:
        cosines: of every module that has an initial state, see :func:`cosines_of`.
        initial: the supposed start.

    Raises:
        AdapterError: as it says.
    """
    if not cosines:
        return
    known = torch.cat(cosines)
    if not len(known):
        raise AdapterError(
            f"the factors of this adapter, or of {initial.adapter.path}, are all zero",
            "give the adapter as the trainer had it in memory",
        )
    mean, reversed_share = float(known.mean()), float((known < _REVERSED).float().mean())
    if mean < _LEAST_MEAN_COSINE or reversed_share > _MOST_REVERSED:
        raise AdapterError(
            f"this adapter was not trained from {initial.adapter.path}: the directions of its factors agree by "
            f"{mean:.2f} of 1 and {reversed_share:.0%} are reversed",
            "give the initial state of the very base that it was trained on (or --trust-init, if you know better)",
        )


def cosines_of(trained: tuple[Tensor, Tensor], initial: tuple[Tensor, Tensor]) -> Tensor:
    """Cosines of the rows of A and the columns of B before and after training, zero ones left out, fp32.

    Args:
        trained, initial: A (r, in) and B (out, r) of each.
    """
    (A, B), (A_before, B_before) = trained, initial
    found = []
    for after, before in ((A, A_before), (B.t(), B_before.t())):
        norms = torch.linalg.vector_norm(after, dim=1) * torch.linalg.vector_norm(before, dim=1)
        products = (after * before).sum(1)
        found.append((products / norms)[norms > 0])
    return torch.cat(found).float().cpu()


def matrices_of(module: LoraModule, file: TensorFile) -> Iterator[tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) of every matrix that the module adapts, fp32: one, or one for each expert.

    Raises:
        AdapterError: one of them holds NaN or infinity.
    """
    A, B = read_finite(file, module.lora_A.name), read_finite(file, module.lora_B.name)
    A = A.view(module.experts, module.rank, module.in_features)
    B = B.view(module.out_features, module.rank, module.experts)
    for expert in range(module.experts):
        yield A[expert], B[:, :, expert]


def _refuse_other_base(adapter: Adapter, initial: Initial) -> None:
    """By what stands beside the adapter: a conversion's record, or the manifest of the base that it names."""
    if (adapter.folder / CONVERSION_NAME).exists():
        raise AdapterError(f"{adapter.folder} is converted already", "load it on the original base as it is")
    if adapter.path.resolve() == initial.adapter.path.resolve():
        return
    if initial.manifest is None and looks_initial(adapter.folder) and not looks_initial(initial.adapter.folder):
        raise AdapterError(
            f"{adapter.folder} is an initial state, and {initial.adapter.folder} is not known as one",
            "give the trained adapter first and what it started from with --init",
        )
    base = adapter.config.table.get("base_model_name_or_path")
    if initial.manifest is None or not base or not _is_decomposed(Path(base)):
        return
    if load_manifest(Path(base)).files != initial.manifest.files:
        raise AdapterError(
            f"{adapter.folder} was trained on {base}, which is another decomposition than {initial.root}",
            f"give --init {base}",
        )


def _is_decomposed(folder: Path) -> bool:
    try:
        return (folder / MANIFEST_NAME).is_file()
    except OSError:  # another machine's path may lie in a folder that is closed on this one
        return False


def _require_same_shapes(adapter: Adapter, initial: Initial, trained: LoraModule, before: LoraModule) -> None:
    same_shapes = trained.lora_A.shape == before.lora_A.shape and trained.lora_B.shape == before.lora_B.shape
    if same_shapes and trained.rank == before.rank and trained.is_embedding == before.is_embedding:
        return
    if trained.rank == 2 * before.rank and trained.in_features == before.in_features:
        with TensorFile(adapter.path, adapter.header) as after, TensorFile(initial.adapter.path) as start:
            second_half = after.read(trained.lora_A.name)[before.rank :]
            if torch.allclose(second_half, start.read(before.lora_A.name), rtol=1e-2, atol=0):
                raise AdapterError(
                    f"{adapter.folder} was converted by PEFT: it holds the initial factors beside the trained ones",
                    "load it on the original base as it is, or give the adapter before that conversion",
                )
    raise AdapterError(
        f"{trained.name} has A {list(trained.lora_A.shape)} and B {list(trained.lora_B.shape)} in {adapter.path}, "
        f"and A {list(before.lora_A.shape)} and B {list(before.lora_B.shape)} in {initial.adapter.path}",
        "give the initial state that this very adapter was trained from",
    )
