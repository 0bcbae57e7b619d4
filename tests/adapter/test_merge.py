"""merge, judged by transformers and PEFT: the result computes what the residual with the trained adapter does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pissa_hub import convert, decompose, merge, restore
from pissa_hub.errors import AdapterError, PlanError

from ..conftest import SHARDED, Factory
from ..helpers import MANIFEST, deviation, files_of, header_bytes, outputs_of, run_cli, tensors_of
from .kinds import DORA, FURTHER, KINDS, LINEAR, PEFT_OWN, Kind
from .trained import CONFIG, OLD_PEFT, PEFTS_OWN_WARNINGS, WEIGHTS, Trained, Training, dense_updates, load

pytestmark = PEFTS_OWN_WARNINGS

CONFIG_JSON = "config.json"
INDEX = "model.safetensors.index.json"
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PLAIN = LINEAR["plain"]
BF16 = Kind(settings={"dtype": torch.bfloat16})

EXPERTS = {name: kind for name, kind in FURTHER.items() if "experts" in name}
TIED = {"tie_word_embeddings": True}
VLM = {"targets": r"re:.*language_model.*\.(q_proj|v_proj)"}
MORE = {
    "DoRA": DORA,
    "DoRA, rsLoRA, rank_pattern and alpha": Kind(
        decompose={"rank_pattern": {"q_proj": 6}, "alpha": 7, "use_rslora": True}, config={"use_dora": True}
    ),
    "DoRA of GPT-2": Kind("GPT2LMHeadModel", config={"use_dora": True}),
    "DoRA of an embedding": Kind(config={"use_dora": True}, also=("embed_tokens",)),
    "DoRA of a convolution": Kind("ViTModel", config={"use_dora": True}, also=("projection",)),
    "whole embedding, tied": Kind(settings=TIED, config={"modules_to_save": ["embed_tokens"]}),
    "whole output head, tied": Kind(settings=TIED, config={"modules_to_save": ["lm_head"]}),
    "whole embedding and output head, tied": Kind(
        settings=TIED, config={"modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "whole embedding of GPT-2": Kind("GPT2LMHeadModel", config={"modules_to_save": ["wte"]}),
    "output head, tied": Kind(settings=TIED, also=("lm_head",)),
    "embedding and output head, tied": Kind(settings=TIED, also=("embed_tokens", "lm_head")),
    "whole embedding, tied and trained as one": Kind(
        settings=TIED, config={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "embedding, tied and trained as one": Kind(
        settings=TIED, config={"ensure_weight_tying": True}, also=("embed_tokens",)
    ),
    "tokens, tied": Kind(settings=TIED, config={"trainable_token_indices": [3, 7, 11]}),
    "tokens of GPT-2": Kind("GPT2LMHeadModel", config={"trainable_token_indices": {"wte": [5, 1]}}),
    "DoRA of a tied embedding": Kind(settings=TIED, config={"use_dora": True}, also=("embed_tokens",)),
    "whole norm": Kind(config={"modules_to_save": ["norm"]}),
    "VLM": Kind("Gemma3ForConditionalGeneration", decompose=VLM),
    "whole embedding of a VLM": Kind(
        "Gemma3ForConditionalGeneration", decompose=VLM, config={"modules_to_save": ["embed_tokens"]}
    ),
    "sharded": Kind(settings={"shard_size": SHARDED}),
    "sharded, tied and embedding": Kind(settings={"shard_size": SHARDED, **TIED}, also=("embed_tokens",)),
    "head of GPT-NeoX": Kind("GPTNeoXForCausalLM", also=("embed_out",)),
    "several shards of GPT-2": Kind("GPT2LMHeadModel", settings={"shard_size": "8KB"}, config={"bias": "all"}),
}
# Only one of two modules that share a weight was trained, or not both alike.
UNTIED = [
    "tied embedding",
    "whole embedding, tied",
    "whole output head, tied",
    "whole embedding and output head, tied",
    "whole embedding of GPT-2",
    "output head, tied",
    "embedding and output head, tied",
    "DoRA of a tied embedding",
    "whole embedding of a VLM",
    "sharded, tied and embedding",
]
# PEFT merges into the weight that both share.
PEFT_WRONG = [
    "tied embedding",
    "output head, tied",
    "embedding and output head, tied",
    "embedding, tied and trained as one",
    "DoRA of a tied embedding",
    "sharded, tied and embedding",
]
MERGED = {**LINEAR, **{name: kind for name, kind in FURTHER.items() if name not in EXPERTS}, **MORE}


def loaded(folder: Path, done: Trained) -> Any:
    return getattr(transformers, done.auto_class).from_pretrained(folder)


def merged_weights(done: Trained) -> dict[str, Tensor]:
    """W_res + s B A of every adapted Linear from the files, dense, in float64; tensor and module names are the same."""
    assert done.base is not None
    base, updates = tensors_of(done.base), dense_updates(done.adapter)
    return {f"{module}.weight": base[f"{module}.weight"].double() + update for module, update in updates.items()}


def rewritten(adapter: Path, target: Path, change: Callable[[dict[str, Tensor]], None], **fields: Any) -> Path:
    """A copy of an adapter, its tensors and config changed."""
    shutil.copytree(adapter, target)
    tensors = load_file(target / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    config = json.loads((target / CONFIG).read_bytes())
    (target / CONFIG).write_text(json.dumps({**config, **fields}))
    return target


def nothing(tensors: dict[str, Tensor]) -> None:
    """Leaves the tensors as they are."""


@pytest.fixture(scope="module")
def merged(trained: Training, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``merged(name)``: the result for a kind, for reading only."""
    made: dict[str, Path] = {}

    def factory(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("merged") / "merged"
            merge(trained(MERGED[name]).base, trained(MERGED[name]).adapter, made[name])
        return made[name]

    return factory


Result = Callable[[str], Path]


@pytest.mark.parametrize("name", MERGED)
def test_the_result_computes_what_the_adapter_did(trained: Training, merged: Result, name: str) -> None:
    done = trained(MERGED[name])
    assert deviation(outputs_of(loaded(done.source, done)), done.expected) > 5e-3
    assert deviation(outputs_of(loaded(merged(name), done)), done.expected) <= 1e-5


@pytest.mark.skipif(OLD_PEFT, reason="says what newer versions of PEFT do")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("name", MERGED)
def test_the_result_is_what_peft_merges(trained: Training, merged: Result, tmp_path: Path, name: str) -> None:
    """Tensor by tensor, where PEFT does it right."""
    done = trained(MERGED[name])
    assert done.base is not None
    judge = load(done.base, done.adapter, done.auto_class).merge_and_unload()
    if name in PEFT_WRONG:
        assert deviation(outputs_of(judge), done.expected) > 1e-2
        return
    judge.save_pretrained(tmp_path)
    ours, theirs = tensors_of(merged(name)), tensors_of(tmp_path)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert deviation(ours[tensor], expected) < 1e-6, tensor


@pytest.mark.parametrize("name", sorted(MERGED.keys() - UNTIED))
def test_the_layout_is_the_originals(trained: Training, merged: Result, name: str) -> None:
    """Names, shapes, dtypes and their order in every shard; the config and the index."""
    source, result = trained(MERGED[name]).source, merged(name)
    assert not json.loads((result / "pissa_merge.json").read_bytes())["notes"]
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            assert header_bytes(result / path.name) == header_bytes(path)
        else:
            assert (result / path.name).read_bytes() == path.read_bytes(), path.name
    assert files_of(result).keys() == files_of(source).keys() | {"README.md", "pissa_merge.json"}


@pytest.mark.parametrize("name", LINEAR)
def test_what_was_not_trained_is_the_originals(trained: Training, merged: Result, name: str) -> None:
    done = trained(LINEAR[name])
    assert done.base is not None
    source, residual, result = (tensors_of(folder) for folder in (done.source, done.base, merged(name)))
    untouched = [tensor for tensor in source if torch.equal(source[tensor], residual[tensor])]
    assert 0 < len(untouched) < len(source)
    for tensor in source:
        assert torch.equal(source[tensor], result[tensor]) == (tensor in untouched), tensor


@pytest.mark.parametrize("name", UNTIED)
def test_a_tie_is_given_up_where_the_two_were_not_trained_alike(merged: Result, name: str) -> None:
    result = merged(name)
    tensors = tensors_of(result)
    config = json.loads((result / CONFIG_JSON).read_bytes())
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", {}).get("tie_word_embeddings", False) is False
    assert "tie_word_embeddings is false" in " ".join(json.loads((result / "pissa_merge.json").read_bytes())["notes"])
    assert "lm_head.weight" in tensors
    if (result / INDEX).exists():
        index = json.loads((result / INDEX).read_bytes())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["plain", "rsLoRA, rank_pattern and alpha", "GPT-2", "embedding", "lora_bias", "T5"])
def test_a_converted_adapter_merges_into_the_original(trained: Training, tmp_path: Path, name: str) -> None:
    done = trained(KINDS[name])
    convert(done.adapter, done.init, tmp_path / "lora")
    merge(done.source, tmp_path / "lora", tmp_path / "merged")
    assert deviation(outputs_of(loaded(tmp_path / "merged", done)), done.expected) <= 1e-5


@pytest.mark.parametrize("name", PEFT_OWN)
def test_so_does_one_whose_initial_state_peft_made(trained: Training, tmp_path: Path, name: str) -> None:
    """Its residual was never on a disk."""
    done = trained(PEFT_OWN[name])
    convert(done.adapter, done.init, tmp_path / "lora")
    merge(done.source, tmp_path / "lora", tmp_path / "merged")
    assert deviation(outputs_of(loaded(tmp_path / "merged", done)), done.expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", [None, SHARDED])
@pytest.mark.parametrize("residual_dtype", ["source", "float32"])
def test_an_untrained_adapter_gives_the_original_back(
    tiny_checkpoint: Factory, tmp_path: Path, dtype: torch.dtype, shard_size: str | None, residual_dtype: str
) -> None:
    """To the roundings of residual and result; all of it with a residual wider than the original."""
    source = tiny_checkpoint(dtype=dtype, shard_size=shard_size)
    decompose(source, tmp_path / "residual", rank=4, residual_dtype=residual_dtype)
    merge(tmp_path / "residual", tmp_path / "residual" / "pissa_init", tmp_path / "merged")
    before, after, residual = tensors_of(source), tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "residual")
    for tensor, weight in before.items():
        if residual[tensor].equal(weight) or (residual_dtype == "float32" and dtype != torch.float32):
            assert torch.equal(after[tensor], weight), tensor
        bound = 1.01 * UNIT_ROUNDOFF[dtype] * (residual[tensor].abs() + after[tensor].abs()).double() + 1e-7
        assert bool(((after[tensor].double() - weight.double()).abs() <= bound).all()), tensor
    files, originals = files_of(tmp_path / "merged"), files_of(source)
    assert files.keys() == originals.keys() | {"README.md", "pissa_merge.json"}
    for name in originals:
        if name.endswith(".safetensors"):
            assert header_bytes(tmp_path / "merged" / name) == header_bytes(source / name)
        else:
            assert files[name] == originals[name], name


@pytest.mark.parametrize(
    "kind", [BF16, Kind(settings={"dtype": torch.bfloat16}, decompose={"residual_dtype": "float32"})]
)
@pytest.mark.parametrize("dtype", ["source", "float32", "bfloat16", "float16"])
def test_the_dtype_of_the_result(trained: Training, tmp_path: Path, kind: Kind, dtype: str) -> None:
    """Every weight is the exact sum, rounded to it once; by way of fp32."""
    done = trained(kind)
    merge(done.base, done.adapter, tmp_path / "merged", dtype=dtype)
    name = "bfloat16" if dtype == "source" else dtype
    merged = tensors_of(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.values()} == {getattr(torch, name)}
    for tensor, expected in merged_weights(done).items():
        assert torch.equal(merged[tensor], expected.float().to(getattr(torch, name))), tensor
    for tensor, weight in tensors_of(done.source).items():
        if tensor not in merged_weights(done):
            assert torch.equal(merged[tensor], weight.to(getattr(torch, name))), tensor
    assert json.loads((tmp_path / "merged" / CONFIG_JSON).read_bytes())["dtype"] == name
    model = loaded(tmp_path / "merged", done)
    assert model.dtype == getattr(torch, name)
    assert deviation(outputs_of(model).float(), done.expected.float()) < 3e-2


def test_a_sharded_result_of_another_dtype_has_its_own_sizes_in_the_index(trained: Training, tmp_path: Path) -> None:
    done = trained(MORE["sharded"])
    merge(done.base, done.adapter, tmp_path / "merged", dtype="bfloat16")
    index = json.loads((tmp_path / "merged" / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "merged").values())
    assert index["weight_map"] == json.loads((done.source / INDEX).read_bytes())["weight_map"]
    assert deviation(outputs_of(loaded(tmp_path / "merged", done)).float(), done.expected) < 3e-2


def test_a_config_that_holds_infinity_stays_as_lenient(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / CONFIG_JSON).read_bytes())
    (source / CONFIG_JSON).write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    decompose(source, tmp_path / "residual", rank=4)
    merge(tmp_path / "residual", tmp_path / "residual" / "pissa_init", tmp_path / "merged", dtype="bfloat16")
    merged = json.loads((tmp_path / "merged" / CONFIG_JSON).read_bytes())
    assert merged == {**config, "time_step_limit": [0.0, float("inf")], "dtype": "bfloat16"}


@pytest.mark.parametrize("dtype", ["source", "bfloat16"])
def test_tensors_that_are_no_floats_are_left_alone(source: Path, tmp_path: Path, dtype: str) -> None:
    path = min(source.glob("*.safetensors"))
    extra = {"extra.ids": torch.arange(3), "extra.mask": torch.ones(2, dtype=torch.bool), "extra.none": torch.empty(0)}
    save_file({**load_file(path), **extra}, path, {"format": "pt"})
    index = json.loads((source / INDEX).read_bytes())
    index["weight_map"] |= dict.fromkeys(extra, path.name)
    (source / INDEX).write_text(json.dumps(index))
    decompose(source, tmp_path / "residual", rank=4)
    merge(tmp_path / "residual", tmp_path / "residual" / "pissa_init", tmp_path / "merged", dtype=dtype)
    merged = tensors_of(tmp_path / "merged")
    assert torch.equal(merged["extra.ids"], extra["extra.ids"])
    assert torch.equal(merged["extra.mask"], extra["extra.mask"])
    assert merged["extra.none"].dtype == (torch.float32 if dtype == "source" else torch.bfloat16)


def test_a_new_head_is_written_too(trained: Training, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """The base is a causal model; the adapter was trained in a classifier made of it."""
    done = trained(KINDS["head of Llama"])
    base = tmp_path / "base"
    decompose(tiny_checkpoint(), base, rank=4)
    tensors = load_file(base / "pissa_init" / WEIGHTS)
    head = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    tensors["base_model.model.score.weight"] = head
    adapter = rewritten(base / "pissa_init", tmp_path / "adapter", lambda before: before.update(tensors))
    notes = merge(base, adapter, tmp_path / "merged").record.notes
    assert torch.equal(tensors_of(tmp_path / "merged")["score.weight"], head)
    assert any("score.weight is new" in note for note in notes)
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=2)
    assert torch.equal(model.score.weight, head)
    assert done.auto_class == "AutoModelForSequenceClassification"


def test_a_tied_weight_that_the_adapter_has_under_both_names_stays_one(trained: Training, tmp_path: Path) -> None:
    """PEFT saves embedding and output head whole where the vocabulary was touched."""
    done = trained(MORE["tokens, tied"])
    base = done.init
    weight = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[f"base_model.model.{name}"] = weight.clone()

    adapter = rewritten(base / "pissa_init", tmp_path / "adapter", add)
    assert not merge(base, adapter, tmp_path / "merged").record.notes
    assert torch.equal(tensors_of(tmp_path / "merged")["model.embed_tokens.weight"], weight)
    assert tensors_of(tmp_path / "merged").keys() == tensors_of(done.source).keys()


def test_a_restored_residual_merges_as_the_decomposed_one(trained: Training, tmp_path: Path) -> None:
    """What was published is the manifest and the initial adapter."""
    done = trained(PLAIN)
    (tmp_path / "published").mkdir()
    shutil.copy(done.init / MANIFEST, tmp_path / "published")
    shutil.copy(done.init / "README.md", tmp_path / "published")
    shutil.copytree(done.init / "pissa_init", tmp_path / "published" / "pissa_init")
    restore(done.source, tmp_path / "published", tmp_path / "restored")
    merge(tmp_path / "restored", done.adapter, tmp_path / "merged")
    merge(done.base, done.adapter, tmp_path / "reference")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "reference")


def test_the_result_can_be_decomposed_again(trained: Training, tmp_path: Path) -> None:
    done = trained(PLAIN)
    merge(done.base, done.adapter, tmp_path / "merged")
    decompose(tmp_path / "merged", tmp_path / "again", rank=4)
    assert not (tmp_path / "again" / "pissa_merge.json").exists()
    model = load(tmp_path / "again", tmp_path / "again" / "pissa_init")
    assert deviation(outputs_of(model), done.expected) <= 1e-5


def test_the_record_names_all_that_went_in_and_out(trained: Training, tmp_path: Path) -> None:
    done = trained(MORE["sharded"])
    record = merge(done.base, done.adapter, tmp_path / "merged").record
    assert record.to_bytes() == (tmp_path / "merged" / "pissa_merge.json").read_bytes()
    assert record.shards.keys() == {path.name for path in done.source.glob("*.safetensors")}
    assert record.adapter.keys() == {WEIGHTS, CONFIG}
    assert record.files.keys() == files_of(tmp_path / "merged").keys() - {"pissa_merge.json"}
    for content in files_of(tmp_path / "merged").values():
        assert str(tmp_path.parent).encode() not in content, "the folder names a folder of this machine"


# Each of these is one line, names what is wrong, and leaves nothing behind.


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(base, adapter, *options)``: the error."""

    def run(base: Path, adapter: Path, *options: object) -> str:
        before = files_of(tmp_path)
        error = run_cli(capfd, "merge", base, adapter, "-o", tmp_path / "deep" / "merged", *options).error
        assert files_of(tmp_path) == before
        assert not (tmp_path / "deep").exists()
        return error

    return run


Refused = Callable[..., str]


@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_refused(trained: Training, refused: Refused, name: str) -> None:
    done = trained(EXPERTS[name])
    assert done.base is not None
    error = refused(done.base, done.adapter)
    assert "adapts fused experts" in error
    assert "merge_and_unload" in error


def test_a_shared_weight_that_transformers_could_not_untie_is_refused(trained: Training, refused: Refused) -> None:
    """A masked head shares its bias, too."""
    done = trained(Kind("BertForMaskedLM", config={"modules_to_save": ["word_embeddings"]}))
    assert done.base is not None
    error = refused(done.base, done.adapter)
    assert "word_embeddings.weight is the weight of cls.predictions.decoder.weight too" in error


def test_a_converted_adapter_is_refused_on_the_residual(trained: Training, tmp_path: Path, refused: Refused) -> None:
    done = trained(PLAIN)
    convert(done.adapter, done.init, tmp_path / "lora")
    assert "is a residual base; give the original checkpoint" in refused(done.base, tmp_path / "lora")


def test_a_trained_adapter_is_refused_on_the_original(trained: Training, refused: Refused) -> None:
    done = trained(PLAIN)
    error = refused(done.source, done.adapter)
    assert "give the folder that decompose wrote" in error


@pytest.mark.parametrize("name", PEFT_OWN)
def test_an_adapter_without_a_residual_is_refused(trained: Training, refused: Refused, name: str) -> None:
    done = trained(PEFT_OWN[name])
    assert "no adapter that convert wrote" in refused(done.source, done.adapter)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-5}, {"rope_theta": 9.0}])
def test_an_adapter_of_another_base_is_refused(
    trained: Training, tiny_checkpoint: Factory, tmp_path: Path, refused: Refused, change: dict[str, float]
) -> None:
    """Of the same shapes: the content of its factors tells."""
    done = trained(PLAIN)
    source = Path(shutil.copytree(tiny_checkpoint(**change), tmp_path / "source"))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor if tensor.dim() < 2 else 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    decompose(source, tmp_path / "other", rank=4)
    adapter = rewritten(done.adapter, tmp_path / "adapter", nothing, base_model_name_or_path=None)
    assert "was not trained from" in refused(tmp_path / "other", adapter)
    assert "is another decomposition than" in refused(tmp_path / "other", done.adapter)
    merge(tmp_path / "other", adapter, tmp_path / "trusted", trust_init=True)


def test_a_converted_adapter_of_another_base_is_refused(
    trained: Training, tiny_checkpoint: Factory, tmp_path: Path, refused: Refused
) -> None:
    done = trained(PLAIN)
    convert(done.adapter, done.init, tmp_path / "lora")
    same_sizes = Path(shutil.copytree(done.source, tmp_path / "changed"))
    tensors = load_file(same_sizes / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, same_sizes / "model.safetensors", {"format": "pt"})
    for base in (same_sizes, tiny_checkpoint(shard_size=SHARDED), tiny_checkpoint(dtype=torch.bfloat16)):
        assert "is not what pissa_conversion.json names" in refused(base, tmp_path / "lora")


def test_a_damaged_residual_is_refused(trained: Training, tmp_path: Path, refused: Refused) -> None:
    done = trained(MORE["sharded"])
    assert done.base is not None
    base = Path(shutil.copytree(done.base, tmp_path / "base"))
    shard = max(base.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"{shard} is not what pissa_manifest.json names" in refused(base, done.adapter)
    shard.write_bytes(data[:-1])
    assert "truncated" in refused(base, done.adapter)


def test_a_residual_without_its_manifest_is_refused(trained: Training, tmp_path: Path, refused: Refused) -> None:
    done = trained(PLAIN)
    assert done.base is not None
    base = Path(shutil.copytree(done.base, tmp_path / "base"))
    (base / MANIFEST).unlink()
    assert f"has no {MANIFEST}" in refused(base, done.adapter)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def _of_another_width(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.ones(4, 7)


def _without_a_module(tensors: dict[str, Tensor]) -> None:
    for side in "AB":
        del tensors[f"{LAYER}.lora_{side}.weight"]


def _not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.weight"][1, 1] = float("nan")


def _infinite_head(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.full((80, 64), float("inf"))


def _larger_vocabulary(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(90, 64)


def _bias_that_the_base_lacks(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.bias"] = torch.ones(64)


def _short_magnitude(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_magnitude_vector"] = torch.ones(3)


def _tokens(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(2, 64)


def _narrow_tokens(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.ones(2, 32)


def _unknown_module(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 64)
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(96, 4)


@pytest.mark.parametrize(
    ("change", "fields", "error"),
    [
        (_of_another_width, {}, "q_proj is [64, 7] in"),
        (_without_a_module, {}, "lacks model.layers.0.self_attn.q_proj"),
        (_unknown_module, {}, "the base holds no model.layers.7.mlp.up_proj.weight"),
        (_not_a_number, {}, "q_proj.lora_B.weight"),
        (_infinite_head, {}, "lm_head.weight"),
        (_larger_vocabulary, {}, "if its vocabulary was resized, merge it with PEFT's merge_and_unload"),
        (_bias_that_the_base_lacks, {"lora_bias": True}, "q_proj, which has none in the base"),
        (_short_magnitude, {"use_dora": True}, "has 3 lengths for 64 outputs"),
        (_tokens, {}, "does not say which 2 tokens of model.embed_tokens"),
        (_tokens, {"trainable_token_indices": [1]}, "does not say which 2 tokens"),
        (_tokens, {"trainable_token_indices": [1, 80]}, "trained tokens that model.embed_tokens lacks"),
        (_narrow_tokens, {"trainable_token_indices": [1, 2]}, "trained tokens that model.embed_tokens lacks"),
        (nothing, {"use_qalora": True}, "uses QALoRA"),
        (nothing, {"r": 8}, "where adapter_config.json says rank 8"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--trust-init",)])
def test_an_adapter_that_does_not_fit_is_refused(
    trained: Training,
    tmp_path: Path,
    refused: Refused,
    change: Callable[[dict[str, Tensor]], None],
    fields: dict[str, Any],
    error: str,
    options: tuple[str, ...],
) -> None:
    done = trained(PLAIN)
    adapter = rewritten(done.adapter, tmp_path / "adapter", change, **fields)
    assert error in refused(done.base, adapter, *options)


@pytest.mark.parametrize("where", ["factors", "embedding"])
def test_values_beyond_the_range_of_the_result_are_refused(
    trained: Training, tmp_path: Path, refused: Refused, where: str
) -> None:
    """An infinity in a weight would be silent."""
    done = trained(PLAIN)

    def change(tensors: dict[str, Tensor]) -> None:
        if where == "factors":
            tensors[f"{LAYER}.lora_B.weight"] *= 1e7
        else:
            tensors["base_model.model.model.embed_tokens.weight"] = torch.full((80, 64), 1e6)

    adapter = rewritten(done.adapter, tmp_path / "adapter", change)
    error = refused(done.base, adapter, "--dtype", "float16")
    assert "is beyond the range of torch.float16 once merged; choose a wider --dtype" in error
    merge(done.base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_an_output_in_an_input_is_refused(
    trained: Training, tmp_path: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    done = trained(PLAIN)
    assert done.base is not None
    inputs = {"base": done.base, "adapter": done.adapter}
    before = files_of(inputs[place])
    output = inputs[place] / "merged"
    assert f"lies in the {place}" in run_cli(capfd, "merge", done.base, done.adapter, "-o", output).error
    assert files_of(inputs[place]) == before


def test_somebody_elses_files_are_left_alone(trained: Training, tmp_path: Path) -> None:
    done = trained(PLAIN)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(PlanError, match="dtype 'int8' cannot be used"):
        merge(done.base, done.adapter, tmp_path, dtype="int8")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        merge(done.base, done.source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
