"""resolve_layout against transformers and PEFT themselves, on tiny models of every supported architecture."""

import re

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from pissa_hub.model.modules import ModelLayout, WeightModule, resolve_layout
from pissa_hub.model.targets import peft_target_modules, select_targets

from .zoo import COMPOSITE, DENSE, JUDGES_OWN_WARNINGS, Saved, save, tensor_shapes, tiny_model

pytestmark = JUDGES_OWN_WARNINGS

KINDS = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
HEADS = re.compile(r"(classifier|score|qa_outputs)(\..*)?")


def layout_of(saved: Saved) -> ModelLayout:
    return resolve_layout(saved.config, saved.tensors)


def module(layout: ModelLayout, name: str) -> WeightModule:
    return next(module for module in layout.modules if module.name == name)


def lora_config(architecture: str, **settings: object) -> LoraConfig:
    return LoraConfig(r=1, fan_in_fan_out=architecture.startswith("GPT2"), **settings)


def example_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[3, 5, 7, 9]])
    inputs = {
        "input_ids": tokens,
        "pixel_values": torch.ones(1, 3, 8, 8),
        "input_features": torch.ones(1, 8, 40),
    }
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return {model.main_input_name: inputs[model.main_input_name], **decoder}


@pytest.mark.parametrize("architecture", DENSE)
def test_dense_model_is_mapped_as_transformers_and_peft_see_it(architecture, tmp_path):
    model = tiny_model(architecture)
    saved = save(model, tmp_path)
    layout = layout_of(saved)

    assert layout.note is None
    assert layout.architecture == architecture
    assert set(layout.all_module_names) == {name for name, _ in model.named_modules() if name}
    stored_weights = {name for name in saved.tensors if name.endswith(".weight")}
    assert stored_weights <= {module.tensor for module in layout.modules}
    for found in layout.modules:
        assert found.shape == saved.tensors[found.tensor]
        if found.tensor in stored_weights:
            owner = model.get_submodule(found.name)
            expected = next((kind for base, kind in KINDS.items() if isinstance(owner, base)), "other")
            assert found.kind == expected

    # Only for sequence classification does PEFT know the head; elsewhere it would adapt the head too.
    task_type = "SEQ_CLS" if "ForSequenceClassification" in architecture else None
    chosen = {target.module.name for target in select_targets(layout, rank=1)}
    peft_model = get_peft_model(model, lora_config(architecture, target_modules="all-linear", task_type=task_type))
    peft_choice = set(peft_model.targeted_module_names)
    assert chosen == {name for name in peft_choice if not HEADS.fullmatch(name)}
    assert peft_choice - chosen <= {module.name for module in layout.modules if module.is_output_head}


@pytest.mark.parametrize("architecture", [*DENSE, *COMPOSITE])
def test_adapter_by_our_names_loads_with_peft(architecture, tmp_path):
    """The promise of this package's output: from_pretrained, nothing missing, right values, right wrapper."""
    layout = layout_of(save(tiny_model(architecture), tmp_path))
    targets = select_targets(layout, rank=1)
    adapter = {}
    for target in targets:
        prefix = f"base_model.model.{target.module.name}"
        adapter[f"{prefix}.lora_A.weight"] = torch.randn(1, target.in_features)
        adapter[f"{prefix}.lora_B.weight"] = torch.randn(target.out_features, 1)
    folder = tmp_path / "init"
    config = lora_config(architecture, target_modules=peft_target_modules(layout, targets), task_type=layout.task_type)
    config.save_pretrained(folder)
    save_file(adapter, folder / "adapter_model.safetensors")

    model = getattr(transformers, layout.auto_class).from_pretrained(tmp_path)
    assert type(model).__name__ == architecture
    inputs = example_inputs(model) if architecture in DENSE else {"input_ids": torch.tensor([[3, 5, 7]])}
    with torch.no_grad():
        plain = model(**inputs)[0]
    loaded = PeftModel.from_pretrained(model, tmp_path, subfolder="init", is_trainable=True)

    assert set(loaded.base_model.targeted_module_names) == {target.module.name for target in targets}
    parameters = dict(loaded.named_parameters())
    for key, value in adapter.items():
        assert torch.equal(parameters[key.replace(".weight", ".default.weight")], value)
    assert sum(".lora_" in name for name in parameters) == len(adapter)
    with torch.no_grad():
        assert not torch.allclose(loaded.eval()(**inputs)[0], plain)


@pytest.mark.parametrize("architecture", [*DENSE, *COMPOSITE])
def test_every_tensor_that_loading_leaves_whole_has_its_key_in_memory(architecture, tmp_path):
    """The judge is the model that was saved; only experts are fused while loading."""
    model = tiny_model(architecture)
    saved = save(model, tmp_path)
    keys = layout_of(saved).keys
    state = model.state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    for tensor, key in keys.items():
        assert torch.equal(state[key], stored[tensor]), tensor
    missing = set(saved.tensors) - set(keys)
    assert all(".experts." in tensor for tensor in missing)
    assert bool(missing) == (architecture in {"MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"})
    biases = {name for name in saved.tensors if name.endswith(".bias")}
    assert biases <= set(keys)


def test_tensor_that_the_model_ignores_has_no_key(tmp_path):
    saved = save(tiny_model("BertModel"), tmp_path)
    layout = resolve_layout(saved.config, {**saved.tensors, "cls.predictions.bias": (48,)})
    assert set(layout.keys) == set(saved.tensors)


@pytest.mark.parametrize(
    ("architecture", "auto_class", "task_type"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM"),
        ("LlamaModel", "AutoModel", "FEATURE_EXTRACTION"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        ("T5EncoderModel", "AutoModelForTextEncoding", "FEATURE_EXTRACTION"),
        ("BertForMaskedLM", "AutoModelForMaskedLM", None),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", None),
        ("BertForTokenClassification", "AutoModelForTokenClassification", None),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering", None),
        ("ViTModel", "AutoModel", None),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq", None),
        ("Gemma3ForConditionalGeneration", "AutoModelForImageTextToText", None),
    ],
)
def test_class_to_load_with(architecture, auto_class, task_type, tmp_path):
    layout = layout_of(save(tiny_model(architecture), tmp_path))
    assert (layout.auto_class, layout.task_type) == (auto_class, task_type)


def test_class_without_an_auto_class_is_named_itself(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48)
    layout = layout_of(save(transformers.GPT2DoubleHeadsModel(config), tmp_path))
    assert layout.auto_class == layout.architecture == "GPT2DoubleHeadsModel"


def test_modules_keep_the_order_of_the_checkpoint():
    config = {**tiny_model("LlamaForCausalLM").config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    tensors = {
        "model.layers.1.mlp.up_proj.weight": (24, 16),
        "lm_head.weight": (48, 16),
        "model.layers.0.mlp.up_proj.weight": (24, 16),
    }
    layout = resolve_layout(config, tensors)
    assert [module.tensor for module in layout.modules] == list(tensors)


@pytest.mark.parametrize(
    ("architecture", "head", "embedding"),
    [
        ("LlamaForCausalLM", "lm_head", "model.embed_tokens"),
        ("T5ForConditionalGeneration", "lm_head", "shared"),
        ("WhisperForConditionalGeneration", "proj_out", "model.decoder.embed_tokens"),
    ],
)
def test_tied_head_is_seen_from_both_sides(architecture, head, embedding, tmp_path):
    saved = save(tiny_model(architecture, tie_word_embeddings=True), tmp_path)
    assert f"{head}.weight" not in saved.tensors
    assert head in module(layout_of(saved), embedding).tied_with

    both = {**saved.tensors, f"{head}.weight": saved.tensors[f"{embedding}.weight"]}
    layout = resolve_layout(saved.config, both)
    stored_head = module(layout, head)
    assert stored_head.is_output_head
    assert embedding in stored_head.tied_with
    assert head not in {target.module.name for target in select_targets(layout, rank=1)}


def test_untied_head_is_tied_with_nothing(tmp_path):
    layout = layout_of(save(tiny_model("LlamaForCausalLM", tie_word_embeddings=False), tmp_path))
    assert all(module.tied_with == () for module in layout.modules)
    assert [module.name for module in layout.modules if module.is_output_head] == ["lm_head"]


def test_gpt2_of_the_hub_lacks_the_prefix(tmp_path):
    saved = save(tiny_model("GPT2LMHeadModel"), tmp_path)
    headless = {name.removeprefix("transformer."): shape for name, shape in saved.tensors.items()}
    layout = resolve_layout(saved.config, headless)
    found = module(layout, "transformer.h.0.mlp.c_fc")
    assert (found.tensor, found.kind, found.shape) == ("h.0.mlp.c_fc.weight", "conv1d", (16, 64))


@pytest.mark.parametrize(
    ("stored_as", "loaded_as", "tensor", "name"),
    [
        ("BertModel", "BertForMaskedLM", "encoder.layer.0.output.dense", "bert.encoder.layer.0.output.dense"),
        ("BertForMaskedLM", "BertModel", "bert.encoder.layer.0.output.dense", "encoder.layer.0.output.dense"),
        ("LlamaModel", "LlamaForCausalLM", "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("LlamaForCausalLM", "LlamaModel", "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
    ],
)
def test_base_weights_under_another_head(stored_as, loaded_as, tensor, name, tmp_path):
    saved = save(tiny_model(stored_as), tmp_path)
    layout = resolve_layout({**saved.config, "architectures": [loaded_as]}, saved.tensors)
    assert layout.architecture == loaded_as
    assert module(layout, name).tensor == f"{tensor}.weight"


def test_old_bert_names_are_mapped_or_left_out(tmp_path):
    saved = save(tiny_model("BertForMaskedLM"), tmp_path)
    old = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name): shape for name, shape in saved.tensors.items()}
    layout = resolve_layout(saved.config, {**old, "cls.seq_relationship.weight": (2, 16)})
    assert module(layout, "bert.embeddings.LayerNorm").tensor == "bert.embeddings.LayerNorm.gamma"
    assert "cls.seq_relationship.weight" not in {module.tensor for module in layout.modules}
    assert layout.note is None


def test_old_vit_names_are_mapped_to_those_in_memory(tmp_path):
    model = tiny_model("ViTModel")
    layout = layout_of(save(model, tmp_path))
    query = "encoder.layer.0.attention.attention.query.weight"
    config = {**model.config.to_dict(), "architectures": ["ViTModel"]}
    found = resolve_layout(config, {query: (16, 16)}).modules[0]
    assert found.name in {module.name for module in layout.modules}


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_fused_experts_and_routers_are_out_of_reach(architecture, tmp_path):
    model = tiny_model(architecture)
    saved = save(model, tmp_path)
    layout = layout_of(saved)
    experts = [module for module in layout.modules if ".experts." in module.name]
    assert len(experts) == sum(".experts." in name for name in saved.tensors)
    assert {module.kind for module in experts} == {"other"}
    routers = [module for module in layout.modules if module.name.endswith(".gate")]
    assert routers
    assert {module.kind for module in routers} == {"other"}

    peft_model = get_peft_model(model, lora_config(architecture, target_modules="all-linear"))
    chosen = {target.module.name for target in select_targets(layout, rank=1)}
    lost = set(peft_model.targeted_module_names) - chosen
    assert chosen <= set(peft_model.targeted_module_names)
    # Older PEFT adapts dense layers named like the experts; newer PEFT takes those names for the experts'.
    assert {name.rpartition(".")[2] for name in lost} <= {"gate_proj", "up_proj", "down_proj"}


def test_out_projection_of_torch_attention_is_out_of_reach(tmp_path):
    """torch.nn.MultiheadAttention reads its out_proj.weight directly: a LoRA layer there has no effect."""
    layout = layout_of(save(tiny_model("LlavaForConditionalGeneration"), tmp_path))
    out_projections = {module.name: module.kind for module in layout.modules if module.name.endswith("out_proj")}
    assert {kind for name, kind in out_projections.items() if ".head." in name} == {"other"}
    assert {kind for name, kind in out_projections.items() if ".layers." in name} == {"linear"}


def test_packed_weight_is_out_of_reach_and_its_scales_are_left_out(tmp_path):
    saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
    name = "model.layers.0.mlp.up_proj"
    packed = {**saved.tensors, f"{name}.weight": (192, 1), f"{name}.weight_scale_inv": (1, 1)}
    quantised = {
        **saved.config,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    layout = resolve_layout(quantised, packed)
    assert module(layout, name).kind == "other"
    assert "in memory" in module(layout, name).what
    assert f"{name}.weight_scale_inv" not in {module.tensor for module in layout.modules}


UNKNOWN_TENSORS = {
    "tower.embed_tokens.weight": (48, 16),
    "tower.wte.weight": (48, 16),
    "tower.0.proj.weight": (24, 16),
    "tower.0.norm.weight": (16,),
    "tower.0.proj.bias": (24,),
    "tower.0.scales": (4, 4),
    "lm_head.weight": (48, 16),
}


class TestWithoutAModel:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (None, "no config.json"),
            ({}, "without a known model_type is unknown"),
            ({"model_type": "nonesuch"}, "'nonesuch' is unknown"),
            ({"model_type": "nonesuch", "auto_map": {"AutoModel": "m.M"}}, "remote code, which is never run"),
            ({"model_type": "llama", "architectures": ["LlamaModel"], "hidden_size": "wide"}, "rejects"),
            ({"model_type": "llama", "architectures": ["LlamaModel"]}, "no tensor has a place in LlamaModel"),
        ],
    )
    def test_weights_go_by_their_checkpoint_names(self, config, reason):
        layout = resolve_layout(config, UNKNOWN_TENSORS)
        assert reason in layout.note
        assert layout.note.endswith("so 2-D weights were taken by their checkpoint names")
        assert "\n" not in layout.note
        assert (layout.architecture, layout.auto_class, layout.task_type) == (None, "AutoModel", None)
        assert layout.keys == {tensor: tensor for tensor in UNKNOWN_TENSORS}
        kinds = {module.name: module.kind for module in layout.modules}
        assert kinds == {
            "tower.embed_tokens": "embedding",
            "tower.wte": "embedding",
            "tower.0.proj": "linear",
            "lm_head": "linear",
        }
        assert [target.module.name for target in select_targets(layout, rank=1)] == ["tower.0.proj"]


class TestLoadersOwnSteps:
    """transformers' loader undoes a renaming that leads nowhere, and renames in sorted order."""

    def test_renaming_into_nothing_is_undone(self, tmp_path, monkeypatch):
        saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
        steps = [WeightRenaming("mlp.up_proj", "mlp.gone")]
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: steps)
        found = module(layout_of(saved), "model.layers.0.mlp.up_proj")
        assert found.tensor == "model.layers.0.mlp.up_proj.weight"

    def test_names_are_renamed_in_sorted_order(self, tmp_path, monkeypatch):
        saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
        seen = []

        class Recorder:
            def rename_source_key(self, key):
                seen.append(key)
                return key, None

        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [Recorder()])
        backwards = dict(sorted(saved.tensors.items(), reverse=True))
        layout = resolve_layout(saved.config, backwards)
        assert seen == sorted(saved.tensors)
        assert [module.tensor for module in layout.modules] == list(backwards)


class TestConfig:
    def test_native_class_beats_remote_code(self, tmp_path):
        saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
        config = {**saved.config, "auto_map": {"AutoModelForCausalLM": "evil--modeling.Llama"}}
        assert resolve_layout(config, saved.tensors).architecture == "LlamaForCausalLM"

    @pytest.mark.parametrize(
        ("architectures", "expected"),
        [
            (["MyLlamaForCausalLM"], "LlamaForCausalLM"),
            (["MistralForCausalLM"], "LlamaForCausalLM"),
            (["MyLlama"], "LlamaModel"),
            (None, "LlamaModel"),
        ],
    )
    def test_class_by_model_type_and_kind_of_head(self, architectures, expected, tmp_path):
        saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
        config = {**saved.config, "architectures": architectures}
        assert resolve_layout(config, saved.tensors).architecture == expected

    def test_without_model_type_the_architecture_tells(self, tmp_path):
        saved = save(tiny_model("BertModel"), tmp_path)
        config = {key: value for key, value in saved.config.items() if key != "model_type"}
        assert resolve_layout(config, saved.tensors).architecture == "BertModel"

    def test_kernels_and_backbones_are_not_fetched(self, tmp_path):
        saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
        config = {**saved.config, "attn_implementation": "flash_attention_2", "use_pretrained_backbone": True}
        assert resolve_layout(config, saved.tensors).note is None

    def test_config_is_left_as_it_is(self, tmp_path):
        saved = save(tiny_model("Gemma3ForConditionalGeneration"), tmp_path)
        before = repr(saved.config)
        layout_of(saved)
        assert repr(saved.config) == before


def test_shapes_come_from_the_headers(tmp_path):
    saved = save(tiny_model("BertModel"), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert tensor_shapes(tmp_path) == {name: tuple(value.shape) for name, value in stored.items()}
    assert saved.tensors == tensor_shapes(tmp_path)
