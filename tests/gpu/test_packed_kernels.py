"""Attention to packed pages by Triton's kernels compiled for the device, against float64; pages packed as on a
processor; and a model's KV cache by them, beside the one that is unpacked.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from architectures import BASE, BY_SLUG, Architecture
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors

pytest.importorskip("hypothesis")
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from packed_tokens import RandomRow

from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.packed_choice import rows_for
from pipo_ray.model.packed_rows import PackedRows
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of
from pipo_ray.triton_kernels.packed_kernels import PackedKernels

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    (PageLayout(8, 128, 128, 4), 4, BF16, False),
    (PageLayout(8, 128, 128, 8), 4, BF16, False),
    (PageLayout(4, 64, 64, 4), 2, FP16, True),
    (PageLayout(2, 64, 64, 8), 8, BF16, True),
    (PageLayout(3, 80, 80, 4), 20, BF16, False),
    (PageLayout(2, 96, 128, 8), 1, FP16, False),
    (PageLayout(2, 256, 256, 4), 4, BF16, True),
    (PageLayout(1, 256, 256, 8), 3, FP16, False),
]
"""Few, as compiling is what takes long, some seconds for each."""


def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.parametrize(("layout", "group", "dtype", "odd"), CASES, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, SHORT_TOKENS)), min_size=1,
             max_size=5),
    st.sampled_from([None, None, 3, 100, 500, 5000]), st.sampled_from([1, 8, 100, 1056, 100_000]),
    st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 1 << 30),
)  # fmt: skip
def test_attention_at_random_shapes(
    layout: PageLayout, group: int, dtype: torch.dtype, odd: bool, sizes: list[tuple[list[int], int]],
    window: int | None, programs: int, sharpness: float, seed: int,
) -> None:  # fmt: skip
    row = RandomRow(layout, group, dtype, device(), sizes, sharpness, seed)
    sinks = torch.randn(layout.heads * group).to(device(), dtype) if odd else None
    rule = AttentionRule(layout.key_dim**-0.5, window, 5.0 if odd else None, sinks)
    kernels = PackedKernels(device())
    first, second = row.attend(kernels, rule, programs), row.attend(kernels, rule, programs)
    row.require_rounded(first, rule)
    assert torch.equal(first, second), "the order in which parts arrive shows"


@pytest.mark.parametrize("bits", [4, 8])
def test_many_parts_of_many_sequences(bits: int) -> None:
    """More programs than a device has room for at once, sequences of a page and of hundreds; a hundred times."""
    layout = PageLayout(8, 128, 128, bits)
    sizes = [((3,), 150)] * 30 + [((3, 100), SHORT_TOKENS), ((300,), 130)]
    row = RandomRow(layout, 4, BF16, device(), sizes, 2.0, seed=1)
    rule, kernels = AttentionRule(128**-0.5), PackedKernels(device())
    first = row.attend(kernels, rule, 100_000)
    row.require_rounded(first, rule)
    for _ in range(100):
        assert torch.equal(first, row.attend(kernels, rule, 100_000))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (PageLayout(8, 128, 128, 4), BF16),
        (PageLayout(8, 64, 64, 8), FP16),
        (PageLayout(2, 80, 80, 8), BF16),
        (PageLayout(2, 256, 256, 4), FP16),
    ],
    ids=str,
)
def test_a_page_that_leaves_the_window_is_packed_as_on_a_processor(layout: PageLayout, dtype: torch.dtype) -> None:
    """To the last bit, by the kernel and by torch on the device; and what is behind it moves on."""
    kernels = PackedKernels(device())
    for seed, size in itertools.product(range(4), (1e-6, 1e-3, 1.0, 40.0, 1e4)):
        _require_packed(kernels, layout, dtype, size, seed)


def _require_packed(kernels: PackedKernels, layout: PageLayout, dtype: torch.dtype, size: float, seed: int) -> None:
    sizes = [((2,), SHORT_TOKENS), ((1,), 150), ((1, 0), SHORT_TOKENS), ((0,), SHORT_TOKENS)]
    row = RandomRow(layout, 1, dtype, device(), sizes, 1.0, seed)
    for one in row.sequences:
        for window in one.windows:
            window *= size
            window[:, :PAGE_TOKENS, 3] = 1.25
            window[:, :PAGE_TOKENS, 4] = -0.0
            window[:, 7, :] = 0.0
            window[:, 9, 5] = 7e4
    before = [[window.clone() for window in one.windows] for one in row.sequences]
    row.attend(kernels, AttentionRule(0.1), 100, leaves=True)
    used = sum(layout.parts)
    for column, one, windows in zip(row.columns, row.sequences, before, strict=True):
        if one.size < SHORT_TOKENS:
            assert (one.runs[-1][-1] == 0xFF).all()
            continue
        keys, values = (window[:, :PAGE_TOKENS] for window in windows)
        pages = []
        for on in (device(), torch.device("cpu")):
            page = torch.empty(1, layout.page_bytes, dtype=torch.uint8, device=on)
            pack_pages(keys.to(on), values.to(on), views_of(page, layout), layout)
            pages.append(page[0, :used].cpu())
        assert torch.equal(pages[0], pages[1]), "torch packs otherwise on the device"
        assert torch.equal(one.runs[-1][-1, :used].cpu(), pages[1])
        rest = SHORT_TOKENS - PAGE_TOKENS
        for window, old, new in zip(one.windows, windows, (row.keys, row.values), strict=True):
            assert torch.equal(window[:, : rest - 1], old[:, PAGE_TOKENS:-1])
            assert torch.equal(window[:, rest - 1], new[:, column])


@pytest.mark.parametrize(
    ("dims", "bits", "dtype"),
    [((64, 64), 4, FP16), ((80, 80), 8, BF16), ((128, 128), 4, BF16), ((256, 256), 8, FP16), ((128, 64), 4, BF16)],
    ids=str,
)
def test_pages_are_unpacked_as_by_torch(dims: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    layout = PageLayout(3, *dims, bits)
    pages = RandomRow(layout, 1, dtype, device(), [((9,), 1)], 1.0, seed=6).sequences[0].runs[0][:9]
    found = []
    for by_kernel in (True, False):
        keys = torch.full((3, 11 * PAGE_TOKENS, dims[0]), torch.nan, dtype=dtype, device=device())
        values = torch.full((3, 10 * PAGE_TOKENS, dims[1]), torch.nan, dtype=dtype, device=device())
        parts = keys[:, PAGE_TOKENS:-PAGE_TOKENS], values[:, :-PAGE_TOKENS]
        if by_kernel:
            PackedKernels(device()).unpack(pages, layout, *parts)
        else:
            codes = torch.empty(max(keys.numel(), values.numel()), dtype=torch.uint8, device=device())
            unpack_pages(views_of(pages, layout), layout, *parts, codes)
        found.append((keys, values))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


HEADS = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
BITS = (4, 16, 8)


@pytest.mark.parametrize(("slug", "dtype"), [("llama", BF16), ("gemma2", FP16), ("gpt-oss", BF16)], ids=str)
def test_a_models_logits(slug: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Prompts in chunks beside single tokens, pages that leave windows in several sweeps: as near to float32 as the
    cache that is unpacked. Soft caps, sinks and sliding windows, too.
    """
    base = BY_SLUG[slug]
    llama = Architecture("llama", "", "llama", {**BASE, **HEADS})
    checkpoint = (llama if slug == "llama" else base).save(tmp_path / "checkpoint", dtype=str(dtype)[6:])
    errors, exact = [], torch.empty(0)
    launches = 0
    for number, (kind, by_kernels) in enumerate(((torch.float32, False), (dtype, False), (dtype, True))):
        model = pack_checkpoint(checkpoint, tmp_path / f"store-{number}", kind)
        bits = (BITS * model.facts.num_layers)[: model.facts.num_layers] if slug == "llama" else (
            (8, 4) * model.facts.num_layers)[: model.facts.num_layers]  # fmt: skip
        rows = rows_for(bits, model.facts, kind, device(), None) if by_kernels else None
        if by_kernels:
            assert isinstance(rows, PackedRows), rows
            attend = rows._kernels.attend

            def counted(*arguments: object, attend: object = attend) -> None:
                nonlocal launches
                launches += 1
                attend(*arguments)  # type: ignore[operator]

            rows._kernels.attend = counted  # type: ignore[method-assign]
        prompts = random_prompts(model.facts.vocab_size, (340, 270, 230))
        with Pipeline(
            model, slot_bytes=1 << 20, chunk=100, device=device(),
            kv_store=lambda *_, bits=bits, rows=rows: LowBitStore(bits, rows=rows),  # type: ignore[misc]
        ) as pipeline:  # fmt: skip
            followed = pipeline.follow(prompts, [260, 190, 200], joins=[0, 1, 3])
        logits = torch.cat([one.logits[at:] for one, at in zip(followed, (260, 190, 200), strict=True)]).float().cpu()
        exact = exact if number else logits
        errors.append(max(relative_errors(logits, exact)))
    assert launches > 80
    assert 0 < errors[2] < 1.5 * errors[1]
