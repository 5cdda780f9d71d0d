"""Llama checkpoints of any size with random weights in bf16, written without torch.

Benchmarks import it; by hand it writes one with Llama-3-8B's dimensions, a vocabulary of 32,000 and so many layers:

    python benchmarks/random_llama.py FOLDER [LAYERS]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's dimensions. Input and output embeddings are not tied."""

    layers: int
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 32000
    rope_theta: float = 10000.0
    positions: int = 4096

    @property
    def head_dim(self) -> int:
        """Of one head's queries, keys and values."""
        return self.hidden // self.heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bf16."""
        return 4 * self.layers * self.kv_heads * self.head_dim

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name in a checkpoint, in the order of use."""
        ends = (self.vocabulary, self.hidden)
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends}
        for number in range(self.layers):
            tensors |= {f"model.layers.{number}.{name}.weight": shape for name, shape in self._layer().items()}
        return tensors | {"model.norm.weight": (self.hidden,), "lm_head.weight": ends}

    def _layer(self) -> dict[str, tuple[int, ...]]:
        keys = self.kv_heads * self.head_dim
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(int(np.prod(shape)) for shape in self.tensors().values())

    @property
    def num_bytes(self) -> int:
        """Of the whole model in bf16."""
        return 2 * self.num_parameters

    @property
    def embedding_bytes(self) -> int:
        """Of the input embeddings in bf16, which are looked up by row."""
        return 2 * self.vocabulary * self.hidden

    def of_layers(self, layers: int) -> LlamaShape:
        """This shape with another number of layers."""
        return replace(self, layers=layers)

    def of_at_least(self, num_bytes: int) -> LlamaShape:
        """This shape with the fewest layers, at least one, that make `num_bytes`."""
        ends = self.of_layers(0).num_bytes
        layer = self.of_layers(1).num_bytes - ends
        return self.of_layers(max(1, -(-(num_bytes - ends) // layer)))

    def config(self) -> dict[str, Any]:
        """What stands in the checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "max_position_embeddings": self.positions, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }  # fmt: skip


LLAMA_3_8B = LlamaShape(layers=16, hidden=4096, intermediate=14336, heads=32, kv_heads=8, rope_theta=500000.0)
"""The dimensions of Llama-3-8B, with half its layers and a vocabulary of 32,000: 3.75 billion parameters, 7.5 GB."""


class Shape(Protocol):
    """What a checkpoint is made of."""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""

    @property
    def num_bytes(self) -> int:
        """Of the whole model in bf16."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name, in the order of use."""

    def config(self) -> dict[str, Any]:
        """What stands in config.json."""


def make_checkpoint(folder: Path, shape: Shape, *, sparse: bool = False) -> None:
    """A random model in a new `folder`, in shards of 1 GiB, written to the disk and dropped from the page cache.

    The matrices hold the same random numbers, turned. The tokenizer is the bundled model's. `sparse`: files with
    headers and without weights, which take no room on the disk.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    normal = np.random.default_rng(0).normal(0, 0.02, 16 << 20).astype(np.float32)
    noise = (normal.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half of a float32
    ones = np.full(shape.hidden, 0x3F80, np.uint16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    in_shard = 0
    for name, dimensions in shape.tensors().items():
        nbytes = 2 * int(np.prod(dimensions))
        if shards[-1] and in_shard + nbytes > SHARD_BYTES:
            shards.append({})
            in_shard = 0
        shards[-1][name] = dimensions
        in_shard += nbytes
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, noise, ones, sparse)
    index = {"metadata": {"total_size": shape.num_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], noise: Any, ones: Any, sparse: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(file.tell() + offset)
            return
        for number, (name, shape) in enumerate(tensors.items()):
            left = int(np.prod(shape))
            if "norm" in name:
                file.write(ones[:left].tobytes())
                continue
            start = number * 1_000_003 % len(noise)
            while left:
                part = noise[start : start + left]
                file.write(part.tobytes())
                left -= len(part)
                start = 0
        file.flush()
        # Nobody else's page cache: what the group reads it pays for.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), LLAMA_3_8B.of_layers(int(sys.argv[2]) if len(sys.argv) > 2 else 16))
