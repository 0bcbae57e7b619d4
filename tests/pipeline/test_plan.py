"""The plan is the whole job: every output header and config, from headers and config.json alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub.checkpoint.reader import ShardReader
from pissa_hub.errors import MatrixError, TargetError
from pissa_hub.pipeline.decompose import plan_decomposition
from pissa_hub.pipeline.plan import Plan
from pissa_hub.pipeline.settings import Settings

from ..conftest import SHARDED, Factory
from ..helpers import files_of, header_bytes


def plan_of(source: Path, **settings: Any) -> Plan:
    return plan_decomposition(source, Settings(**{"rank": 4, **settings}))


def adapter_config(plan: Plan) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(plan.generated["pissa_init/adapter_config.json"])
    return table


def test_reads_no_weight_and_writes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(source)
    for path in source.glob("*.safetensors"):
        # The values are gone, only headers are left.
        path.write_bytes(header_bytes(path).ljust(path.stat().st_size, b"\0"))
    zeroed = files_of(source)
    monkeypatch.setattr(ShardReader, "__init__", lambda *_: pytest.fail("a shard was opened"))
    plan = plan_of(source)
    assert len(plan.weights) == 14
    assert files_of(source) == zeroed != before


def test_output_has_the_source_s_shards_tensors_and_dtypes(tiny_checkpoint: Factory) -> None:
    source = tiny_checkpoint(dtype=torch.float16, shard_size=SHARDED)
    plan = plan_of(source)
    assert [shard.name for shard in plan.shards] == sorted(path.name for path in source.glob("*.safetensors"))
    for shard in plan.shards:
        assert shard.output.raw == header_bytes(source / shard.name)
    assert plan.input_bytes == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert plan.output_bytes == plan.input_bytes + plan.adapter.file_size


def test_adapter_config_is_what_old_peft_understands(tiny_checkpoint: Factory) -> None:
    config = adapter_config(plan_of(tiny_checkpoint()))
    assert config == {
        "alpha_pattern": {},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "target_modules": sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def test_ranks_and_alphas_of_their_own(tiny_checkpoint: Factory) -> None:
    source = tiny_checkpoint()
    config = adapter_config(plan_of(source, rank_pattern={"k_proj": 2}))
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"k_proj": 2}, {"k_proj": 2})
    config = adapter_config(plan_of(source, rank_pattern={"k_proj": 2}, alpha=8, use_rslora=True))
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"k_proj": 2}, {})
    assert (config["lora_alpha"], config["use_rslora"]) == (8, True)
    assert adapter_config(plan_of(source, alpha=2.5))["lora_alpha"] == 2.5
    plan = plan_of(source, rank_pattern={"k_proj": 2}, alpha=8)
    assert {weight.scaling for weight in plan.weights} == {2.0, 4.0}


@pytest.mark.parametrize(
    ("stored", "named", "residual", "expected"),
    [
        (torch.bfloat16, "bfloat16", "source", "bfloat16"),
        (torch.bfloat16, "bfloat16", "bfloat16", "bfloat16"),
        (torch.bfloat16, "bfloat16", "float32", "float32"),
        (torch.bfloat16, "bfloat16", "float16", "float32"),
        (torch.float32, "bfloat16", "bfloat16", "bfloat16"),
        (torch.float32, "float32", "float16", "float32"),
        (torch.bfloat16, None, "float32", "float32"),
        (torch.bfloat16, None, "source", None),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_in_config_never_rounds_a_residual(
    tiny_checkpoint: Factory,
    tmp_path: Path,
    key: str,
    stored: torch.dtype,
    named: str | None,
    residual: str,
    expected: str | None,
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(dtype=stored), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps({**config, **({key: named} if named else {})}))
    written = plan_of(source, residual_dtype=residual).generated["config.json"]
    table = json.loads(written)
    assert table.get(key if named else "dtype") == expected
    assert {name: value for name, value in table.items() if name not in ("dtype", "torch_dtype")} == config
    if expected == named:
        assert written == (source / "config.json").read_bytes()


def test_index_is_the_source_s_unless_sizes_change(tiny_checkpoint: Factory) -> None:
    source = tiny_checkpoint(dtype=torch.bfloat16, shard_size=SHARDED)
    name = "model.safetensors.index.json"
    assert plan_of(source).generated[name] == (source / name).read_bytes()
    before, after = (json.loads(data) for data in ((source / name).read_bytes(), wide_index(source, name)))
    grown = sum(weight.stored.numel for weight in plan_of(source).weights) * 2
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"] == {**before["metadata"], "total_size": before["metadata"]["total_size"] + grown}


def wide_index(source: Path, name: str) -> bytes:
    return plan_of(source, residual_dtype="float32").generated[name]


def test_digest_is_of_everything_that_decides_the_output(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(shard_size=SHARDED), tmp_path / "source"))
    digest = plan_of(source).digest
    assert plan_of(source).digest == digest
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    assert plan_of(moved).digest == digest
    variants = [
        {"rank": 5},
        {"alpha": 8.0},
        {"use_rslora": True},
        {"seed": 1},
        {"tolerance": 1e-4},
        {"svd": "full"},
        {"targets": "q_proj"},
        {"exclude": "q_proj"},
        {"rank_pattern": {"q_proj": 2}},
        {"adapter_dtype": "float16"},
        {"residual_dtype": "float16"},
    ]
    digests = {digest, *(plan_of(source, **variant).digest for variant in variants)}
    assert len(digests) == 1 + len(variants)
    (source / "tokenizer.json").write_text("{}")
    digests.add(plan_of(source).digest)
    (source / "config.json").write_text((source / "config.json").read_text() + " ")
    digests.add(plan_of(source).digest)
    last = max(source.glob("*.safetensors"))
    save_file(load_file(last), last, {"format": "pt", "more": "metadata"})
    digests.add(plan_of(source).digest)
    assert len(digests) == 4 + len(variants)


def test_disk_is_what_the_run_takes_at_most(tiny_checkpoint: Factory) -> None:
    source = tiny_checkpoint(shard_size=SHARDED)
    plan = plan_of(source)
    parts = {shard.name: shard.adapter.file_size if shard.adapter else 0 for shard in plan.shards}
    carried = sum((source / name).stat().st_size for name in plan.checkpoint.other_files)
    assert plan.disk_bytes() == plan.output_bytes + sum(parts.values()) + carried
    first = plan.shards[0]
    assert plan.disk_bytes() - plan.disk_bytes(frozenset({first.name})) == first.output.file_size + parts[first.name]


def test_wrong_targets_and_ranks_are_refused(tiny_checkpoint: Factory) -> None:
    source = tiny_checkpoint()
    with pytest.raises(TargetError, match="rank 33 does not fit"):
        plan_of(source, rank=33)
    with pytest.raises(TargetError, match="matches no weight"):
        plan_of(source, targets="nowhere")
    with pytest.raises(TargetError, match="is an embedding"):
        plan_of(source, targets="embed_tokens")


def test_quantised_target_is_refused_and_untargeted_is_not(source: Path) -> None:
    path = next(path for path in sorted(source.glob("*.safetensors")) if b"q_proj" in header_bytes(path))
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MatrixError, match=name):
        plan_of(source)
    assert len(plan_of(source, exclude=name.removesuffix(".weight")).weights) == 13
