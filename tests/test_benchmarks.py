"""The benchmarks that reach into the program still find there what they measure."""

from __future__ import annotations

from .conftest import Factory
from .helpers import run_python


def test_breakdown_sees_every_stage(tiny_checkpoint: Factory) -> None:
    ran = run_python("-m", "benchmarks.breakdown", "--source", tiny_checkpoint(), "--rank", 4)
    assert ran.code == 0, ran.err
    stages = [line.split("|")[1].strip() for line in ran.out.splitlines() if line.startswith("| ")]
    assert {"read and hash", "certified SVD", "residual and its deviation", "(wall) stream"} <= set(stages)


def test_distribution_shares_out_every_shard() -> None:
    ran = run_python("-m", "benchmarks.distribution", "--workers", 3, "--shards", 30, "--seconds", 0.01)
    assert ran.code == 0, ran.err
    assert ran.out.count("3 workers, 30 shards") == 2
