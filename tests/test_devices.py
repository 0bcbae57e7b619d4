"""A GPU gives what the CPU gives: a residual's very bytes, and a change within the rounding of its factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pissa_hub
from pissa_hub.pipeline.decompose import plan_decomposition, run
from pissa_hub.pipeline.settings import Settings
from pissa_hub.progress import Silent

from .conftest import SHARDED, Factory
from .helpers import ADAPTER, files_of, tensors_of
from .model.zoo import JUDGES_OWN_WARNINGS
from .pipeline.processes import watched_here
from .pipeline.watch import Watch

pytestmark = [pytest.mark.gpu, *JUDGES_OWN_WARNINGS]
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture
def folders(tiny_checkpoint: Factory, dtype: torch.dtype, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Source, its decomposition, and pissa_init with every B 1 % longer."""
    source, output, trained = tiny_checkpoint(dtype=dtype, shard_size=SHARDED), tmp_path / "out", tmp_path / "trained"
    pissa_hub.decompose(source, output, rank=4, alpha=6, device="cpu")
    trained.mkdir()
    (trained / "adapter_config.json").write_bytes((output / "pissa_init" / "adapter_config.json").read_bytes())
    tensors = load_file(output / ADAPTER)
    longer = {name: 1.01 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(longer, trained / "adapter_model.safetensors")
    return source, output, trained


@DTYPES
def test_restore_on_a_gpu_writes_the_bytes_of_the_cpu(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, output, _ = folders
    pissa_hub.restore(source, output, tmp_path / "restored", device=DEVICE)
    assert files_of(tmp_path / "restored") == files_of(output)


@DTYPES
def test_merge_on_a_gpu_writes_the_bytes_of_the_cpu(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, output, trained = folders
    for device in ("cpu", DEVICE):
        pissa_hub.merge(output, trained, tmp_path / device, device=device)
    assert files_of(tmp_path / DEVICE) == files_of(tmp_path / "cpu")


@DTYPES
def test_convert_on_a_gpu_gives_the_change_of_the_cpu(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, output, trained = folders
    changes = {}
    for device in ("cpu", DEVICE):
        pissa_hub.convert(trained, output, tmp_path / device, device=device)
        factors = load_file(tmp_path / device / "adapter_model.safetensors")
        changes[device] = {
            name: factors[name.replace("lora_A", "lora_B")].double() @ A.double()
            for name, A in factors.items()
            if "lora_A" in name
        }
    for name, expected in changes["cpu"].items():
        assert (changes[DEVICE][name] - expected).norm() <= 2e-7 * expected.norm(), name


@DTYPES
def test_load_changes_weights_on_a_gpu_to_the_residuals_on_disk(
    folders: tuple[Path, Path, Path], dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    source, output, _ = folders
    model = pissa_hub.load(AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(DEVICE), output)
    stored, parameters = tensors_of(output), dict(model.get_base_model().named_parameters())
    for name, weight in stored.items():
        found = parameters.get(name.replace("_proj.weight", "_proj.base_layer.weight"), parameters.get(name))
        assert found is not None, name
        assert torch.equal(found.detach().cpu(), weight), name


def test_processes_on_gpus_give_the_bytes_of_one(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """Both on one GPU, wherever there are several: those need not be alike, and then their factors differ."""
    source = tiny_checkpoint(shard_size=SHARDED)
    pissa_hub.decompose(source, tmp_path / "one", rank=4, device="cuda:0")
    with watched_here(Watch(tmp_path / "log")) as watch:
        outcome = pissa_hub.decompose(source, tmp_path / "two", rank=4, devices="cuda:0,cuda:0")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert watch.ranks_at_work() == {0, 1}
    assert not str(outcome.manifest.environment["device"]).startswith("cpu")


def test_a_weight_that_the_gpu_has_no_room_for_is_done_on_the_cpu(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """The memory is really full, by a limit on this process."""
    source, notes = tiny_checkpoint(shard_size=SHARDED), []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    plan = plan_decomposition(source, Settings(rank=4))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-9, 0)
    try:
        outcome = run(plan, tmp_path / "out", [torch.device("cuda:0")], Notes())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert len(notes) == len(outcome.manifest.weights)
    assert all("does not fit in the memory of cuda:0; it was done on the CPU" in note for note in notes)
    assert str(outcome.manifest.environment["device"]).startswith("cpu")
    assert pissa_hub.verify(tmp_path / "out", source, sample=-1).is_sound
