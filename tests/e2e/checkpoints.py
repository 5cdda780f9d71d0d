"""Random checkpoints for runs through the real actors, and what transformers says to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from architectures import BASE, BY_SLUG, Architecture

import pipo_ray.prepare
from pipo_ray import packing
from pipo_ray.packing_process import Progress

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
EOS = 2
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

BYTES_LLAMA = Architecture("bytes-llama", "Llama", "llama", {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 512})
"""With `add_byte_tokenizer` its random tokens are random bytes: nearly every character is cut somewhere, or broken."""


def make_checkpoint(folder: Path, architecture: Architecture | str, *, tokenizer: bool = False) -> Path:
    """A random float32 checkpoint in `folder`; its architecture by name or whole."""
    (BY_SLUG[architecture] if isinstance(architecture, str) else architecture).save(folder)
    if tokenizer:
        add_byte_tokenizer(folder)
    return folder


def packed(folder: Path, **options: Any) -> Path:
    """The checkpoint's block store, packed into the cache as `prepare_store` has it done, but in this process, which
    has imported torch already: a child takes seconds for that. Who runs the checkpoint finds it there.
    """
    with mock.patch.object(pipo_ray.prepare, "run_job", _job):
        return pipo_ray.prepare.prepare_store(folder, **options).folder


def _job(arguments: list[str], on_progress: Progress | None) -> dict[str, Any]:
    options = packing._arguments(arguments)
    assert options.job == "pack"
    manifest = packing.pack_checkpoint(
        options.source, options.destination, dtype=options.dtype, quantization=options.precision,
        slot_bytes=options.slot_bytes, progress=on_progress, wait=options.wait,
    )  # fmt: skip
    return {"total_bytes": manifest.total_bytes}


def vocab_size(folder: Path) -> int:
    """The checkpoint's vocabulary."""
    return int(json.loads((folder / "config.json").read_text()).get("vocab_size", BASE["vocab_size"]))


def add_byte_tokenizer(folder: Path) -> None:
    """A tokenizer in which every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)


def prompts_of(lengths: Sequence[int], vocab: int, seed: int = 5) -> list[list[int]]:
    """Prompts of random tokens, special ones left out."""
    generator = np.random.default_rng(seed)
    return [generator.integers(len(SPECIAL_TOKENS), vocab, length).tolist() for length in lengths]


@lru_cache(maxsize=2)
def reference(folder: Path) -> Any:
    """transformers' own model, eager, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def reference_greedy(folder: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """transformers' continuation of `prompt`, alone and unpadded."""
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = reference(folder).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    assert len(tokens) == num_tokens
    return tokens


def reference_logits(folder: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """transformers' logits [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = reference(folder)(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(logits)
