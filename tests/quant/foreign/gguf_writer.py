"""GGUF files of tiny models, as llama.cpp's converter writes them, by the gguf library's writer and quantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoConfig

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "gemma2": "gemma2"}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp's rotary embedding wants them (`LlamaModel.permute` in convert_hf_to_gguf.py)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def random_k_blocks(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Random codes and scales of K-quants, whose quantizers the library has not; bytes [..., row bytes]."""
    size, bytes_per = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, bytes_per), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, (*blocks.shape[:-1], 2)) * 2e-5).astype(np.float16)
    if kind == Kind.Q4_K:
        scales[..., 0] *= 8
        scales[..., 1] *= 60
        blocks[..., :4] = scales.view(np.uint8)
    elif kind == Kind.Q6_K:
        blocks[..., -2:] = scales[..., :1].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def encoded(values: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    if kind in (Kind.Q4_K, Kind.Q6_K):
        return random_k_blocks(values.shape, kind, rng)
    return gguf.quants.quantize(values.astype(np.float32), kind)


def write_gguf(
    source: Path,
    file: Path,
    kind_of: Callable[[str], Kind],
    tokenizer: bool = False,
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """The checkpoint `source` as a GGUF file; `kind_of` gives the type of a matrix by its name in the file."""
    config: Any = AutoConfig.from_pretrained(source)
    name = ARCHITECTURES[config.model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    if name == "llama":
        writer.add_rope_dimension_count(head_dim)
    if name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if tokenizer:
        add_tokenizer(writer, source)
    if edit is not None:
        edit(writer)
    names, rng = gguf.get_tensor_name_map(arch, config.num_hidden_layers), np.random.default_rng(0)
    experts: dict[str, list[np.ndarray]] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        if ".experts." in key:
            layer, expert, what = (key.split(".")[place] for place in (2, 5, 6))
            stack = experts.setdefault(f"blk.{layer}.ffn_{what.removesuffix('_proj')}_exps.weight", [])
            assert len(stack) == int(expert)
            stack.append(values)
            continue
        there = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert there is not None, key
        if name == "llama" and ".attn_q." in there:
            values = permuted(values, config.num_attention_heads)
        if name == "llama" and ".attn_k." in there:
            values = permuted(values, config.num_key_value_heads)
        if name == "gemma2" and there.endswith("norm.weight"):
            values = values + 1
        add(writer, there, values, kind_of, rng)
    for there, stack in experts.items():
        add(writer, there, np.stack(stack), kind_of, rng)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind_of: Callable[[str], Kind], rng: np.random.Generator
) -> None:
    kind = kind_of(name) if values.ndim > 1 else Kind.F32
    writer.add_tensor(name, encoded(values, kind, rng), raw_dtype=kind)


def add_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    """That of the bundled model: byte-level BPE."""
    import json

    raw = json.loads((source / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    by_id = {number: token for token, number in (vocabulary | special).items()}
    tokens = [by_id[number] for number in range(len(by_id))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    config = json.loads((source / "config.json").read_text())
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
