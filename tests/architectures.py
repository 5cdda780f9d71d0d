"""The architectures that are promised to work, as tiny random checkpoints: picked to differ, with nothing left at a
neutral value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCAB_SIZE = 128
LONGROPE_ORIGINAL_LENGTH = 32

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size): logits far enough apart for greedy tokens to mean something
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Architecture:
    """`name` is what the README calls it, `slug` its test id; `options` go over BASE. `ragged` is what the probe has
    to find."""

    slug: str
    name: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ragged: bool = True
    experts: bool = False

    def config(self) -> PretrainedConfig:
        """The tiny configuration."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **(BASE | dict(self.options)))

    def save(self, folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
        """Write a random checkpoint to `folder`. Norms, biases and sinks are random too: a lost one changes the
        logits."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.dim() == 1 or float(parameter.std()) < 1e-3:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder


ARCHITECTURES = (
    Architecture("llama", "Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    Architecture("llama-tied", "Llama, tied embeddings", "llama", {"tie_word_embeddings": True}),
    Architecture("mistral", "Mistral, sliding window", "mistral", {"sliding_window": 8}),
    Architecture("qwen2", "Qwen2", "qwen2"),
    Architecture("qwen3", "Qwen3", "qwen3", {"head_dim": 24}),
    Architecture(
        "gemma2", "Gemma 2", "gemma2",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 5.0, "tie_word_embeddings": True},
    ),
    Architecture(
        "gemma3", "Gemma 3 (text)", "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": True,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    Architecture("phi3", "Phi-3", "phi3", {"pad_token_id": 0}),
    Architecture(
        "phi3-longrope", "Phi-3, longrope", "phi3",
        {"pad_token_id": 0, "original_max_position_embeddings": LONGROPE_ORIGINAL_LENGTH,
         "rope_parameters": {
             "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(8)],
             "long_factor": [2.0 + 0.3 * i for i in range(8)],
             "original_max_position_embeddings": LONGROPE_ORIGINAL_LENGTH}},
        ragged=False,
    ),
    Architecture(
        "opt", "OPT", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.125, "tie_word_embeddings": True}
    ),
    Architecture("gpt2", "GPT-2", "gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "tie_word_embeddings": True}),
    Architecture("gpt-neox", "GPT-NeoX", "gpt_neox"),
    Architecture("stablelm", "StableLM", "stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    Architecture("falcon", "Falcon", "falcon", {"bias": True, "tie_word_embeddings": True}, ragged=False),
    Architecture("olmo2", "OLMo 2", "olmo2"),
    Architecture(
        "granite", "Granite", "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    ),
    Architecture(
        "qwen3-next", "Qwen3-Next", "qwen3_next",
        {**_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        ragged=False, experts=True,
    ),
    Architecture(
        "granite-hybrid", "Granite 4 hybrid", "granitemoehybrid",
        {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
         "mamba_expand": 2, "mamba_d_state": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
         "intermediate_size": 32, "shared_intermediate_size": 64,
         "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
        ragged=False, experts=True,
    ),
    Architecture(
        "mixtral", "Mixtral", "mixtral", {**_EXPERTS, "num_local_experts": 4, "intermediate_size": 64}, experts=True
    ),
    Architecture("qwen3-moe", "Qwen3-MoE", "qwen3_moe", {**_EXPERTS, "head_dim": 16}, experts=True),
    Architecture(
        "gpt-oss", "gpt-oss", "gpt_oss",
        {**_EXPERTS, "head_dim": 16, "num_local_experts": 4, "intermediate_size": 32, "sliding_window": 8},
        experts=True,
    ),
)  # fmt: skip
BY_SLUG = {architecture.slug: architecture for architecture in ARCHITECTURES}
