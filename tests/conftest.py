"""Checkpoints to decompose: tiny, seeded, with the spectra of trained weights, saved as transformers saves them."""

from __future__ import annotations

import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .model.zoo import tiny_model

THREADS = 1
# Large enough for ranks of 4 and 8, small enough that a whole decomposition takes milliseconds.
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}
SHARDED = "64KB"

Factory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    """One: threads that wait for each other on a busy machine cost minutes."""
    yield from _with_threads(THREADS)


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Several weights in hand at once; the bytes depend on the number, here and in the processes that tests start."""
    yield from _with_threads(2)


def _with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(count))
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Thousands of small files are synced here, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell without job control starts what goes to the background with SIGINT ignored, and children inherit it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """``tiny_checkpoint(architecture, dtype=, shard_size=, **settings)``: a folder, for reading only.

    Args of the factory:
        architecture: a name in the zoo.
        dtype: of all stored weights.
        shard_size: as ``max_shard_size`` of save_pretrained; None for a single file.
        settings: of the model's config, over the zoo's.
    """
    made: dict[tuple[object, ...], Path] = {}

    def factory(
        architecture: str = "LlamaForCausalLM",
        *,
        dtype: torch.dtype = torch.float32,
        shard_size: str | None = None,
        **settings: Any,
    ) -> Path:
        if architecture.startswith("Llama"):
            settings = {**LLAMA, **settings}
        key = (architecture, dtype, shard_size, *sorted(settings.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(architecture)
            model = tiny_model(architecture, **settings)
            give_trained_weights(model)
            model.to(dtype).save_pretrained(made[key], max_shard_size=shard_size or "1GB")
        return made[key]

    return factory


@pytest.fixture
def source(tiny_checkpoint: Factory, tmp_path: Path) -> Path:
    """A copy of a sharded fp32 Llama, to be changed at will."""
    return Path(shutil.copytree(tiny_checkpoint(shard_size=SHARDED), tmp_path / "source"))


def give_trained_weights(model: torch.nn.Module) -> None:
    """Seeded values for every parameter; matrices get sigma_i ~ (i + 1)^-0.5 and random singular vectors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if parameter.dim() == 2:
                parameter.copy_(decaying(*parameter.shape, generator))
            else:
                noise = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def decaying(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) fp32, sigma_i ~ (i + 1)^-0.5, entries of root mean square 0.1."""
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    sigma = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
    sigma *= 0.1 * (rows * columns) ** 0.5 / sigma.norm()
    return ((left * sigma) @ right.t()).float()
