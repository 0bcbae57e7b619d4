"""Speed and error of truncated SVDs, per number of iterations: the PiSSA paper's table, with true errors.

    python -m benchmarks.svd_table
    python -m benchmarks.svd_table --shape 2048x2048 --rank 64 --device cuda

The floor is the time that the products counted for a method take at the best fp32 GEMM rate of the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import machine, markdown_table, save, small, versions
from benchmarks.spectra import ATTENTION_DECAY, MLP_DECAY, factor_errors, singular_values, trained_like
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.svd import SVDSettings, truncated_svd
from pissa_hub.factorization.workspace import Workspace

RANDOMIZED = (1, 2, 4, 8, 16)
LOWRANK = (4, 16)


@dataclass(frozen=True)
class Factors:
    """U (rows, r), s (r,), Vt (r, columns); columns multiplied by W or W^T; certified loss, sigma error."""

    U: Tensor
    s: Tensor
    Vt: Tensor
    products: int
    certified: tuple[float, float] | None = None


Method = Callable[[Tensor, int], Factors]


def ours(weight: Tensor, rank: int, settings: SVDSettings, workspace: Workspace) -> Factors:
    result = truncated_svd(weight, rank, settings, workspace=workspace)
    certified = (result.certificate.energy_loss, result.certificate.sigma_error)
    return Factors(result.U, result.s, result.Vt, result.products, certified)


def svd_lowrank(weight: Tensor, rank: int, niter: int) -> Factors:
    """What PEFT calls: two products to begin and to end, two more per iteration, no oversampling."""
    U, s, V = torch.svd_lowrank(weight, q=rank, niter=niter)
    return Factors(U, s, V.t(), (2 * niter + 2) * rank)


def full_svd(weight: Tensor, rank: int) -> Factors:
    U, s, Vt = torch.linalg.svd(weight, full_matrices=False)
    return Factors(U[:, :rank], s[:rank], Vt[:rank], 0)


def methods(tolerance: float, with_full: bool) -> dict[str, Method]:
    workspace = Workspace()
    table: dict[str, Method] = {
        "krylov, certified": partial(ours, settings=SVDSettings(tolerance=tolerance), workspace=workspace)
    }
    for niter in RANDOMIZED:
        settings = SVDSettings("randomized", niter=niter)
        table[f"randomized niter={niter}"] = partial(ours, settings=settings, workspace=workspace)
    for niter in LOWRANK:
        table[f"svd_lowrank niter={niter} (PEFT)"] = partial(svd_lowrank, niter=niter)
    if with_full:
        table["torch.linalg.svd (PEFT)"] = full_svd
    return table


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, until the device is done."""
    _wait(device)
    start = perf_counter()
    function()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(weight: Tensor) -> float:
    """Best fp32 FLOP/s of W X over the number of columns of X, and over the kernels that PyTorch offers."""
    device, (rows, columns) = weight.device, weight.shape
    best = 0.0
    for width in (32, 128, 512):
        block = torch.randn(columns, width, device=device)
        out = torch.empty(rows, width, device=device)
        product = partial(torch.mm, weight, block, out=out)
        with exact_fp32():
            fast = min(seconds(product, device) for _ in range(6))
        best = max(best, 2 * rows * columns * width / min(fast, *(seconds(product, device) for _ in range(6))))
    return best


def measure(
    weight: Tensor, rank: int, sigma: Tensor, rate: float, table: dict[str, Method], repeat: int
) -> list[dict[str, Any]]:
    """One row per method: errors, and the median time of calls after the first (the full SVD: of one)."""
    rows = []
    for name, method in table.items():
        times = []
        is_full = method is full_svd
        for _ in range(1 if is_full else repeat + 1):
            result: list[Factors] = []
            times.append(seconds(lambda: result.append(method(weight, rank)), weight.device))  # noqa: B023  # called before the loop goes on
        factors = result[0]
        errors = factor_errors(weight, factors.U.double() * factors.s.to(weight.device), factors.Vt, sigma)
        certified = factors.certified or (None, None)
        rows.append(
            {
                "method": name,
                "shape": list(weight.shape),
                "rank": rank,
                "seconds": median(times if is_full else times[1:]),
                "floor": 2 * weight.numel() * factors.products / rate if factors.products else None,
                "products": factors.products,
                "loss": errors.loss,
                "sigma_error": errors.sigma_error,
                "certified_loss": certified[0],
                "certified_sigma_error": certified[1],
            }
        )
    return rows


def errors_table(rows: list[dict[str, Any]]) -> str:
    header = ["method", "time s", "floor s", "time / floor", "products / r",
              "loss", "certified", "sigma error", "certified"]  # fmt: skip
    cells = []
    for row in rows:
        floor = row["floor"]
        cells.append(
            [
                row["method"],
                f"{row['seconds']:.3f}",
                f"{floor:.3f}" if floor else "-",
                f"{row['seconds'] / floor:.1f}" if floor else "-",
                f"{row['products'] / row['rank']:.1f}" if floor else "-",
                small(row["loss"]),
                small(row["certified_loss"]),
                small(row["sigma_error"]),
                small(row["certified_sigma_error"]),
            ]
        )
    return markdown_table(header, cells)


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.svd_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", type=_shape, action="append", help="ROWSxCOLUMNS, repeatable; default 4096x4096, 2048x5632"
    )
    parser.add_argument("--rank", type=int, action="append", help="repeatable; default 16 and 128, as in the paper")
    parser.add_argument("--decay", type=float, help="of the spectrum; default attention's if square, else an MLP's")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the certified method")
    parser.add_argument("--no-full", dest="full", action="store_false", help="leave the full SVD out (slow)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results; the table goes beside it as .md")
    options = parser.parse_args()
    table, parts = methods(options.tolerance, options.full), [_setting(options.device)]
    results: list[dict[str, Any]] = []
    print(parts[0])
    for rows, columns in options.shape or [(4096, 4096), (2048, 5632)]:
        decay = options.decay or (ATTENTION_DECAY if rows == columns else MLP_DECAY)
        weight = trained_like(rows, columns, decay, torch.Generator().manual_seed(0)).bfloat16().float()
        weight = weight.to(options.device)
        sigma, rate = singular_values(weight), gemm_rate(weight)
        for rank in options.rank or [16, 128]:
            found = measure(weight, rank, sigma, rate, table, options.repeat)
            title = f"## {rows}x{columns}, rank {rank}, decay {decay}, GEMM at {rate / 1e9:.0f} GFLOP/s"
            parts.append(f"{title}\n\n{errors_table(found)}")
            print(f"\n{parts[-1]}", flush=True)
            results += found
    if options.json:
        save(options.json, {"setting": parts[0], "rows": results}, "\n\n".join(parts))


def _setting(device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    found = ", ".join(f"{name} {number}" for name, number in versions("pissa_hub", "torch").items())
    return f"{where}; {found}; {torch.get_num_threads()} threads"


if __name__ == "__main__":
    with torch.inference_mode():
        main()
