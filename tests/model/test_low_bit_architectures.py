"""Whole models with a low-bit KV cache: sliding windows, soft caps, sinks; chunks and neighbours change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BASE, BY_SLUG, VOCAB_SIZE, Architecture
from harness import Followed, PackedModel, Pipeline, pack_checkpoint, random_prompts

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import floats_obstacle, instruction_set

FOUR = (4, 4, 4)
LENGTHS = (251, 30)
"""The longer one has a page packed: tokens from 192 on see it."""


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt-oss"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp(request.param)
    return pack_checkpoint(BY_SLUG[request.param].save(folder / "checkpoint"), folder / "store", torch.float32)


def follow(
    packed: PackedModel, kv_bits: tuple[int, ...] | None, chunk: int, lengths: tuple[int, ...] = LENGTHS
) -> list[Followed]:
    sequences = random_prompts(VOCAB_SIZE, LENGTHS)[: len(lengths)]
    with Pipeline(packed, slot_bytes=1 << 20, resident_pieces=None, kv_bits=kv_bits, chunk=chunk) as pipeline:
        return pipeline.follow(sequences, [length - 6 for length in lengths])


def test_logits_stay_near_and_depend_on_no_chunk_and_no_neighbour(packed: PackedModel) -> None:
    wide = follow(packed, None, 100)
    few = follow(packed, FOUR, 100)
    # A sliding window of 8 never sees a packed page; each of these models has a layer that sees all.
    differs = (few[0].logits - wide[0].logits).abs().amax(-1)
    assert float(differs[:192].max()) < 1e-4
    assert float(differs[192:].max()) > 1e-4
    assert float((few[0].logits[192:] - wide[0].logits[192:]).norm() / wide[0].logits[192:].norm()) < 0.2
    torch.testing.assert_close(few[1].logits, wide[1].logits, rtol=1e-4, atol=1e-4)
    alone = follow(packed, FOUR, 37, LENGTHS[:1])
    torch.testing.assert_close(alone[0].logits, few[0].logits, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
def test_attention_to_packed_pages_changes_logits_by_bf16s_rounding_alone(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    llama = Architecture("llama", "", "llama", {**BASE, **wide})
    checkpoint = llama.save(tmp_path / "checkpoint", dtype="bfloat16")
    (tokens,), found = random_prompts(VOCAB_SIZE, (266,)), []
    for dtype, attention in (
        (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, CompiledAttention())
    ):  # fmt: skip
        packed = pack_checkpoint(checkpoint, tmp_path / f"store-{dtype}", dtype)
        with Pipeline(
            packed, slot_bytes=1 << 20, resident_pieces=None, kv_bits=(4, 8, 16), attention=attention, chunk=100
        ) as pipeline:
            found.append(pipeline.follow([tokens], [258])[0].logits[258:].float())
    exact, unpacked, got = found
    assert not torch.equal(got, unpacked)
    errors = [float((one - exact).norm()) for one in (unpacked, got)]
    assert errors[1] < 1.1 * errors[0]
    assert float((got - unpacked).norm()) < errors[0] / 2


def test_a_sequence_that_begins_anew_has_a_new_cache(tmp_path: Path) -> None:
    packed = pack_checkpoint(BY_SLUG["llama"].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    (prompt,) = random_prompts(VOCAB_SIZE, (200,))
    with Pipeline(packed, slot_bytes=1 << 20, resident_pieces=None, kv_bits=FOUR, chunk=64) as pipeline:
        first, again = pipeline.greedy([prompt], 8), pipeline.greedy([prompt], 8)
        assert first == again
        assert pipeline.runner.cache_bytes == 0
