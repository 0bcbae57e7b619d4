"""load, judged by transformers and PEFT: what the source computes, with the very parameters of a decomposed folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_hub import PissaHubError, decompose, load
from pissa_hub.errors import (
    AdapterError,
    CheckpointError,
    HubError,
    ManifestError,
    MatrixError,
    PlanError,
    VerificationError,
)

from .conftest import SHARDED, Factory
from .helpers import ADAPTER, MANIFEST, deviation, example_inputs, outputs_of
from .hub.publishing import logged_in
from .model.zoo import JUDGES_OWN_WARNINGS

pytestmark = JUDGES_OWN_WARNINGS

AUTO_CLASSES = {
    "LlamaForCausalLM": "AutoModelForCausalLM",
    "BertModel": "AutoModel",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(folder: Path, architecture: str = "LlamaForCausalLM", dtype: Any = "auto") -> Any:
    return getattr(transformers, AUTO_CLASSES[architecture]).from_pretrained(folder, dtype=dtype)


def from_folder(output: Path, architecture: str = "LlamaForCausalLM", dtype: Any = "auto") -> Any:
    """The decomposed folder as a user loads it."""
    model = plain(output, architecture, dtype)
    return PeftModel.from_pretrained(model, str(output), subfolder="pissa_init", is_trainable=True)


def same_parameters(found: Any, expected: Any) -> bool:
    ours, theirs = found.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


def copies(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sharded fp32 Llama and its decomposition; for reading only."""
    source, output = tiny_checkpoint(shard_size=SHARDED), tmp_path_factory.mktemp("load") / "out"
    decompose(source, output, rank=4)
    return source, output


@pytest.mark.parametrize("is_loaded", [False, True], ids=["folder", "model"])
@pytest.mark.parametrize("architecture", AUTO_CLASSES)
def test_every_parameter_is_that_of_the_decomposed_folder(
    tiny_checkpoint: Factory, tmp_path: Path, architecture: str, is_loaded: bool
) -> None:
    source, output = tiny_checkpoint(architecture), tmp_path / "out"
    decompose(source, output, rank=4, alpha=6)
    found = load(plain(source, architecture) if is_loaded else source, output)
    assert same_parameters(found, from_folder(output, architecture))
    assert type(found) is type(from_folder(output, architecture))
    assert deviation(outputs_of(found), outputs_of(plain(source, architecture))) < 1e-5


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_dtype(tiny_checkpoint: Factory, tmp_path: Path, dtype: torch.dtype, adapter_dtype: str) -> None:
    source, output = tiny_checkpoint(dtype=dtype), tmp_path / "out"
    decompose(source, output, rank=4, adapter_dtype=adapter_dtype)
    expected = from_folder(output)
    assert same_parameters(load(source, output), expected)
    assert same_parameters(load(plain(source), output), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_dtype_rounds_once(pair: tuple[Path, Path], dtype: torch.dtype) -> None:
    source, output = pair
    expected = from_folder(output, dtype=dtype)
    assert same_parameters(load(source, output, dtype=dtype), expected)
    # What the model has in memory is rounded already, and taken for what it is.
    model = plain(source, dtype=dtype)
    before = copies(model)
    found = load(model, output)
    layer = found.base_model.model.model.layers[0].self_attn.q_proj
    low_rank = layer.get_delta_weight("default").detach().double()
    exact = before["model.layers.0.self_attn.q_proj.weight"].double() - low_rank
    assert deviation(layer.base_layer.weight.double(), exact) < torch.finfo(dtype).eps


def test_wider_dtype_needs_no_rounding(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source, output = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out"
    decompose(source, output, rank=4)
    expected = outputs_of(plain(source, dtype=torch.float32))
    for base in (source, plain(source, dtype=torch.float32)):
        options = {"dtype": torch.float32} if base is source else {}
        assert deviation(outputs_of(load(base, output, **options)), expected) < 1e-5
    assert deviation(outputs_of(from_folder(output, dtype=torch.float32)), expected) > 1e-4


def test_folder_of_the_adapter_is_enough_to_name(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = pair
    expected = from_folder(output)
    assert same_parameters(load(source, output / "pissa_init"), expected)
    monkeypatch.chdir(output)
    assert same_parameters(load(str(source), "pissa_init"), expected)


def test_init_without_the_residual(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = pair
    shutil.copytree(output / "pissa_init", tmp_path / "pissa_init")
    shutil.copy(output / MANIFEST, tmp_path)
    assert same_parameters(load(source, tmp_path), from_folder(output))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_trains_what_is_trainable(pair: tuple[Path, Path], is_trainable: bool) -> None:
    source, output = pair
    model = load(source, output, is_trainable=is_trainable)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if is_trainable and "lora_" in name}
    if is_trainable:
        inputs = example_inputs(model.get_base_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(2):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]


def test_tied_embeddings_stay_tied(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source, output = tiny_checkpoint(tie_word_embeddings=True), tmp_path / "out"
    decompose(source, output, rank=4)
    model = load(source, output).get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, plain(source).lm_head.weight)


def test_zero_weight(source: Path, tmp_path: Path) -> None:
    shard = next(path for path in sorted(source.glob("*.safetensors")) if b"layers.0.mlp.up_proj" in path.read_bytes())
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, shard, {"format": "pt"})
    decompose(source, tmp_path / "out", rank=4)
    assert same_parameters(load(plain(source), tmp_path / "out"), from_folder(tmp_path / "out"))


def tuned(model: Any, output: Path) -> None:
    """One weight moved by 0.3 % of its norm."""
    weight = model.model.layers[1].mlp.up_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data += 0.003 * noise * weight.norm() / noise.norm()


def residual(model: Any, output: Path) -> None:
    model.load_state_dict(plain(output).state_dict())


def grown(model: Any, output: Path) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 97, bias=False)


def cut(model: Any, output: Path) -> None:
    del model.model.layers[1]


def not_finite(model: Any, output: Path) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")


def quantised(model: Any, output: Path) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(96, 64, dtype=torch.uint8), requires_grad=False)


def offloaded(model: Any, output: Path) -> None:
    model.model.layers[1].mlp.up_proj.to("meta")


def tied(model: Any, output: Path) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight


def adapted(model: Any, output: Path) -> None:
    model.load_adapter(str(output / "pissa_init"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (tuned, VerificationError, r"layers.1.mlp.up_proj.*not its residual or a model tuned from it"),
        (residual, VerificationError, r"A and B hold -.*not its residual"),
        (not_finite, VerificationError, r"A and B hold nan"),
        (grown, VerificationError, r"up_proj.weight of the model has shape \[97, 64\], not \[96, 64\]"),
        (cut, VerificationError, r"the model has no weight model.layers.1.self_attn"),
        (quantised, MatrixError, r"up_proj.weight of the model is stored as uint8; load the model unquantised"),
        (offloaded, MatrixError, r"up_proj.weight of the model is not in memory"),
        (tied, PlanError, r"(up|gate)_proj.weight of the model is tied to another weight"),
        (adapted, PlanError, r"the model has an adapter already"),
    ],
)
def test_other_model_is_refused_untouched(
    pair: tuple[Path, Path], spoil: Any, error: type[PissaHubError], message: str
) -> None:
    source, output = pair
    model = plain(source)
    spoil(model, output)
    before = copies(model)
    with pytest.raises(error, match=message) as raised:
        load(model, output)
    assert "\n" not in str(raised.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before if not after[name].is_meta
    )


def test_loaded_twice_is_refused(pair: tuple[Path, Path]) -> None:
    source, output = pair
    model = plain(source)
    once = load(model, output)
    for again in (model, once):
        with pytest.raises(PlanError, match="has an adapter already"):
            load(again, output)


def test_residual_out_of_range_is_refused_untouched(tiny_checkpoint: Factory, source: Path, tmp_path: Path) -> None:
    """65504 fits float16, what remains of it after a principal part of the opposite sign does not."""
    shard = next(path for path in sorted(source.glob("*.safetensors")) if b"layers.1.mlp.up_proj" in path.read_bytes())
    tensors = load_file(shard)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 2, (96, 64), generator=generator) * 2.0 - 1
    tensors["model.layers.1.mlp.up_proj.weight"] = weight * 65000
    save_file(tensors, shard, {"format": "pt"})
    decompose(source, tmp_path / "out", rank=4)
    model = plain(source, dtype=torch.float16)
    before = copies(model)
    with pytest.raises(MatrixError, match=r"does not fit the range of torch.float16; load the model in a wider dtype"):
        load(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_folder_is_refused(pair: tuple[Path, Path], source: Path) -> None:
    shard = min(source.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[min(tensors)].view(-1)[0] += 1e-3
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(VerificationError, match=f"is not the source of this decomposition: {shard.name} differs"):
        load(source, pair[1])
    with pytest.raises(CheckpointError, match="is already decomposed"):
        load(pair[1], pair[1])


def test_from_the_hub(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source at a commit, and of the release no more than the adapter."""
    source, output = pair
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with logged_in(tmp_path / "hub") as hub:
        hub.upload_folder("org/model", source)
        commit = hub.commit("org/model", {"generation_config.json": b'{"max_new_tokens": 7}'})
        hub.move("org/model")
        hub.upload_folder("org/pissa", output)
        model = load(f"org/model@{commit.sha}", "org/pissa")
        assert same_parameters(model, from_folder(output))
        assert model.get_base_model().generation_config.max_new_tokens == 7
        assert not [call.path for call in hub.requests if "org/pissa" in call.path and "/model-" in call.path]
        with pytest.raises(HubError, match="org/name is neither a folder here nor a model on the Hub"):
            load("org/name", output)
        with pytest.raises(HubError, match="org/name is neither a folder here nor a model on the Hub"):
            load(source, "org/name")


def test_trained_adapter_is_no_init(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = pair
    copy = Path(shutil.copytree(output, tmp_path / "out"))
    tensors = load_file(copy / ADAPTER)
    tensors[min(tensors)] += 1e-3
    save_file(tensors, copy / ADAPTER, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"give the initial adapter as decompose wrote it, not a trained one"):
        load(source, copy)


def test_init_without_manifest(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = pair
    with pytest.raises(ManifestError, match=f"has no {MANIFEST}"):
        load(source, source)
    alone = Path(shutil.copytree(output / "pissa_init", tmp_path / "pissa_init"))
    with pytest.raises(ManifestError, match=f"has no {MANIFEST}"):
        load(source, alone)
    shutil.copy(output / MANIFEST, tmp_path)
    (alone / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        load(source, alone)


def test_model_unknown_to_transformers(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    decompose(source, tmp_path / "out", rank=4, targets="q_proj")
    with pytest.raises(PlanError, match=r"is unknown to transformers; load the model and give that"):
        load(source, tmp_path / "out")


def test_unusable_arguments(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = pair
    with pytest.raises(PlanError, match="dtype cannot be set for a loaded model"):
        load(plain(source), output, dtype=torch.float32)
    with pytest.raises(PlanError, match="base is a dict; give a folder or a transformers model"):
        load({}, output)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PlanError, match=r"run `pip install 'pissa_hub\[peft\]'`"):
        load(source, output)
