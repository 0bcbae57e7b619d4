"""How many workers share which device."""

from __future__ import annotations

import pytest
import torch

from pissa_hub.errors import PlanError
from pissa_hub.pipeline.device import WORKSPACE_BUDGET, pick_device, pick_devices, worker_count

CPU = torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["warp", "meta", "cuda:99", ""])
def test_device_that_is_not_there(name: str) -> None:
    with pytest.raises(PlanError, match=f"device '{name}' cannot be used"):
        pick_device(name)


@pytest.mark.parametrize("name", ["99", "0,99", " 99 ", "cuda:99,cpu"])
def test_number_is_that_of_a_gpu(name: str) -> None:
    with pytest.raises(PlanError, match=r"device 'cuda:\d+' cannot be used"):
        pick_devices("auto", name)


@pytest.mark.gpu
def test_numbers_and_names_of_gpus() -> None:
    assert pick_devices("cpu", "0,cuda:0") == (torch.device("cuda:0"),) * 2
    assert len(pick_devices("cpu", "all")) == torch.cuda.device_count()


@pytest.mark.usefixtures("two_threads")
def test_workers_follow_the_threads_and_the_largest_weight() -> None:
    assert worker_count(1, CPU) == 2
    assert worker_count(WORKSPACE_BUDGET // 32, CPU) == 2
    assert worker_count(WORKSPACE_BUDGET // 32 + 1, CPU) == 1
    assert worker_count(WORKSPACE_BUDGET, CPU) == 1
    assert worker_count(0, CPU) == 2


def test_one_worker_has_the_gpu() -> None:
    assert worker_count(1, torch.device("cuda")) == 1
