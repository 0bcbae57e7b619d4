"""The arithmetic of a conversion, module by module, side by side."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pissa_hub.adapter.delta import Factors, change, product_norm
from pissa_hub.adapter.pairs import Pair, cosines_of, matrices_of
from pissa_hub.adapter.peft_files import Adapter, LoraModule, read_finite
from pissa_hub.checkpoint.header import TensorSpec
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.pipeline.threads import Team
from pissa_hub.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Spectrum:
    """The first look at a pair.

    Attributes:
        values: singular values of the change of each of its matrices, fp64, zero from the numerical rank on.
        initial_norm: ||s B A||_F before training; None where there was nothing.
    """

    values: tuple[Tensor, ...]
    initial_norm: float | None

    @property
    def norm(self) -> float:
        """||Delta W||_F."""
        return math.sqrt(sum(float(values.square().sum()) for values in self.values))

    @property
    def exact_rank(self) -> int:
        return max(int((values > 0).sum()) for values in self.values)

    def rank_within(self, error: float) -> int:
        """The smallest rank at which no matrix misses more than this share of its norm."""
        ranks = []
        for values in self.values:
            tails = values.square().flip(0).cumsum(0).flip(0)
            ranks.append(int((tails > error**2 * tails[0]).sum()))
        return max(ranks)


@dataclass(frozen=True)
class Written:
    """A module of the result: stored tensors by the part of their names, and ||Delta W - B A||_F."""

    tensors: Mapping[str, Tensor]
    error: float


class Worker:
    """The arithmetic on one device, with file handles of its own."""

    def __init__(self, trained: Adapter, initial: Adapter, device: torch.device, progress: Progress) -> None:
        self._device = device
        self._trained = TensorFile(trained.path, trained.header)
        self._initial = TensorFile(initial.path, initial.header)
        self._progress = progress

    def close(self) -> None:
        self._trained.__exit__()
        self._initial.__exit__()

    def spectrum(self, pair: Pair) -> Spectrum:
        self._progress.working_on(pair.trained.name)
        values, energy = [], 0.0
        for after, before in self._matrices(pair):
            values.append(change(after, before).singular_values().cpu())
            if before is not None:
                energy += (before.scaling * product_norm(before.B, before.A)) ** 2
        self._progress.advance(pair.trained.lora_A.nbytes + pair.trained.lora_B.nbytes)
        return Spectrum(tuple(values), math.sqrt(energy) if pair.initial else None)

    def cosines(self, pair: Pair) -> Tensor:
        """How far training turned the directions of every matrix; see ``pairs.cosines_of``."""
        return torch.cat(
            [
                cosines_of((after.A, after.B), (before.A, before.B))
                for after, before in self._matrices(pair)
                if before is not None
            ]
        )

    def factors(self, pair: Pair, rank: int, dtype: torch.dtype) -> Written:
        module = pair.trained
        self._progress.working_on(module.name)
        halves_A, halves_B, square = [], [], 0.0
        for after, before in self._matrices(pair):
            B, A, error = change(after, before).truncated(rank).stored(dtype, name=module.name)
            halves_A.append(A.cpu())
            halves_B.append(B.cpu())
            square += error**2
        self._progress.advance(module.lora_A.nbytes + module.lora_B.nbytes)
        tensors = {"lora_A": torch.cat(halves_A), "lora_B": torch.stack(halves_B, dim=2).flatten(1)}
        if module.bias is not None:
            tensors["bias"] = self._bias(pair, module.bias).to(dtype)
        return Written(tensors, math.sqrt(square))

    def _matrices(self, pair: Pair) -> Iterator[tuple[Factors, Factors | None]]:
        after = list(self._factors_of(pair.trained, self._trained))
        before = list(self._factors_of(pair.initial, self._initial)) if pair.initial else [None] * len(after)
        return zip(after, before, strict=True)

    def _factors_of(self, module: LoraModule, file: TensorFile) -> Iterator[Factors]:
        for A, B in matrices_of(module, file):
            yield Factors(A.to(self._device).double(), B.to(self._device).double(), module.scaling)

    def _bias(self, pair: Pair, trained: TensorSpec) -> Tensor:
        """lora_B's bias, whose scaling is 1 from now on."""
        bias = read_finite(self._trained, trained.name).double() * pair.trained.scaling
        if pair.initial is not None and pair.initial.bias is not None:
            bias -= read_finite(self._initial, pair.initial.bias.name).double() * pair.initial.scaling
        return bias


@contextmanager
def team_of(trained: Adapter, initial: Adapter, device: torch.device, progress: Progress) -> Iterator[Team[Worker]]:
    """A worker on a GPU, else one for each thread."""
    with ExitStack() as cleanup:

        def equip() -> Worker:
            worker = Worker(trained, initial, device, progress)
            cleanup.callback(worker.close)
            return worker

        yield cleanup.enter_context(Team(torch.get_num_threads() if device.type == "cpu" else 1, equip))


def in_order(team: Team[T], jobs: Iterable[Callable[[T], R]]) -> Iterator[R]:
    """The jobs' results in their order, a few of them ahead."""
    ahead: deque[Future[R]] = deque()
    for job in jobs:
        ahead.append(team.submit(job))
        if len(ahead) > team.size + 1:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
