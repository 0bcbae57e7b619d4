"""What computes: the device, and how many workers share it."""

from __future__ import annotations

import torch

from pissa_hub.errors import PlanError

# Bytes that the matrices of all workers may take; a larger matrix has a single worker.
WORKSPACE_BUDGET = 512 << 20
# fp32 copies of a weight that its decomposition holds: itself, its transpose, basis and products.
_COPIES = 4


def pick_device(name: str) -> torch.device:
    """The device of a ``--device``. Raises PlanError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"device {name!r} cannot be used ({reason})", "use auto, cpu or cuda:N") from None
    return device


def worker_count(largest: int, device: torch.device) -> int:
    """How many weights to have in hand at once: one on a GPU, else what threads and memory allow.

    Follows from the largest weight, in elements, and the number of threads alone: each worker's share of the threads
    decides the last bits.
    """
    if device.type != "cpu":
        return 1
    return max(min(torch.get_num_threads(), WORKSPACE_BUDGET // max(_COPIES * 4 * largest, 1)), 1)
