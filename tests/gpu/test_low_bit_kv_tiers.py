"""A KV cache of few bits that is not all in the GPU's memory: in RAM, where the processor attends to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BASE, BY_SLUG, Architecture
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import obstacle
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.pipeline.host_functions import HostFunctions

pytestmark = pytest.mark.gpu

BITS = (4, 16, 8)
WIDE_HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@pytest.mark.parametrize("slug", ["llama", "gemma2", "gpt-oss"])
def test_logits_with_few_bits_in_ram(slug: str, tmp_path: Path) -> None:
    """In float32: prompts and chunks on the GPU, single tokens on the processor by torch."""
    device = torch.device("cuda", 0)
    model = pack_checkpoint(BY_SLUG[slug].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    prompts = random_prompts(model.facts.vocab_size, (450, 230, 30))
    found = []
    for options in (
        {"kv_store": lambda *_: HostKV(device, low_bit=LowBitStore(BITS))}, {"kv_bits": BITS}, {},
    ):  # fmt: skip
        with Pipeline(model, slot_bytes=1 << 20, chunk=200, device=device, **options) as pipeline:  # type: ignore[arg-type]
            found.append([one.logits.cpu() for one in pipeline.follow(prompts, [440, 180, 20], joins=[0, 1, 2])])
    in_ram, on_gpu, wide = (torch.cat(one) for one in found)
    rounding = max(relative_errors(on_gpu, wide))
    assert rounding > 0.01, "few bits change nothing here: the test shows nothing"
    assert max(relative_errors(in_ram, on_gpu)) <= 0.1 * rounding


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_tokens_in_the_streams_order(tmp_path: Path) -> None:
    """In bf16 by the kernel, for 80 tokens of two sequences: each has a page that leaves its window meanwhile. As near
    to float32 as the cache on the GPU is.
    """
    device = torch.device("cuda", 0)
    llama = Architecture("llama", "", "llama", {**BASE, **WIDE_HEADS})
    checkpoint = llama.save(tmp_path / "checkpoint", dtype="bfloat16")
    attention, calls = CompiledAttention(tmp_path / "code"), HostFunctions(device)
    errors, exact = [], torch.empty(0)
    for number, (dtype, options) in enumerate((
        (torch.float32, {"kv_bits": BITS}),
        (torch.bfloat16, {"kv_bits": BITS}),
        (torch.bfloat16, {"kv_store": lambda *_: HostKV(device, attention, calls, LowBitStore(BITS, attention))}),
    )):  # fmt: skip
        model = pack_checkpoint(checkpoint, tmp_path / f"store-{number}", dtype)
        prompts = random_prompts(model.facts.vocab_size, (340, 270))
        with Pipeline(model, slot_bytes=1 << 20, chunk=100, device=device, **options) as pipeline:  # type: ignore[arg-type]
            followed = pipeline.follow(prompts, [260, 190])
        logits = torch.cat([followed[0].logits[260:], followed[1].logits[190:]]).float().cpu()
        exact = exact if number else logits
        errors.append(float((logits - exact).norm()))
    assert 0 < errors[2] < 1.3 * errors[1]
