"""Which of several processes this is, by what torchrun, SLURM and users put into the environment."""

from __future__ import annotations

import pytest

from pissa_hub.errors import PlanError
from pissa_hub.ranks import Rank, find_rank, is_alone, is_heard, local_rank

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
}


def test_torchrun() -> None:
    assert find_rank(TORCHRUN) == Rank(3, 8, "node1", 29500, has_agent=True)
    leader = find_rank({**TORCHRUN, "RANK": "0"})
    assert leader is not None
    assert leader.leads
    assert not leader.hosts_store  # the agent does


def test_variables_set_by_hand() -> None:
    by_hand = {name: TORCHRUN[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert find_rank({**by_hand, "RANK": "0"}) == Rank(0, 8, "node1", 29500, has_agent=False)
    other = find_rank({**by_hand, "RANK": "5"})
    assert other is not None
    assert find_rank(other.environment()) == other


def test_a_step_of_srun() -> None:
    found = find_rank(SRUN)
    assert found is not None
    assert (found.rank, found.world_size, found.address, found.hosts_store) == (0, 4, "gpu03", True)
    others = [find_rank({**SRUN, "SLURM_PROCID": str(rank)}) for rank in range(1, 4)]
    assert {(other.address, other.port, other.hosts_store) for other in others if other} == {
        ("gpu03", found.port, False)
    }
    another = find_rank({**SRUN, "SLURM_STEP_ID": "2"})
    assert another is not None
    assert another.port != found.port


def test_variables_go_before_slurms() -> None:
    found = find_rank({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert found is not None
    assert (found.address, found.port) == ("10.0.0.1", 5000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a1,b2", "a1"), ("n[1-4]", "n1"), ("n[007,009]-ib", "n007-ib"), ("x-y[12]", "x-y12")],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    found = find_rank({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.address == first


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        # A batch script: its job has tasks, but it is none of them.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5", "SLURM_NODELIST": "a[1-2]"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290", "SLURM_JOB_ID": "none"},  # of salloc
    ],
)
def test_one_process_is_alone(environment: dict[str, str]) -> None:
    assert find_rank(environment) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "8"}, "RANK 8 of WORLD_SIZE 8 cannot be"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is not a number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"MASTER_PORT": "9" * 21}, "MASTER_PORT='9999"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT 0 is no port; set one from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT 65536 is no port"),
        ({"MASTER_ADDR": ""}, "RANK is set, but MASTER_ADDR is not; start with torchrun"),
    ],
)
def test_variables_that_cannot_be(change: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        find_rank({**TORCHRUN, **change})


def test_what_is_left_over_in_the_environment_does_not_part_the_tasks_of_srun() -> None:
    assert find_rank({**SRUN, "RANK": "", "WORLD_SIZE": "1"}) == find_rank(SRUN)


def test_steps_of_other_jobs_meet_elsewhere() -> None:
    steps = [
        {"SLURM_JOB_ID": str(100 + 625 * job), "SLURM_STEP_ID": step} for job in range(4) for step in ("0", "batch")
    ]
    found = [find_rank({**SRUN, **step}) for step in steps]
    assert len({rank.port for rank in found if rank}) == len(steps)


@pytest.mark.parametrize(
    ("environment", "position"),
    [
        ({}, 0),
        ({"RANK": "12"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, 3),
        ({"RANK": "11", "LOCAL_RANK": "3"}, 3),
        ({"SLURM_PROCID": "11", "SLURM_LOCALID": "2"}, 2),
        ({"LOCAL_RANK": "?"}, 0),
    ],
)
def test_position_on_the_machine(environment: dict[str, str], position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert local_rank() == position


def test_who_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for change in ({"RANK": "0"}, {"RANK": "1"}, {"RANK": "?"}, {"WORLD_SIZE": "1"}):
        for name, value in {**TORCHRUN, **change}.items():
            monkeypatch.setenv(name, value)
        said.append((is_alone(), is_heard()))
    assert said == [(False, True), (False, False), (True, True), (True, True)]
