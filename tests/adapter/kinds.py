"""The kinds of adapters that PEFT trains on a residual base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Kind:
    """One way to train an adapter.

    Attributes:
        architecture: a name in the zoo.
        settings: of the checkpoint, as ``tiny_checkpoint`` takes them.
        method: ``pissa_hub``: the initial state is what decompose wrote; ``peft``: PEFT makes it in the training
            process and saves it.
        decompose: options of decompose; for ``peft``, of LoraConfig.
        config: fields of the adapter's config that the user changes before training.
        also: modules that get a fresh LoRA beside those that decompose chose.
        adapter_name: PEFT writes every adapter but ``default`` into a folder of that name.
        dtype: the adapter is saved in.
        steps: of AdamW; 0: every trainable parameter gets seeded noise instead.
        size: of the noise relative to the parameter.
    """

    architecture: str = "LlamaForCausalLM"
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: Literal["pissa_hub", "peft"] = "pissa_hub"
    decompose: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    adapter_name: str = "default"
    dtype: torch.dtype = torch.float32
    steps: int = 0
    size: float = 0.1


RANK = 4
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 6, "1.mlp.down_proj": 2}}

# A LoRA with the same keys but for the factors: what is trained is the factors of Linear modules alone.
LINEAR = {
    "plain": Kind(),
    "after steps of AdamW": Kind(steps=3),
    "alpha": Kind(decompose={"alpha": 7}),
    "rsLoRA": Kind(decompose={"use_rslora": True}),
    "rank_pattern": Kind(decompose=PATTERNS),
    "rank_pattern and alpha": Kind(decompose={**PATTERNS, "alpha": 7}),
    "rsLoRA and rank_pattern": Kind(decompose={**PATTERNS, "use_rslora": True}),
    "rsLoRA, rank_pattern and alpha": Kind(decompose={**PATTERNS, "alpha": 7, "use_rslora": True}),
    "listed targets": Kind(decompose={"targets": "q_proj,v_proj"}),
    "one layer": Kind(decompose={"targets": r"re:.*layers\.1\..*"}),
    "regex in the config": Kind(
        decompose={"targets": "q_proj,v_proj"}, config={"target_modules": r".*self_attn\.(q|v)_proj"}
    ),
    "dropout": Kind(config={"lora_dropout": 0.3}, steps=2),
    "saved in bf16": Kind(dtype=torch.bfloat16),
    "second adapter": Kind(adapter_name="second"),
    "lm_head": Kind(decompose={"targets": "q_proj,lm_head"}),
    "GPT-2": Kind("GPT2LMHeadModel"),
    "BERT": Kind("BertForMaskedLM"),
    "Qwen2": Kind("Qwen2ForCausalLM"),
    "T5": Kind("T5ForConditionalGeneration"),
    "attention of Mixtral": Kind("MixtralForCausalLM", decompose={"targets": ATTENTION}),
    "LLaVA": Kind("LlavaForConditionalGeneration"),
    "frozen head of a classifier": Kind("LlamaForSequenceClassification"),
}

# Beside the factors of Linear modules: other modules, biases, whole modules, tokens.
FURTHER = {
    "lora_bias": Kind("BertForMaskedLM", config={"lora_bias": True}),
    "lora_bias, rsLoRA and rank_pattern": Kind(
        "BertForMaskedLM", decompose={"rank_pattern": {"query": 6}, "use_rslora": True}, config={"lora_bias": True}
    ),
    "lora_bias of GPT-2": Kind("GPT2LMHeadModel", config={"lora_bias": True}),
    "bias of targets of BERT": Kind("BertForMaskedLM", config={"bias": "lora_only"}),
    "bias of targets of Qwen2": Kind("Qwen2ForCausalLM", config={"bias": "lora_only"}),
    "every bias of BERT": Kind("BertForMaskedLM", config={"bias": "all"}),
    "every bias of GPT-2": Kind("GPT2LMHeadModel", config={"bias": "all"}),
    "embedding": Kind(also=("embed_tokens",)),
    "embedding, rsLoRA and rank_pattern": Kind(decompose={**PATTERNS, "use_rslora": True}, also=("embed_tokens",)),
    "embedding of another rank": Kind(also=("embed_tokens",), config={"rank_pattern": {"embed_tokens": 2}}),
    "embedding of GPT-2": Kind("GPT2LMHeadModel", also=("wte",), settings={"tie_word_embeddings": False}),
    "tied embedding": Kind(settings={"tie_word_embeddings": True}, also=("embed_tokens",)),
    "embedding and output head": Kind(also=("embed_tokens", "lm_head")),
    "convolution": Kind("ViTModel", also=("projection",)),
    "whole output head": Kind(config={"modules_to_save": ["lm_head"]}),
    "whole embedding": Kind(config={"modules_to_save": ["embed_tokens"]}),
    "whole embedding tied to the head": Kind(
        settings={"tie_word_embeddings": True},
        config={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "head of Llama": Kind("LlamaForSequenceClassification", config={"task_type": "SEQ_CLS"}),
    "head of BERT": Kind("BertForSequenceClassification", config={"modules_to_save": ["classifier"]}),
    "tokens": Kind(config={"trainable_token_indices": [3, 7, 11]}),
    "experts of Mixtral": Kind(
        "MixtralForCausalLM", decompose={"targets": ATTENTION}, config={"target_parameters": EXPERTS}
    ),
    "experts of Qwen3, rsLoRA": Kind(
        "Qwen3MoeForCausalLM",
        decompose={"targets": ATTENTION, "use_rslora": True, "alpha": 7},
        config={"target_parameters": EXPERTS},
    ),
    "experts of another rank": Kind(
        "MixtralForCausalLM",
        decompose={"targets": ATTENTION},
        config={"target_parameters": EXPERTS, "rank_pattern": {r"mlp\.experts\..*": 3}},
    ),
    "router": Kind(
        "MixtralForCausalLM",
        decompose={"targets": ATTENTION},
        config={"target_parameters": ["mlp.gate.weight"]},
    ),
    "router and experts": Kind(
        "MixtralForCausalLM",
        decompose={"targets": ATTENTION},
        config={"target_parameters": ["mlp.gate.weight", *EXPERTS]},
    ),
    "one parameter of the experts": Kind(
        "MixtralForCausalLM", decompose={"targets": ATTENTION}, config={"target_parameters": EXPERTS[1:]}
    ),
}

# PiSSA that PEFT made in the training process.
PEFT_OWN = {
    "PEFT's": Kind(method="peft", decompose={"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "PEFT's with rsLoRA": Kind(
        method="peft", decompose={"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 3}
    ),
    "PEFT's by few iterations": Kind(
        method="peft", decompose={"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}
    ),
    "PEFT's of a router": Kind(
        "MixtralForCausalLM",
        method="peft",
        decompose={"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
}

RESCALED = Kind(config={"lora_alpha": 2 * RANK})
DORA = Kind(config={"use_dora": True})
KINDS = {**LINEAR, **FURTHER, **PEFT_OWN}
