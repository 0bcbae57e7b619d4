"""Contrastive training of a sentence encoder: each sentence should lie nearer to its neighbour than to all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from pissa_hub.demo.text import Pair

MAX_TOKENS = 32
BATCH = 32
SEED = 0
_TEMPERATURE = 0.05
_WARM_UP = 0.1
_CHUNK = 64


@dataclass(frozen=True)
class Score:
    """How well an encoder finds each pair's second sentence among all second sentences.

    Attributes:
        loss: mean cross entropy of the cosines over the temperature, in nats.
        recall: share of the pairs whose second sentence is the nearest.
    """

    loss: float
    recall: float


def encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Embeddings (texts, width) of length 1: the mean of the token vectors, which is how the model was trained."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)


def embeddings(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Embeddings as ``encode`` makes them, without dropout and gradients."""
    model.eval()
    with torch.no_grad():
        chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]
        return torch.cat([encode(model, tokenizer, chunk) for chunk in chunks])


def score(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Score:
    """The model's score on pairs, every second sentence a candidate for every first."""
    first, second = (embeddings(model, tokenizer, side) for side in zip(*pairs, strict=True))
    similarity = first @ second.T / _TEMPERATURE
    own = torch.arange(len(pairs))
    recall = (similarity.argmax(1) == own).float().mean()
    return Score(float(cross_entropy(similarity, own)), float(recall))


def train(model: Any, tokenizer: Any, pairs: Sequence[Pair], *, learning_rate: float, steps: int) -> list[float]:
    """Train what is trainable by InfoNCE with in-batch negatives; AdamW, linear warm-up and decay.

    Batches and dropout follow from the number of pairs alone, so that methods can be compared step by step.

    Args:
        model: encoder with ``last_hidden_state``.
        tokenizer: its own.
        pairs: BATCH of them or more.
        learning_rate: the peak.
        steps: batches to train on, in as many passes as that takes.

    Returns:
        The loss of each step's batch before the step, in nats.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for chosen in islice(_batches(len(pairs)), steps):
            first, second = zip(*(pairs[index] for index in chosen), strict=True)
            vectors = encode(model, tokenizer, [*first, *second])
            loss = cross_entropy(vectors[:BATCH] @ vectors[BATCH:].T / _TEMPERATURE, torch.arange(BATCH))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


def _batches(count: int) -> Iterator[list[int]]:
    """Full batches of indices below ``count``, shuffled anew for each pass, without end."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[start : start + BATCH] for start in range(0, count - BATCH + 1, BATCH))
