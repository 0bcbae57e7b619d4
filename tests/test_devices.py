"""A GPU gives what the CPU gives: a residual's very bytes, and a change within the rounding of its factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pissa_hub

from .conftest import SHARDED, Factory
from .helpers import ADAPTER, files_of, tensors_of
from .model.zoo import JUDGES_OWN_WARNINGS

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
