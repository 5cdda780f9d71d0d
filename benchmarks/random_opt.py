"""OPT checkpoints of any size with random weights in bf16, written without torch.

Benchmarks import it; by hand it writes one with OPT-13B's dimensions and so many layers:

    python benchmarks/random_opt.py FOLDER [LAYERS]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from random_llama import make_checkpoint


@dataclass(frozen=True)
class OptShape:
    """An OPT's dimensions. The output head is the input embedding."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int = 50272
    positions: int = 2048

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bf16."""
        return 4 * self.layers * self.hidden

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name in a checkpoint, in the order of use."""
        h, inner = self.hidden, 4 * self.hidden
        matrices = {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (h, h), "self_attn.v_proj": (h, h),
            "self_attn.out_proj": (h, h), "fc1": (inner, h), "fc2": (h, inner),
        }  # fmt: skip
        tensors: dict[str, tuple[int, ...]] = {
            "model.decoder.embed_tokens.weight": (self.vocabulary, h),
            "model.decoder.embed_positions.weight": (self.positions + 2, h),
        }
        for number in range(self.layers):
            layer = f"model.decoder.layers.{number}"
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                tensors |= {f"{layer}.{norm}.weight": (h,), f"{layer}.{norm}.bias": (h,)}
            for name, shape in matrices.items():
                tensors |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        return tensors | {
            "model.decoder.final_layer_norm.weight": (h,), "model.decoder.final_layer_norm.bias": (h,),
        }  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Of the whole model in bf16."""
        return 2 * sum(int(np.prod(shape)) for shape in self.tensors().values())

    @property
    def embedding_bytes(self) -> int:
        """Of what is only looked up by row: the positions; the input embeddings are the output head's, too."""
        return 2 * (self.positions + 2) * self.hidden

    def config(self) -> dict[str, Any]:
        """What stands in the checkpoint's config.json."""
        return {
            "architectures": ["OPTForCausalLM"], "model_type": "opt", "dtype": "bfloat16",
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "word_embed_proj_dim": self.hidden,
            "ffn_dim": 4 * self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "max_position_embeddings": self.positions, "do_layer_norm_before": True, "activation_function": "relu",
            "dropout": 0.0, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "tie_word_embeddings": True,
        }  # fmt: skip


OPT_13B = OptShape(40, 5120, 40)


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), replace(OPT_13B, layers=int(sys.argv[2]) if len(sys.argv) > 2 else 40))
