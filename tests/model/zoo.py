"""Tiny random models of every supported architecture, saved as transformers saves them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors import safe_open

# What transformers and PEFT, the judges here, warn of among themselves: deprecations in both, and in PEFT the
# patterns that it makes for experts.
JUDGES_OWN_WARNINGS = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

# fmt: off
IDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**TEXT, **IDS, "num_key_value_heads": 1}
GEMMA = {**GROUPED, "head_dim": 8}
GPT2 = {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 2}
OPT = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
       "word_embed_proj_dim": 8, "max_position_embeddings": 32}
ENCODER = {**TEXT, **IDS, "max_position_embeddings": 40}
WHISPER = {**IDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
           "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1,
           "suppress_tokens": None, "begin_suppress_tokens": None}
T5 = {**IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
VIT = {**TEXT, "image_size": 8, "patch_size": 4}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {**EXPERTS, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8}
SIGLIP = {**VIT, "model_type": "siglip_vision_model"}
GEMMA3 = {"text_config": {**GEMMA, "model_type": "gemma3_text"}, "vision_config": SIGLIP,
          "mm_tokens_per_image": 4}
LLAVA = {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": SIGLIP}
# fmt: on

# Architecture -> settings of its config class.
DENSE = {
    "LlamaForCausalLM": GROUPED,
    "LlamaModel": GROUPED,
    "LlamaForSequenceClassification": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Phi3ForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "GPTNeoXForCausalLM": {**TEXT, **IDS},
    "GPT2LMHeadModel": GPT2,
    "GPT2Model": GPT2,
    "OPTForCausalLM": OPT,
    "BertModel": ENCODER,
    "BertForMaskedLM": ENCODER,
    "BertForSequenceClassification": ENCODER,
    "BertForTokenClassification": ENCODER,
    "BertForQuestionAnswering": ENCODER,
    "RobertaModel": ENCODER,
    "RobertaForMaskedLM": ENCODER,
    "RobertaForSequenceClassification": ENCODER,
    "DebertaV2Model": ENCODER,
    "DebertaV2ForSequenceClassification": ENCODER,
    "DebertaV2ForTokenClassification": ENCODER,
    "ViTModel": VIT,
    "ViTForImageClassification": VIT,
    "WhisperModel": WHISPER,
    "WhisperForConditionalGeneration": WHISPER,
    "T5Model": T5,
    "T5EncoderModel": T5,
    "T5ForConditionalGeneration": T5,
}

# Those whose experts are fused in memory, and those made of several models.
COMPOSITE = {
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
    "Qwen3MoeForCausalLM": {**EXPERTS, "num_experts": 4},
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "LlavaForConditionalGeneration": LLAVA,
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk as the code under test sees it, and its folder for the judges."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def tiny_model(architecture: str, **settings: Any) -> Any:
    """The architecture in its tiny size, with random weights."""
    model_class = getattr(transformers, architecture)
    sizes = DENSE.get(architecture) or COMPOSITE[architecture]
    return model_class(model_class.config_class(**{**sizes, **settings}))


def save(model: Any, folder: Path) -> Saved:
    model.save_pretrained(folder)
    return Saved(folder, json.loads((folder / "config.json").read_text()), tensor_shapes(folder))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  # no mapping, only keys()
    return shapes
