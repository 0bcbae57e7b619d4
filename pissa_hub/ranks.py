"""Which of several processes this is, as torchrun, SLURM's srun or ``--devices`` say in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pissa_hub.errors import PlanError

# srun names no port: one that follows from the job and its step, among those that are free for anybody's use.
_SLURM_PORTS = range(20000, 30000)
_FIRST_HOST = re.compile(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?")


@dataclass(frozen=True)
class Rank:
    """One of several processes that run the same command.

    Attributes:
        rank: 0 to ``world_size`` - 1; rank 0 leads.
        world_size: how many there are to be.
        address, port: of the rendezvous store.
        hosts_store: whether this process is the store's server; under torchrun the agent is.
    """

    rank: int
    world_size: int
    address: str
    port: int
    hosts_store: bool

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def environment(self) -> dict[str, str]:
        """The variables from which :func:`find_rank` makes it again, in a process that is not the server."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_rank(environment: Mapping[str, str] | None = None) -> Rank | None:
    """This process among several; None if it is the only one.

    ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` as torch.distributed has them; without ``RANK``, what
    SLURM sets in a step of several tasks, and there alone: a batch script is one process, whatever its job was given.

    Args:
        environment: the process's own by default.

    Raises:
        PlanError: the variables are not what they should be.
    """
    found = dict(os.environ if environment is None else environment)
    if "RANK" not in found and found.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found = {**_from_slurm(found), **found}
    if "RANK" not in found or found.get("WORLD_SIZE", "1") == "1":
        return None
    rank, world_size = _natural(found, "RANK"), _natural(found, "WORLD_SIZE")
    if rank >= world_size:
        raise PlanError(f"RANK {rank} of WORLD_SIZE {world_size} cannot be", "set RANK from 0 to WORLD_SIZE - 1")
    if not found.get("MASTER_ADDR"):
        raise PlanError("RANK is set, but MASTER_ADDR is not", "start with torchrun, or set both, or none")
    return Rank(
        rank=rank,
        world_size=world_size,
        address=found["MASTER_ADDR"],
        port=_natural(found, "MASTER_PORT"),
        hosts_store=rank == 0 and found.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def is_heard() -> bool:
    """Whether what this process prints is what its user reads: of several, rank 0 speaks for all."""
    try:
        rank = find_rank()
    except PlanError:  # said by whoever shares work
        return True
    return rank is None or rank.leads


def local_rank() -> int:
    """Position among the processes on this machine; 0 if that is not said."""
    value = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    return int(value) if value.isascii() and value.isdecimal() else 0


def _from_slurm(found: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables for a step that srun started; the store is on the step's first machine."""
    job, step = (_natural({name: "0", **found}, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {
        "RANK": found.get("SLURM_PROCID", ""),
        "WORLD_SIZE": found["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": _first_host(found.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(_SLURM_PORTS[(job * 16 + step) % len(_SLURM_PORTS)]),
    }


def _first_host(nodes: str) -> str:
    """The first name of a SLURM host list: ``gpu[03-05,9]-a,x`` begins with ``gpu03-a``."""
    found = _FIRST_HOST.match(nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def _natural(variables: Mapping[str, str], name: str) -> int:
    value = variables.get(name, "")
    if not (value.isascii() and value.isdecimal() and len(value) <= 20):
        raise PlanError(f"{name}={value!r} in the environment is not a number", f"set {name}, or start with torchrun")
    return int(value)
