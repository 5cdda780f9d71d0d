"""A KV cache of few bits that is not all on the GPU: in RAM, where the processor attends to it, or in two tiers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BASE, BY_SLUG, Architecture
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.pack import CompiledPacking
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.model.kv_cache import RaggedCache, Segment
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.kv_tiers import KVTiers
from pipo_ray.pipeline.device_ops import CudaOps
from pipo_ray.pipeline.host_functions import HostFunctions
from pipo_ray.plan.kv_budget import tier_units
from pipo_ray.plan.kv_pages import KVPlacement, ram_units_for
from pipo_ray.plan.low_bit_pages import LowBitKV

pytestmark = pytest.mark.gpu

BITS = (4, 16, 8)
WIDE_HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


# Of gemma2 and gpt-oss the second layer sees all tokens; a sliding window of the others is not longer than that at
# 16 bits.
@pytest.mark.parametrize(("slug", "bits"), [("llama", BITS), ("gemma2", (8, 4, 8)), ("gpt-oss", (8, 4, 8))])
def test_logits_with_few_bits_in_ram(slug: str, bits: tuple[int, ...], tmp_path: Path) -> None:
    """In float32: prompts and chunks on the GPU, single tokens on the processor by torch."""
    device = torch.device("cuda", 0)
    model = pack_checkpoint(BY_SLUG[slug].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    prompts = random_prompts(model.facts.vocab_size, (450, 230, 30))
    found = []
    for options in (
        {"kv_store": lambda *_: HostKV(device, low_bit=LowBitStore(bits))}, {"kv_bits": bits}, {},
    ):  # fmt: skip
        with Pipeline(model, slot_bytes=1 << 20, chunk=200, device=device, **options) as pipeline:  # type: ignore[arg-type]
            found.append([one.logits.cpu() for one in pipeline.follow(prompts, [440, 180, 20], joins=[0, 1, 2])])
    in_ram, on_gpu, wide = (torch.cat(one) for one in found)
    rounding = max(relative_errors(on_gpu, wide))
    assert rounding > 0.01, "few bits change nothing here: the test shows nothing"
    assert max(relative_errors(in_ram, on_gpu)) <= 0.1 * rounding


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
def test_tokens_in_the_streams_order(tmp_path: Path) -> None:
    """In bf16 by the kernel, for 80 tokens of two sequences: each has a page that leaves its window meanwhile. As near
    to float32 as the cache on the GPU is.
    """
    device = torch.device("cuda", 0)
    llama = Architecture("llama", "", "llama", {**BASE, **WIDE_HEADS})
    checkpoint = llama.save(tmp_path / "checkpoint", dtype="bfloat16")
    attention, calls = CompiledAttention(tmp_path / "code"), HostFunctions(device)
    packing = CompiledPacking(tmp_path / "code")

    def in_stream_order(*_: object) -> HostKV:
        return HostKV(device, attention, calls, LowBitStore(BITS, attention), packing)

    errors, exact = [], torch.empty(0)
    for number, (dtype, options) in enumerate((
        (torch.float32, {"kv_bits": BITS}),
        (torch.bfloat16, {"kv_bits": BITS}),
        (torch.bfloat16, {"kv_store": in_stream_order}),
    )):  # fmt: skip
        model = pack_checkpoint(checkpoint, tmp_path / f"store-{number}", dtype)
        prompts = random_prompts(model.facts.vocab_size, (340, 270))
        with Pipeline(model, slot_bytes=1 << 20, chunk=100, device=device, **options) as pipeline:  # type: ignore[arg-type]
            followed = pipeline.follow(prompts, [260, 190])
        logits = torch.cat([followed[0].logits[260:], followed[1].logits[190:]]).float().cpu()
        exact = exact if number else logits
        errors.append(float((logits - exact).norm()))
    assert 0 < errors[2] < 1.3 * errors[1]


@pytest.mark.parametrize("slug", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("bits", [(4, 4, 4), (8, 8, 8), (8, 4, 8)])
def test_logits_with_packed_pages_in_two_tiers(bits: tuple[int, ...], slug: str, tmp_path: Path) -> None:
    """To the last bit those of the cache that is all on the GPU: the same kernels see the same bytes."""
    device = torch.device("cuda", 0)
    model = pack_checkpoint(BY_SLUG[slug].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    prompts = random_prompts(model.facts.vocab_size, (450, 230, 30))
    nbytes, units = tier_units(model.facts, LowBitKV.of(bits, model.facts))
    gpu_units = 2 * max(units) * 13  # of three layers of 13 pages not all can stay
    placement = KVPlacement(units, nbytes, gpu_units, ram_units_for(units, 13, gpu_units), bits)
    found = []
    for options in (
        {"kv_bits": bits},
        {"kv_store": lambda dtype, ops: LowBitStore(bits, None, KVTiers(placement, dtype, ops))},
    ):  # fmt: skip
        with Pipeline(model, slot_bytes=1 << 20, chunk=200, device=device, **options) as pipeline:  # type: ignore[arg-type]
            followed = pipeline.follow(prompts, [440, 180, 20], joins=[0, 1, 2])
        found.append(torch.cat([one.logits.cpu() for one in followed]))
    tiers = pipeline.runner._kv_store.paged  # type: ignore[union-attr]
    tiers._pinning.join()
    assert tiers.loaded_bytes > tiers.saved_bytes > 0
    assert torch.equal(*found)


def test_packed_pages_are_byte_identical_through_the_tiers() -> None:
    """Of Llama-3-8B's width; sequences join and leave, so that layers are demoted and promoted."""
    layers, heads, dim = 6, 8, 128
    bits = (4, 8, 4, 8, 4, 4)
    device = torch.device("cuda", 0)
    ops = CudaOps(device)
    unit, units = 71680, tuple(2 if one == 8 else 1 for one in bits)
    placement = KVPlacement(units, unit, 160, ram_units_for(units, 40, 160), bits)
    tiers = KVTiers(placement, torch.bfloat16, ops)
    store, here = LowBitStore(bits, None, tiers), LowBitStore(bits)
    live: list[tuple[LowBitCache, LowBitCache]] = []
    rule = AttentionRule(0.1)
    for sweep in range(40):
        if sweep in (0, 3, 6, 20):
            live.append((store.open(640), here.open(640)))
        if sweep in (14, 18):
            for cache in live.pop(0):
                cache.drop()
        counts = [400 if mine.length == 0 else 1 + sweep % 5 for mine, _ in live]
        segments, at = [], 0
        for (mine, _), count in zip(live, counts, strict=True):
            segments.append(Segment(mine, at, at + count))
            at += count
        row = RaggedCache(tuple(segments), store)
        row.begin_sweep()
        for layer in range(layers):
            query, keys, values = (torch.randn(n, at, dim, device=device).bfloat16() for n in (2 * heads, heads, heads))
            row.update(keys[None], values[None], layer)
            row.begin_layer()
            for (mine, theirs), segment in zip(live, segments, strict=True):
                part = slice(segment.start, segment.stop)
                own = layer, query[:, part], keys[:, part], values[:, part], rule
                assert torch.equal(mine.attend(*own), theirs.attend(*own))
            row.end_layer()
        row.advance()
        for (_, theirs), count in zip(live, counts, strict=True):
            theirs.advance(count)
    assert tiers.loaded_bytes > tiers.saved_bytes > 0
    tiers._pinning.join()
    ops.synchronize()
    ops.unpin_all()  # before the memory is unmapped: the driver may want the addresses
