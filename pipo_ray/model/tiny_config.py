"""A tiny configuration of the same architecture: all its kinds of layers and its kind of RoPE, but a few thousand
parameters.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig

_MAX_LAYERS = 12
TINY_CONTEXT = 96
_TINY_ORIGINAL_CONTEXT = 16
_WINDOW = 6

# Sizes by the names that configurations use, and what they become.
_SIZES = {
    "vocab_size": 97,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "dense_intermediate_size": 32,
    "sliding_window": _WINDOW, "attention_chunk_size": 8, "window_size": _WINDOW,
    "max_position_embeddings": TINY_CONTEXT, "n_positions": TINY_CONTEXT, "max_seq_len": TINY_CONTEXT,
    "original_max_position_embeddings": _TINY_ORIGINAL_CONTEXT,
    "q_lora_rank": 16, "kv_lora_rank": 16,
    "mamba_d_state": 8, "ssm_state_size": 8, "state_size": 8, "mamba_chunk_size": 16, "chunk_size": 16,
}  # fmt: skip
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """A shrunken copy of `config`: few layers covering every layer type, two attention heads or more, small sizes,
    short contexts.

    The ratios that the code of a model relies on (query heads per KV head, rotary share of a head) stay.
    """
    tiny = copy.deepcopy(config)
    text: Any = tiny.get_text_config()
    _shrink_layers(text)
    _shrink_heads(text)
    for name, size in _SIZES.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            _set(text, name, size)
    for name in _EXPERTS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 4:
            _set(text, name, 4)
    for name in ("num_experts_per_tok", "moe_topk", "top_k_experts"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 2:
            _set(text, name, 2)
    for name in ("n_group", "topk_group"):
        if isinstance(getattr(text, name, None), int):
            _set(text, name, 1)
    _shrink_rope(text)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is not None:
            _set(text, name, 1)
    text.dtype = "float32"
    tiny.dtype = "float32"
    return tiny


def _set(text: Any, name: str, value: Any) -> None:
    # Some configurations derive a size from others and offer it as a property without a setter.
    try:
        setattr(text, name, value)
    except AttributeError:
        if isinstance(getattr(type(text), name, None), property):
            return
        raise


def _shrink_layers(text: Any) -> None:
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int):
        return
    keep = list(range(min(count, 4)))
    types = getattr(text, "layer_types", None)
    if isinstance(types, (list, tuple)) and len(types) == count:
        for kind in dict.fromkeys(types):
            first = list(types).index(kind)
            if first not in keep:
                keep.append(first)
    keep = sorted(keep)[:_MAX_LAYERS]
    # Patterns by period ("every 4th layer") must stay whole: take layers up to the last kind that was seen.
    keep = list(range(min(count, max(keep) + 1, _MAX_LAYERS)))
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:
            _set(text, name, type(value)(value[i] for i in keep))
    text.num_hidden_layers = len(keep)


def _shrink_heads(text: Any) -> None:
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return
    kv_heads = getattr(text, "num_key_value_heads", None)
    head_dim = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    ratio = heads // kv_heads if isinstance(kv_heads, int) and kv_heads else 1
    new_heads = 4 if ratio <= 2 else min(heads, ratio * 2)
    new_heads = min(new_heads, heads)
    dim = 16 if head_dim % 16 == 0 else 8 if head_dim % 8 == 0 else head_dim
    text.num_attention_heads = new_heads
    if isinstance(kv_heads, int):
        text.num_key_value_heads = max(1, new_heads // ratio) if kv_heads < heads else new_heads
    if getattr(text, "head_dim", None) is not None:
        _set(text, "head_dim", dim)
    hidden = new_heads * dim
    for name in ("hidden_size", "word_embed_proj_dim", "embedding_size"):
        if isinstance(getattr(text, name, None), int):
            _set(text, name, hidden)
    for name in ("linear_key_head_dim", "linear_value_head_dim", "qk_nope_head_dim", "v_head_dim"):
        if isinstance(getattr(text, name, None), int):
            _set(text, name, 16)
    if isinstance(getattr(text, "qk_rope_head_dim", None), int):
        text.qk_rope_head_dim = 8
    if isinstance(getattr(text, "linear_num_value_heads", None), int):
        text.linear_num_value_heads, text.linear_num_key_heads = 4, 2
    expand = getattr(text, "mamba_expand", None)
    if expand is not None and hasattr(text, "mamba_n_heads"):
        text.mamba_n_heads, text.mamba_d_head, text.mamba_n_groups = 4, hidden * expand // 4, 1


def _shrink_rope(text: Any) -> None:
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = _TINY_ORIGINAL_CONTEXT
        share = part.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
        for name in ("short_factor", "long_factor"):
            if isinstance(part.get(name), (list, tuple)):
                wanted = max(1, int(head_dim * share) // 2)
                factors = list(part[name])
                part[name] = [factors[i * len(factors) // wanted] for i in range(wanted)]
