"""Which of several processes this is, as torchrun, SLURM's srun or ``--devices`` say in the environment."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from pissa_hub.errors import PlanError

# srun names no port: one that follows from the job and its step, among those that are free for anybody's use.
_SLURM_PORTS = range(20000, 30000)
_PORTS = range(1, 1 << 16)
_FIRST_HOST = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
_FIRST_OF_LIST = re.compile(r"\[(\d*)[^\]]*\]")


@dataclass(frozen=True)
class Rank:
    """One of several processes that run the same command.

    Attributes:
        rank: 0 to ``world_size`` - 1; rank 0 leads.
        world_size: how many there are to be.
        address, port: of the rendezvous store.
        has_agent: whether torchrun's agent serves the store, which then outlives the processes; else rank 0 does.
    """

    rank: int
    world_size: int
    address: str
    port: int
    has_agent: bool

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def hosts_store(self) -> bool:
        """Whether this process is the store's server."""
        return self.leads and not self.has_agent

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
    if not found.get("RANK") and found.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found |= _from_slurm(found)
    if not found.get("RANK") or found.get("WORLD_SIZE", "1") == "1":
        return None
    rank, world_size = _natural(found, "RANK"), _natural(found, "WORLD_SIZE")
    if rank >= world_size:
        raise PlanError(f"RANK {rank} of WORLD_SIZE {world_size} cannot be", "set RANK from 0 to WORLD_SIZE - 1")
    if not found.get("MASTER_ADDR"):
        raise PlanError("RANK is set, but MASTER_ADDR is not", "start with torchrun, or set both, or none")
    port = _natural(found, "MASTER_PORT")
    if port not in _PORTS:
        raise PlanError(f"MASTER_PORT {port} is no port", f"set one from {_PORTS[0]} to {_PORTS[-1]}")
    return Rank(
        rank=rank,
        world_size=world_size,
        address=found["MASTER_ADDR"],
        port=port,
        has_agent=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def is_alone() -> bool:
    """Whether this is the only process."""
    return _understood() is None


def is_heard() -> bool:
    """Whether what this process prints is what its user reads: of several, rank 0 speaks for all."""
    rank = _understood()
    return rank is None or rank.leads


def local_rank() -> int:
    """Position among the processes on this machine, as far as it is said; 0 if it is not."""
    # A RANK that stands alone may be anybody's variable.
    names = ("LOCAL_RANK", "SLURM_LOCALID") if is_alone() else ("LOCAL_RANK", "RANK", "SLURM_LOCALID")
    value = next((value for name in names if (value := os.environ.get(name))), "")
    return int(value) if value.isascii() and value.isdecimal() else 0


def _understood() -> Rank | None:
    """This process among several; what cannot be is said by whoever shares work."""
    with suppress(PlanError):
        return find_rank()
    return None


def _from_slurm(found: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables for a step that srun started; the store is on the step's first machine."""
    job = f"{found.get('SLURM_JOB_ID')}.{found.get('SLURM_STEP_ID')}"
    port = _SLURM_PORTS[int(hashlib.sha256(job.encode()).hexdigest(), 16) % len(_SLURM_PORTS)]
    return {
        "RANK": found.get("SLURM_PROCID", ""),
        "WORLD_SIZE": found["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": found.get("MASTER_ADDR") or _first_host(found.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": found.get("MASTER_PORT") or str(port),
    }


def _first_host(nodes: str) -> str:
    """The first name of a SLURM host list: ``gpu[03-05,9]-a,x`` begins with ``gpu03-a``."""
    found = _FIRST_HOST.match(nodes)
    return _FIRST_OF_LIST.sub(r"\1", found[0]) if found else ""


def _natural(variables: Mapping[str, str], name: str) -> int:
    value = variables.get(name, "")
    if not (value.isascii() and value.isdecimal() and len(value) <= 20):
        raise PlanError(f"{name}={value!r} in the environment is not a number", f"set {name}, or start with torchrun")
    return int(value)
