"""A model over several drives gives the logits that it gives from one, whatever is split by rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors

from pipo_ray.model.low_bit import LowBitProducts, always_low_bit
from pipo_ray.quant.panels import machine_layout
from pipo_ray.quant.policy import Precision


@pytest.mark.parametrize(
    "slug",
    ["llama", "qwen3-moe", *(pytest.param(slug, marks=pytest.mark.slow) for slug in ("llama-tied", "gpt2", "falcon"))],
)
def test_the_same_logits_from_three_drives(slug: str, tmp_path: Path) -> None:
    BY_SLUG[slug].save(tmp_path / "checkpoint")
    one = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "one", torch.float32)
    several = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "several", torch.float32, num_stripes=2)
    sequences = random_prompts(one.facts.vocab_size, (21, 9))
    with Pipeline(one) as pipeline:
        wanted = pipeline.follow(sequences, [12, 5])
    # Slots for everything uncut, and slots that cut the parts again.
    for slot_bytes in (1 << 20, None):
        with Pipeline(several, slot_bytes=slot_bytes) as pipeline:
            assert len(pipeline.loaders) == 3
            found = pipeline.follow(sequences, [12, 5])
            assert all(loader.snapshot().pieces_read for loader in pipeline.loaders)
        for ours, theirs in zip(found, wanted, strict=True):
            assert max(relative_errors(ours.logits, theirs.logits)) < 1e-5
            assert ours.choices == theirs.choices


def test_low_bit_weights_are_split_between_panels(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("LlamaConfig", dtype="bfloat16", seed=1, hidden_size=128, intermediate_size=512)
    precision = Precision.parse("int4-g32")
    packed = [
        pack_checkpoint(
            checkpoint, tmp_path / f"over{n}", torch.bfloat16, precision, panel_bytes=1, num_stripes=n
        )
        for n in (0, 1)
    ]  # fmt: skip
    parts = [t for block in packed[1].manifest.blocks for t in block.tensors if t.panels and t.first_row]
    assert parts
    sequences = random_prompts(256, (30, 11))
    found = []
    for store in packed:
        products = LowBitProducts(always_low_bit("wide"), machine_layout())
        with Pipeline(store, low_bit=products) as pipeline:
            found.append(pipeline.follow(sequences, [20, 6]))
    for ours, theirs in zip(*found, strict=True):
        assert max(relative_errors(ours.logits, theirs.logits)) < 0.01
