"""One target under many inputs, in a process of its own: coverage-guided by atheris, or by the mutator alone.

    python -m tests.fuzz.campaign TARGET FOLDER RUNS SECONDS SEED

prints the report as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from time import monotonic, process_time
from typing import TYPE_CHECKING, NoReturn

from .mutation import mutate

if TYPE_CHECKING:
    from .targets import Target

# What reads strangers' files, and is watched for new branches.
PARSERS = (
    "pissa_hub.adapter",
    "pissa_hub.checkpoint",
    "pissa_hub.hub.card",
    "pissa_hub.licenses",
    "pissa_hub.manifest",
    "pissa_hub.model",
    "pissa_hub.pipeline.plan",
    "pissa_hub.pipeline.receipts",
    "pissa_hub.recipes",
    "pissa_hub.schema",
    "pissa_hub.seal",
)
MAX_INPUT = 1 << 16
_POOL = 200
# More address space than this, beyond what the process has at the start, is a finding.
_MORE_MEMORY = 2 << 30
_SHRINK_SECONDS = 20.0
_OWN_MUTATIONS = 0.7
_FRESH_STARTS = 0.3


@dataclass
class Report:
    """What became of the inputs.

    Attributes:
        target: its name.
        engine: ``atheris`` or ``own``.
        accepted, refused: how many.
        seconds: of work.
        findings: what broke the contract -> the smallest input found that does, in hex.
        details: what broke the contract -> a traceback.
    """

    target: str
    engine: str
    accepted: int = 0
    refused: int = 0
    broken: int = 0
    seconds: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + self.broken


class Campaign:
    """Counts verdicts and keeps one small input for every finding."""

    def __init__(self, name: str, engine: str, target: Target) -> None:
        self.report = Report(name, engine)
        self._target = target
        self._start = monotonic()

    def run(self, data: bytes) -> bool:
        """Give the parser one input; whether it was accepted."""
        from .contract import ACCEPTED, REFUSED, Finding, judge

        verdict = judge(self._target.parse, data)
        self.report.accepted += verdict == ACCEPTED
        self.report.refused += verdict == REFUSED
        if isinstance(verdict, Finding):
            self.report.broken += 1
            if verdict.what not in self.report.findings:
                what = verdict.what
                small = shrink(data, lambda less: getattr(judge(self._target.parse, less), "what", "") == what)
                self.report.findings[what] = small.hex()
                self.report.details[what] = verdict.detail
        self.report.seconds = monotonic() - self._start
        return verdict == ACCEPTED

    def is_over(self, runs: int, seconds: float) -> bool:
        return self.report.inputs >= runs or self.report.seconds >= seconds


def shrink(data: bytes, is_same: Callable[[bytes], bool], seconds: float = _SHRINK_SECONDS) -> bytes:
    """A smaller input of which the same is true: ever shorter spans are cut out, as long as time allows."""
    stop, span = process_time() + seconds, max(len(data) // 2, 1)
    while span:
        start = 0
        while start < len(data):
            if process_time() > stop:
                return data
            less = data[:start] + data[start + span :]
            if is_same(less):
                data = less
            else:
                start += span
        span //= 2
    return data


def by_own_mutator(campaign: Campaign, seeds: tuple[bytes, ...], runs: int, seconds: float, seed: int) -> Report:
    """The seeds, then mutants: of the seeds, and of mutants that were accepted."""
    random, pool, waiting = Random(seed), list(seeds), list(seeds)
    while not campaign.is_over(runs, seconds):
        data = waiting.pop() if waiting else mutate(random.choice(pool), random)
        if campaign.run(data) and len(data) <= MAX_INPUT:
            pool.append(data)
            if len(pool) > _POOL:
                del pool[random.randrange(len(seeds), len(pool))]
    return campaign.report


def by_atheris(
    campaign: Campaign, seeds: tuple[bytes, ...], runs: int, seconds: float, seed: int, work: Path
) -> NoReturn:
    """libFuzzer does not return: the process ends with the last input."""
    import atheris

    corpus = work / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        campaign.run(data)
        if campaign.is_over(runs, seconds):
            _finish(campaign.report)

    def mutated(data: bytes, max_size: int, number: int) -> bytes:
        random = Random(number)
        # What libFuzzer keeps is mostly what was refused in a new way.
        start = random.choice(seeds) if random.random() < _FRESH_STARTS else data
        made = mutate(start, random) if random.random() < _OWN_MUTATIONS else b""
        return made if 0 < len(made) <= max_size else bytes(atheris.Mutate(data, max_size))

    options = [f"-seed={seed + 1}", f"-max_len={MAX_INPUT}", "-len_control=0", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup(["fuzz", *options, str(corpus)], one, custom_mutator=mutated, internal_libfuzzer=True)
    atheris.Fuzz()
    raise AssertionError("libFuzzer stopped by itself")


def main(name: str, folder: Path, runs: int, seconds: float, seed: int) -> None:
    engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    target = _instrumented_target(name, folder / "world") if engine == "atheris" else _target(name, folder / "world")
    _limit_memory()
    campaign = Campaign(name, engine, target)
    if engine == "atheris":
        by_atheris(campaign, target.seeds, runs, seconds, seed, folder)
    _finish(by_own_mutator(campaign, target.seeds, runs, seconds, seed))


def _instrumented_target(name: str, world: Path) -> Target:
    # What the parsers import is imported before, uninstrumented.
    import atheris
    import torch  # noqa: F401  # before all that is instrumented

    with atheris.instrument_imports(include=list(PARSERS)):
        return _target(name, world)


def _target(name: str, world: Path) -> Target:
    import torch

    from .targets import TARGETS
    from .world import World

    torch.set_num_threads(1)
    world.mkdir()
    return TARGETS[name].make(World(world))


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # no such limits, or no way to tell what is in use
        return
    limit = pages * resource.getpagesize() + _MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _finish(report: Report) -> NoReturn:
    print(json.dumps({**asdict(report), "inputs": report.inputs}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
