"""Write a Llama checkpoint in bf16 as a GGUF with the same weights: `python write_gguf.py CHECKPOINT FILE [BF16|Q4_0]`.

Runs in llama.cpp's environment. Names, keys and the order of rotary dimensions are those that llama.cpp's own converter
gives a Llama; the vocabulary is of placeholders, because the benchmark gives token ids and takes token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BLOCKS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(checkpoint: Path, path: Path, kind: str) -> None:
    """Stream the tensors, one at a time, in the checkpoint's order; the matrices as `kind`, by gguf's own quantizer."""
    quantized = gguf.GGMLQuantizationType[kind]
    bf16 = quantized is gguf.GGMLQuantizationType.BF16
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, config, gguf.LlamaFileType[f"MOSTLY_{kind}"])
    tensors = list(_tensors(checkpoint))
    for name, array in tensors:
        if "norm" in name:
            writer.add_tensor_info(name, array.shape, np.dtype(np.float32), 2 * array.nbytes)
        elif bf16:
            writer.add_tensor_info(name, array.shape, np.dtype(np.uint16), array.nbytes, quantized)
        else:
            shape = gguf.quant_shape_to_byte_shape(array.shape, quantized)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, array in tensors:
        role = name.split(".")[-2]
        if "norm" in name:
            writer.write_tensor_data((array.astype(np.uint32) << 16).view(np.float32))
        else:
            matrix = _interleave(array, heads[role]) if role in heads else array
            writer.write_tensor_data(matrix if bf16 else _quantized(matrix, quantized))
    writer.close()


def _quantized(bits: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """A matrix of bf16 bits as bytes of `kind`, a few rows at a time."""
    parts = []
    for start in range(0, len(bits), 1024):
        values = (bits[start : start + 1024].astype(np.uint32) << 16).view(np.float32)
        parts.append(gguf.quants.quantize(values, kind))
    return np.concatenate(parts)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], kind: gguf.LlamaFileType) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(kind)
    special, plain, byte = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.BYTE
    first = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", special), ("</s>", special)]
    first += [(f"<0x{value:02X}>", byte) for value in range(256)]
    tokens = first + [(f"token{number}", plain) for number in range(len(first), config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _tensors(checkpoint: Path) -> Any:
    """GGUF's name and the bits [rows, columns] of every tensor, mapped from the safetensors files."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = about["data_offsets"]
            bits = np.memmap(file, np.uint16, "r", 8 + length + begin, ((end - begin) // 2,))
            yield _gguf_name(name), bits.reshape(about["shape"])


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, number, role = stem.split(".", 3)
    return f"blk.{number}.{BLOCKS[role]}.weight"


def _interleave(matrix: Any, heads: int) -> Any:
    """A head's two halves of rotary rows taken in turn: GGUF's Llama rotates neighbours, transformers' halves."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "BF16")
