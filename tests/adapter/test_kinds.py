"""convert, judged by transformers and PEFT: original + converted adapter compute what residual + trained adapter do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_hub import convert
from pissa_hub.errors import AdapterError

from ..helpers import deviation, files_of, outputs_of
from .kinds import DORA, KINDS, LINEAR, PEFT_OWN, RANK, RESCALED, Kind
from .trained import (
    CONFIG,
    PEFTS_OWN_WARNINGS,
    WEIGHTS,
    Trained,
    Training,
    dense_updates,
    load,
    trained_update,
)

pytestmark = PEFTS_OWN_WARNINGS

PLAIN = KINDS["plain"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def original(trained: Trained) -> Any:
    return getattr(transformers, trained.auto_class).from_pretrained(trained.source)


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius."""
    return float((found - expected).norm() / expected.norm())


def largest_error(converted: Path, trained: Trained) -> float:
    """Of any module's change, relative Frobenius; from the files alone, dense, in float64."""
    found, expected = dense_updates(converted), trained_update(trained)
    assert found.keys() == expected.keys()
    return max(relative(found[module], expected[module]) for module in expected)


def recorded(converted: Path) -> dict[str, dict[str, Any]]:
    """The record of every module."""
    record = json.loads((converted / "pissa_conversion.json").read_bytes())
    return {module["module"]: module for module in record["modules"]}


@pytest.mark.parametrize("name", LINEAR)
def test_what_the_judges_expect_is_the_original_plus_the_dense_change(trained: Training, name: str) -> None:
    """The fixtures and the reference agree by a way that knows nothing of adapters."""
    done = trained(LINEAR[name])
    model = original(done)
    with torch.no_grad():
        for module, update in trained_update(done).items():
            layer = model.get_submodule(module)
            is_transposed = isinstance(layer, transformers.pytorch_utils.Conv1D)
            layer.weight.copy_(layer.weight.double() + (update.t() if is_transposed else update))
    assert deviation(outputs_of(model), done.expected) < 2e-6


@pytest.mark.parametrize("name", KINDS)
def test_original_with_the_converted_adapter_computes_the_same(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora")
    assert deviation(outputs_of(original(done)), done.expected) > 5e-3
    assert deviation(outputs_of(load(done.source, tmp_path / "lora", done.auto_class)), done.expected) <= 1e-5
    assert largest_error(tmp_path / "lora", done) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_the_result_is_a_plain_lora(trained: Training, tmp_path: Path, name: str) -> None:
    """Scaling 1 in every module, no rsLoRA, and no initialisation that PEFT would run again."""
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / CONFIG).read_bytes())
    assert config["lora_alpha"] == config["r"]
    assert config.get("alpha_pattern", {}) == config.get("rank_pattern", {})
    assert config["use_rslora"] is False
    assert config["init_lora_weights"] is True
    assert not any(name.endswith("base_layer.weight") for name in load_file(tmp_path / "lora" / WEIGHTS))
    for path, content in files_of(tmp_path / "lora").items():
        assert str(done.source.parent).encode() not in content, f"{path} names a folder of this machine"


@pytest.mark.parametrize("where", ["folder", "pissa_init", "manifest and pissa_init", "trainer's output"])
def test_the_initial_state_may_lie_in_several_places(trained: Training, tmp_path: Path, where: str) -> None:
    done = trained(PLAIN)
    init = done.init
    if where == "pissa_init":
        init /= "pissa_init"
    elif where == "manifest and pissa_init":
        init = tmp_path / "init"
        shutil.copytree(done.init / "pissa_init", init / "pissa_init")
        shutil.copy(done.init / "pissa_manifest.json", init)
    elif where == "trainer's output":
        init = tmp_path / "output"
        shutil.copytree(done.initial, init / "initial_model")
    convert(done.adapter, init, tmp_path / "lora")
    assert largest_error(tmp_path / "lora", done) < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_the_initial_state_may_be_one_that_peft_saved(trained: Training, tmp_path: Path, name: str) -> None:
    """Without a manifest, and with the fresh factors of what training added."""
    done = trained(KINDS[name])
    convert(done.adapter, done.initial, tmp_path / "lora")
    assert deviation(outputs_of(load(done.source, tmp_path / "lora", done.auto_class)), done.expected) <= 1e-5
    assert largest_error(tmp_path / "lora", done) < 1e-6


@pytest.mark.parametrize("name", PEFT_OWN)
def test_a_trainer_may_have_reset_the_initialisation_in_the_config(
    trained: Training, tmp_path: Path, name: str
) -> None:
    """LLaMA-Factory saves pissa_init with ``init_lora_weights: true``, ms-swift's initial_model keeps the method."""
    done = trained(PEFT_OWN[name])
    shutil.copytree(done.initial, tmp_path / "initial")
    config = json.loads((tmp_path / "initial" / CONFIG).read_bytes())
    assert config["init_lora_weights"].startswith("pissa")
    (tmp_path / "initial" / CONFIG).write_text(json.dumps({**config, "init_lora_weights": True}))
    convert(done.adapter, tmp_path / "initial", tmp_path / "lora")
    assert deviation(outputs_of(load(done.source, tmp_path / "lora")), done.expected) <= 1e-5


@pytest.mark.parametrize("name", ["lm_head", "embedding", "embedding and output head"])
def test_copies_of_base_weights_are_left_out(trained: Training, tmp_path: Path, name: str) -> None:
    """PEFT saves an adapted output head and embedding whole too: the head's copy is the residual."""
    done = trained(KINDS[name])
    copies = {key for key in load_file(done.adapter / WEIGHTS) if key.endswith("base_layer.weight")}
    assert copies
    notes = convert(done.adapter, done.init, tmp_path / "lora").record.notes
    assert not copies & load_file(tmp_path / "lora" / WEIGHTS).keys()
    assert all(any(copy in note for note in notes) for copy in copies)


def test_two_adapters_of_one_folder(trained: Training, tmp_path: Path) -> None:
    """PEFT writes the default one into the folder itself and the other one into a folder of its name."""
    done, other = trained(PLAIN), trained(KINDS["after steps of AdamW"])
    assert done.base is not None
    model = load(done.base, done.adapter)
    model.load_adapter(str(other.adapter), "other")
    model.save_pretrained(tmp_path / "both")
    for adapter, expected in ((tmp_path / "both", done.expected), (tmp_path / "both" / "other", other.expected)):
        lora = tmp_path / f"lora of {adapter.name}"
        convert(adapter, done.init, lora)
        assert deviation(outputs_of(load(done.source, lora)), expected) <= 1e-5


def test_a_bf16_base_takes_the_exact_change(trained: Training, tmp_path: Path) -> None:
    """Residual and original are both rounded, so the outputs agree as far as bf16 does; the change does to fp32."""
    done = trained(Kind(settings={"dtype": torch.bfloat16}))
    convert(done.adapter, done.init, tmp_path / "lora")
    assert largest_error(tmp_path / "lora", done) < 1e-6
    assert deviation(outputs_of(load(done.source, tmp_path / "lora")), done.expected) < 3e-2


@pytest.mark.parametrize(("dtype", "ours", "naive"), [("bfloat16", 4e-3, 1.0), ("float16", 5e-4, 0.2)])
def test_a_small_change_survives_a_narrow_dtype(
    trained: Training, tmp_path: Path, dtype: str, ours: float, naive: float
) -> None:
    """Of PEFT's factors [B', -B] and [A'; A] a cast leaves nothing of a change of 0.1 %."""
    done = trained(Kind(size=7e-4))
    convert(done.adapter, done.init, tmp_path / "lora", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / WEIGHTS).values()} == {DTYPES[dtype]}
    found = dense_updates(tmp_path / "lora")
    before, after = load_file(done.initial / WEIGHTS), load_file(done.adapter / WEIGHTS)
    for module, update in trained_update(done).items():
        (A, A_before), (B, B_before) = (
            [tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for tensors in (after, before)]
            for side in "AB"
        )
        assert 5e-4 < update.norm() / (B_before @ A_before).norm() < 1.5e-3
        assert relative(found[module], update) <= ours
        assert recorded(tmp_path / "lora")[module]["error"] == pytest.approx(relative(found[module], update), rel=0.01)
        concatenated = (torch.cat([B, -B_before], dim=1), torch.cat([A, A_before]))
        left, right = (factor.to(DTYPES[dtype]).double() for factor in concatenated)
        assert relative(left @ right, update) > naive


@pytest.mark.parametrize(
    "name", ["plain", "rsLoRA, rank_pattern and alpha", "embedding", "experts of Mixtral", "GPT-2"]
)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_given_rank_loses_what_the_best_approximation_loses(
    trained: Training, tmp_path: Path, name: str, rank: int
) -> None:
    """Eckart and Young: the tail of the singular values, and that is what the record says."""
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora", rank=rank)
    found = dense_updates(tmp_path / "lora")
    for module, update in trained_update(done).items():
        tail = torch.linalg.svdvals(update)[..., rank:].norm() / update.norm()
        assert float(tail) > 1e-3
        assert relative(found[module], update) == pytest.approx(float(tail), rel=1e-5)
        record = recorded(tmp_path / "lora")[module]
        assert record["rank"] == rank
        assert record["error"] == pytest.approx(float(tail), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["plain", "rsLoRA, rank_pattern and alpha", "embedding", "GPT-2", "after steps of AdamW"]
)
@pytest.mark.parametrize("bound", [0.5, 0.1, 1e-4])
def test_auto_takes_the_smallest_ranks_within_the_error(
    trained: Training, tmp_path: Path, name: str, bound: float
) -> None:
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora", rank="auto", max_error=bound)
    found = dense_updates(tmp_path / "lora")
    for module, update in trained_update(done).items():
        record = recorded(tmp_path / "lora")[module]
        sigma = torch.linalg.svdvals(update)
        needed = next(rank for rank in range(len(sigma) + 1) if sigma[rank:].norm() <= bound * sigma.norm())
        assert record["rank"] == max(needed, 1)
        assert relative(found[module], update) <= bound
        assert record["error"] == pytest.approx(relative(found[module], update), rel=1e-3, abs=1e-7)
    assert deviation(outputs_of(load(done.source, tmp_path / "lora", done.auto_class)), done.expected) < 2 * bound


def test_auto_gives_fused_experts_one_rank_that_fits_all(trained: Training, tmp_path: Path) -> None:
    done = trained(KINDS["experts of Mixtral"])
    convert(done.adapter, done.init, tmp_path / "lora", rank="auto", max_error=0.2)
    assert len({record["rank"] for record in recorded(tmp_path / "lora").values()}) == 1
    assert largest_error(tmp_path / "lora", done) <= 0.2


@pytest.mark.parametrize("name", LINEAR)
def test_exact_has_the_rank_of_the_change(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(LINEAR[name])
    convert(done.adapter, done.init, tmp_path / "lora")
    for module, update in trained_update(done).items():
        assert recorded(tmp_path / "lora")[module]["rank"] == int(torch.linalg.matrix_rank(update, rtol=1e-10))


@pytest.mark.parametrize("doubled", [False, True])
def test_the_exact_rank_is_below_twice_the_trained_one_where_the_change_is(
    trained: Training, tmp_path: Path, doubled: bool
) -> None:
    """Only B was trained, or the rows of A only became longer: Delta W = s (2 B' - B) A has rank r."""
    done = trained(PLAIN)
    adapter = Path(shutil.copytree(done.adapter, tmp_path / "adapter"))
    after, before = load_file(done.adapter / WEIGHTS), load_file(done.initial / WEIGHTS)
    factor = 2 if doubled else 1
    tensors = {name: after[name] if ".lora_B" in name else factor * before[name] for name in after}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    convert(adapter, done.init, tmp_path / "lora")
    assert {record["rank"] for record in recorded(tmp_path / "lora").values()} == {RANK}


@pytest.mark.parametrize("name", ["plain", "rsLoRA, rank_pattern and alpha", "embedding", "GPT-2"])
def test_both_factors_hold_equal_shares_of_every_direction(trained: Training, tmp_path: Path, name: str) -> None:
    """B^T B = A A^T = diag(sigma): neither overflows in a narrow dtype while the other vanishes."""
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    for module, update in trained_update(done).items():
        side, end = ("embedding_", "") if module.endswith("embed_tokens") else ("", ".weight")
        A, B = (tensors[f"base_model.model.{module}.lora_{side}{factor}{end}"].double() for factor in "AB")
        sigma = torch.diag(torch.linalg.svdvals(update)[: len(A)])
        for gram in (A @ A.t(), B.t() @ B):
            assert (gram - sigma).norm() < 1e-6 * sigma.norm()


def test_a_change_of_alpha_before_training_is_part_of_the_update(trained: Training, tmp_path: Path) -> None:
    """s' B' A' - s B A with a scaling of its own on each side."""
    done = trained(RESCALED)
    notes = convert(done.adapter, done.init, tmp_path / "lora").record.notes
    assert deviation(outputs_of(load(done.source, tmp_path / "lora")), done.expected) <= 1e-5
    assert largest_error(tmp_path / "lora", done) < 1e-6
    assert any("scaled by 2 where its initial state was by 1" in note for note in notes)


@pytest.mark.parametrize(
    ("server", "name", "rank"),
    [
        ("vllm", "rsLoRA, rank_pattern and alpha", 16),
        ("sglang", "rsLoRA, rank_pattern and alpha", 12),
        ("llama.cpp", "rsLoRA, rank_pattern and alpha", 12),
        ("tgi", "rsLoRA, rank_pattern and alpha", 12),
        ("ollama", "rsLoRA, rank_pattern and alpha", 12),
        ("vllm", "experts of Mixtral", 8),
        ("vllm", "lm_head", 8),
    ],
)
def test_what_servers_get_is_the_same_update_of_one_rank(
    trained: Training, tmp_path: Path, server: str, name: str, rank: int
) -> None:
    """Zero-padded, without patterns, targets by the last parts of their paths."""
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora", server=server)
    config = json.loads((tmp_path / "lora" / CONFIG).read_bytes())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert not any("." in target for target in config["target_modules"])
    assert largest_error(tmp_path / "lora", done) < 1e-6
    if "experts" not in name:
        assert deviation(outputs_of(load(done.source, tmp_path / "lora")), done.expected) <= 1e-5


def test_an_untrained_adapter_converts_to_one_that_changes_nothing(trained: Training, tmp_path: Path) -> None:
    done = trained(PLAIN)
    conversion = convert(done.initial, done.init, tmp_path / "lora")
    assert any("nothing was trained" in note for note in conversion.record.notes)
    assert all(update.count_nonzero() == 0 for update in dense_updates(tmp_path / "lora").values())
    model = original(done)
    expected = outputs_of(model)
    assert torch.equal(outputs_of(load(done.source, tmp_path / "lora")), expected)


@pytest.mark.parametrize("name", ["plain", "embedding", "lora_bias", "GPT-2"])
def test_a_trained_adapter_does_not_change_nothing(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    assert not any("nothing" in note for note in convert(done.adapter, done.init, tmp_path / "lora").record.notes)


@pytest.mark.parametrize("rank", ["exact", 2])
def test_dora_is_refused_and_merge_is_the_way_out(trained: Training, tmp_path: Path, rank: str | int) -> None:
    done = trained(DORA)
    with pytest.raises(AdapterError, match="DoRA") as refusal:
        convert(done.adapter, done.init, tmp_path / "lora", rank=rank)
    assert "merge" in refusal.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [3]),
        ("layer_replication", [[0, 2], [1, 2]]),
    ],
)
def test_variants_are_recognised_by_the_config(trained: Training, tmp_path: Path, field: str, value: object) -> None:
    done = trained(PLAIN)
    adapter = Path(shutil.copytree(done.adapter, tmp_path / "adapter"))
    config = json.loads((adapter / CONFIG).read_bytes())
    (adapter / CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(AdapterError, match="no LoRA can express") as refusal:
        convert(adapter, done.init, tmp_path / "lora")
    assert "merge" in refusal.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_dora_is_recognised_by_its_tensors_too(trained: Training, tmp_path: Path) -> None:
    done = trained(DORA)
    adapter = Path(shutil.copytree(done.adapter, tmp_path / "adapter"))
    config = json.loads((adapter / CONFIG).read_bytes())
    (adapter / CONFIG).write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(AdapterError, match="DoRA") as refusal:
        convert(adapter, done.init, tmp_path / "lora")
    assert "merge" in refusal.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
