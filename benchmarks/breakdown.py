"""Where the time of one decompose goes, and how far it is from the products that the arithmetic needs.

    python -m benchmarks.breakdown
    python -m benchmarks.breakdown --source FOLDER --rank 128

Stages run side by side on threads of their own, so their seconds add up to more than the wall time. The floor is the
time that all counted products with a weight, and the low-rank product of its residual, take at the GEMM rate that this
machine reaches on a large fp32 product.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

STARTED = perf_counter()

import torch  # noqa: E402  (its import is part of the start-up that is measured)

from benchmarks.processes import CACHE  # noqa: E402  # after the clock was started
from benchmarks.results import machine, markdown_table, save, versions  # noqa: E402  # after the clock was started
from pissa_hub.checkpoint import writer  # noqa: E402  # after the clock was started
from pissa_hub.checkpoint.reader import ShardReader  # noqa: E402  # after the clock was started
from pissa_hub.factorization.precision import exact_fp32  # noqa: E402  # after the clock was started
from pissa_hub.pipeline import decompose, device, share, workers  # noqa: E402  # after the clock was started
from pissa_hub.pipeline.settings import Settings  # noqa: E402  # after the clock was started


class Stopwatch:
    """Seconds per stage over all threads, and the products that the SVDs counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops = 0.0
        self._lock = Lock()

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Measure every call of ``owner.name`` from now on."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                with self._lock:
                    self.seconds[stage] += perf_counter() - start

        setattr(owner, name, timed)

    def count_products(self) -> None:
        """Count the floating-point operations of the SVDs and residuals from now on."""
        svd: Callable[..., Any] = getattr(workers, "truncated_svd")  # noqa: B009  (imported there, not exported)

        def counted(weight: torch.Tensor, rank: int, *arguments: Any, **options: Any) -> Any:
            result = svd(weight, rank, *arguments, **options)
            with self._lock:
                self.flops += 2.0 * weight.numel() * (result.products + rank)
            return result

        setattr(workers, "truncated_svd", counted)  # noqa: B010  (mypy guards the module's own attribute)


def gemm_rate(size: int = 2048) -> float:
    """fp32 operations per second of a large square product, the best of a few."""
    left = torch.randn(size, size)
    with exact_fp32():
        times = []
        for _ in range(8):
            start = perf_counter()
            torch.mm(left, left)
            times.append(perf_counter() - start)
    return 2 * size**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=CACHE / "llama-l10-h2048-i5632-250mb")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.source.exists():
        sys.exit(f"{arguments.source} does not exist: run python -m benchmarks.compare first, or give --source")
    output = CACHE / "breakdown"
    shutil.rmtree(output, ignore_errors=True)
    watch = Stopwatch()
    watch.seconds["start-up: imports"] = perf_counter() - STARTED
    watch.time(ShardReader, "read_into", "read and hash")
    watch.time(workers, "decode", "decode to fp32")
    watch.time(workers, "truncated_svd", "certified SVD")
    watch.count_products()
    watch.time(workers, "subtract", "residual and its deviation")
    watch.time(writer.ShardWriter, "write", "write and hash")
    watch.time(writer.ShardWriter, "commit", "force to disk")
    watch.time(decompose, "plan_decomposition", "start-up: plan, with transformers' imports")
    watch.time(share, "stream", "(wall) stream")
    watch.time(decompose, "finish", "(wall) finish")
    plan = decompose.plan_decomposition(arguments.source, Settings(rank=arguments.rank))
    count = device.worker_count(max(weight.stored.numel for weight in plan.weights), torch.device("cpu"))
    decompose.run(plan, output, [torch.device("cpu")])
    wall = perf_counter() - STARTED
    shutil.rmtree(output)
    rate = gemm_rate()
    rows = [[stage, f"{seconds:.2f}"] for stage, seconds in watch.seconds.items()]
    rows += [["(wall) whole", f"{wall:.2f}"], ["GEMM floor of the arithmetic", f"{watch.flops / rate:.2f}"]]
    summary = "\n\n".join(
        [
            f"decompose of {plan.input_bytes / 1e9:.2f} GB at rank {arguments.rank}, {count} weight(s) at a time. "
            f"{machine()}; {', '.join(f'{name} {number}' for name, number in versions('torch').items())}.",
            markdown_table(["stage", "seconds, all threads"], rows),
            f"{watch.flops / 1e12:.2f} TFLOP of products at {rate / 1e9:.0f} GFLOP/s; "
            f"the stream takes {watch.seconds['(wall) stream'] * rate / watch.flops:.1f} times that floor.",
        ]
    )
    print(summary)
    if arguments.json:
        result = {"machine": machine(), "rank": arguments.rank, "workers": workers, "wall": wall, "gemm_rate": rate}
        save(arguments.json, {**result, "flops": watch.flops, "seconds": dict(watch.seconds)}, summary)


if __name__ == "__main__":
    main()
