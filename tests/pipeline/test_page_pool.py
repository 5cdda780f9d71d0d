"""The free list of KV pages, and page tables as copies."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import ResourceError
from pipo_ray.pipeline.page_pool import PagePool, spans


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.integers(0, 9)), max_size=60))
def test_no_page_is_in_two_tables_and_none_is_lost(num_pages: int, steps: list[tuple[int, bool, int]]) -> None:
    pool = PagePool("RAM", num_pages)
    tables: list[list[int]] = []
    for count, from_end, victim in steps:
        taken = sum(map(len, tables))
        if taken + count <= num_pages:
            tables.append(pool.take(count, from_end=from_end))
            assert len(tables[-1]) == count
        else:
            with pytest.raises(ResourceError, match=f"{count} KV pages are needed in RAM, {num_pages - taken} of "):
                pool.take(count)
            if victim < len(tables):
                pool.give(tables.pop(victim))
        pages = [page for table in tables for page in table]
        assert len(set(pages)) == len(pages)
        assert all(0 <= page < num_pages for page in pages)
        assert pool.num_free == num_pages - len(pages)
    for table in tables:
        pool.give(table)
    assert pool.take(num_pages) == list(range(num_pages))


def test_neighbours_are_found_where_there_are_some() -> None:
    pool = PagePool("RAM", 10)
    first, second, third = pool.take(2), pool.take(3), pool.take(1)
    assert (first, second, third) == ([0, 1], [2, 3, 4], [5])
    assert pool.take(2, from_end=True) == [8, 9]
    pool.give(second)
    assert pool.take(3) == [2, 3, 4]
    pool.give(first)
    assert sorted(pool.take(4)) == [0, 1, 6, 7]


def test_a_page_is_given_back_once() -> None:
    pool = PagePool("RAM", 4)
    pages = pool.take(2)
    pool.give(pages)
    with pytest.raises(ValueError, match="KV page 0 of RAM is given back, but it is free"):
        pool.give(pages)


@given(st.integers(1, 5), st.permutations(range(8)), st.permutations(range(8)), st.data())
def test_spans_cover_every_token_once_and_in_order(
    page_tokens: int, left: list[int], right: list[int], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, 8 * page_tokens))
    stop = data.draw(st.integers(start, 8 * page_tokens))
    got = list(spans(page_tokens, start, stop, left, right))
    rows = [(a + i, b + i) for count, a, b in got for i in range(count)]
    assert rows == [
        (
            left[t // page_tokens] * page_tokens + t % page_tokens,
            right[t // page_tokens] * page_tokens + t % page_tokens,
        )
        for t in range(start, stop)
    ]
    for (count, a, b), (_, c, d) in itertools.pairwise(got):
        assert (a + count, b + count) != (c, d)  # neighbours are one span


def test_neighbours_are_one_span() -> None:
    assert list(spans(4, 2, 15, [3, 4, 5, 9])) == [(10, 14), (3, 36)]
    assert list(spans(4, 5, 5, [3, 4])) == []
