"""Attention to packed pages by Triton's kernels on the CPU, by its interpreter, against float64; and pages packed and
unpacked. Needs triton, which torch's CPU build has not.

tests/gpu/test_packed_kernels.py has them compiled.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_tokens import RandomRow
from triton_interpreter import STEP

from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of
from pipo_ray.triton_kernels.packed_check import check
from pipo_ray.triton_kernels.packed_kernels import PackedKernels

CPU = torch.device("cpu")

LAYOUTS = [PageLayout(4, 64, 64, 4), PageLayout(2, 128, 128, 8), PageLayout(1, 80, 96, 8), PageLayout(1, 256, 256, 4)]
SIZES = [((3,), 150), ((0,), 5), ((3, 2), SHORT_TOKENS), ((1, 0), 129)]


def rule_of(layout: PageLayout, window: int | None, group: int, *, odd: bool) -> AttentionRule:
    scale = layout.key_dim**-0.5
    return AttentionRule(scale, window, 3.0, torch.randn(layout.heads * group)) if odd else AttentionRule(scale, window)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [None, 200])
def test_each_token_attends_to_what_its_sequence_has(layout: PageLayout, window: int | None) -> None:
    """In float16, which shows each token of some hundreds; in one part each, and in as many as there are."""
    kernels = PackedKernels(CPU)
    for programs, odd in ((1, window is None), (1000, window is not None)):
        row = RandomRow(layout, 3, torch.float16, CPU, SIZES, 2.0, seed=layout.bits + programs)
        rule = rule_of(layout, window, 3, odd=odd)
        row.require_attention(row.attend(kernels, rule, programs), rule, step=2.0**-10, sums=1e-4)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([4, 8]), st.sampled_from([16, 64, 80, 96, 128, 192, 256]), st.sampled_from([None, 64, 32]),
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4, 20]),
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 192)), min_size=1,
             max_size=3),
    st.sampled_from([None, 3, 70, 200, 300]), st.booleans(), st.sampled_from([1, 3, 10, 1000]), st.integers(0, 99),
)  # fmt: skip
def test_attention_at_random_shapes(
    bits: int, dim: int, value_dim: int | None, heads: int, group: int, sizes: list[tuple[list[int], int]],
    window: int | None, odd: bool, programs: int, seed: int,
) -> None:  # fmt: skip
    layout = PageLayout(heads, dim, value_dim or dim, bits)
    row = RandomRow(layout, group, torch.float16, CPU, sizes, 2.0, seed)
    rule = rule_of(layout, window, group, odd=odd)
    row.require_attention(row.attend(PackedKernels(CPU), rule, programs), rule, step=2.0**-10, sums=1e-4)


def test_in_bfloat16() -> None:
    layout = PageLayout(2, 64, 64, 4)
    row = RandomRow(layout, 4, torch.bfloat16, CPU, SIZES, 1.0, seed=3)
    rule = AttentionRule(0.125)
    row.require_attention(row.attend(PackedKernels(CPU), rule, 50), rule, step=STEP, sums=1e-4)


def test_a_call_leaves_nothing_for_the_next() -> None:
    """Fewer sequences after more, in other parts."""
    kernels, layout = PackedKernels(CPU), PageLayout(2, 64, 64, 4)
    rule = AttentionRule(0.125)
    for sizes, programs in ((SIZES, 1000), (SIZES[2:], 3), (SIZES[:1], 1000)):
        row = RandomRow(layout, 2, torch.float16, CPU, sizes, 2.0, seed=4)
        first = row.attend(kernels, rule, programs)
        row.require_attention(first, rule, step=2.0**-10, sums=1e-4)
        assert torch.equal(first, row.attend(kernels, rule, programs))


@pytest.mark.parametrize(("pages", "group"), [(20, 40), pytest.param(270, 2, marks=pytest.mark.slow)])
def test_parts_are_merged_in_groups_of_16(pages: int, group: int) -> None:
    """More parts than a group has, and more in a group, or more groups, than are merged at a time."""
    layout = PageLayout(1, 16, 16, 8)
    row = RandomRow(layout, group, torch.float16, CPU, [((pages,), 150), ((2,), 5)], 2.0, seed=7)
    rule, kernels = AttentionRule(0.25), PackedKernels(CPU)
    first = row.attend(kernels, rule, 100_000)
    row.require_attention(first, rule, step=2.0**-10, sums=1e-4)
    assert torch.equal(first, row.attend(kernels, rule, 100_000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [*LAYOUTS, PageLayout(8, 32, 16, 4), PageLayout(3, 96, 192, 8)], ids=str)
def test_a_page_that_leaves_the_window_is_packed_as_on_a_processor(layout: PageLayout, dtype: torch.dtype) -> None:
    """With a channel and a token of one number, of zeros, numbers beyond float16; and what is behind it moves on."""
    sizes = [((2,), SHORT_TOKENS), ((1,), 150), ((1, 0), SHORT_TOKENS)]
    row = RandomRow(layout, 1, dtype, CPU, sizes, 1.0, seed=5)
    for one in row.sequences:
        for window in one.windows:
            window[:, :PAGE_TOKENS, 3] = 1.25
            window[:, :PAGE_TOKENS, 4] = -0.0
            window[:, 7, :] = 0.0
            window[:, 9:12, 5] = torch.tensor([-1e5, 7e4, 1e38]).to(dtype)
            window[:, 13, :] *= 1e-6
    before = [[window.clone() for window in one.windows] for one in row.sequences]
    with torch.no_grad():
        row.attend(PackedKernels(CPU), AttentionRule(0.1), 100, leaves=True)
    used = sum(layout.parts)
    for column, one, windows in zip(row.columns, row.sequences, before, strict=True):
        if one.size < SHORT_TOKENS:
            assert (one.runs[-1][-1] == 0xFF).all()
            continue
        wanted = torch.empty(1, layout.page_bytes, dtype=torch.uint8)
        keys, values = (window[:, :PAGE_TOKENS] for window in windows)
        pack_pages(keys, values, views_of(wanted, layout), layout)
        assert torch.equal(one.runs[-1][-1, :used], wanted[0, :used])
        for window, old, new in zip(one.windows, windows, (row.keys, row.values), strict=True):
            rest = SHORT_TOKENS - PAGE_TOKENS
            assert torch.equal(window[:, : rest - 1], old[:, PAGE_TOKENS:-1])
            assert torch.equal(window[:, rest - 1], new[:, column])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pages_are_unpacked_as_by_torch(layout: PageLayout) -> None:
    pages = RandomRow(layout, 1, torch.float16, CPU, [((3,), 1)], 1.0, seed=6).sequences[0].runs[0][:3]
    found = []
    for unpacks in (PackedKernels(CPU).unpack, _by_torch):
        keys = torch.full((layout.heads, 5 * PAGE_TOKENS, layout.key_dim), torch.nan, dtype=torch.float16)
        values = torch.full((layout.heads, 4 * PAGE_TOKENS, layout.value_dim), torch.nan, dtype=torch.float16)
        unpacks(pages, layout, keys[:, PAGE_TOKENS : 4 * PAGE_TOKENS], values[:, : 3 * PAGE_TOKENS])
        assert keys[:, :PAGE_TOKENS].isnan().all()
        assert values[:, 3 * PAGE_TOKENS :].isnan().all()
        found.append((keys, values))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-10, atol=2.0**-12, equal_nan=True)


def _by_torch(pages: torch.Tensor, layout: PageLayout, keys: torch.Tensor, values: torch.Tensor) -> None:
    codes = torch.empty(max(keys.numel(), values.numel()), dtype=torch.uint8)
    unpack_pages(views_of(pages, layout), layout, keys, values, codes)


def test_a_kernel_that_is_wrong_is_found_out() -> None:
    kernels, layouts = PackedKernels(CPU), [PageLayout(2, 64, 64, 4)]
    check(kernels, layouts, 4, torch.float16, CPU)
    attend, pack = kernels.attend, kernels.pack

    def off(*arguments: object) -> None:
        attend(*arguments)  # type: ignore[arg-type]
        arguments[3].mul_(1.03)  # type: ignore[attr-defined]

    kernels.attend = off  # type: ignore[assignment]
    with pytest.raises(ArithmeticError, match="is off by"):
        check(kernels, layouts, 4, torch.float16, CPU)
    kernels.attend = attend  # type: ignore[method-assign]
    kernels.pack = lambda *arguments: None  # type: ignore[assignment, method-assign]
    with pytest.raises(ArithmeticError, match="in another way"):
        check(kernels, layouts, 4, torch.float16, CPU)
    kernels.pack = pack  # type: ignore[method-assign]
    check(kernels, [PageLayout(2, 24, 24, 4)], 4, torch.float16, CPU)  # which no kernel takes
