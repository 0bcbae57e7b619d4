"""What computes: the devices, how many workers share one, and what of it the exact bytes depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from pissa_hub.errors import PlanError
from pissa_hub.ranks import local_rank

# Bytes that the matrices of all workers may take; a larger matrix has a single worker.
WORKSPACE_BUDGET = 512 << 20
# fp32 copies of a weight that its decomposition holds: itself, its transpose, basis and products.
_COPIES = 4


def pick_device(name: str) -> torch.device:
    """The device of a ``--device``. Raises PlanError for one that is not there.

    Of several processes on one machine, each has its own GPU, as far as there are enough, unless ``name`` has a number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank() % max(torch.cuda.device_count(), 1)}"
    return _opened(name)


def _opened(name: str) -> torch.device:
    """A device that has done something."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"device {name!r} cannot be used ({reason})", "use auto, cpu or cuda:N") from None
    return device


def pick_devices(name: str, names: str | None = None) -> tuple[torch.device, ...]:
    """Where to compute: one device, or one for each of several processes.

    Args:
        name: of a ``--device``.
        names: of a ``--devices``, which goes before it: names, or numbers of GPUs, with commas between, or ``all`` for
            every GPU.

    Raises:
        PlanError: one of them is not there.
    """
    if names is None:
        return (pick_device(name),)
    if names == "all":
        names = ",".join(f"cuda:{number}" for number in range(torch.cuda.device_count())) or "cpu"
    chosen = [name.strip() for name in names.split(",")]
    if not all(chosen):
        raise PlanError(f"devices {names!r} cannot be used", "give names with commas between, such as cuda:0,cuda:1")
    chosen = [f"cuda:{name}" if name.isdecimal() else name for name in chosen]
    # One of the other GPUs is opened by the process that is to use it: here it would only cost memory there.
    others = {f"cuda:{number}" for number in range(torch.cuda.device_count())} - {chosen[0]}
    return tuple(torch.device(name) if name in others else pick_device(name) for name in chosen)


def worker_count(largest: int, device: torch.device) -> int:
    """How many weights to have in hand at once: one on a GPU, else what threads and memory allow.

    Follows from the largest weight, in elements, and the number of threads alone: each worker's share of the threads
    decides the last bits.
    """
    if device.type != "cpu":
        return 1
    return max(min(torch.get_num_threads(), WORKSPACE_BUDGET // max(_COPIES * 4 * largest, 1)), 1)


def described(device: torch.device) -> str:
    """Kind and model of a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def environment() -> dict[str, str | int]:
    """What exact bytes depend on beside source, settings and device; of the calling thread."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
    }
