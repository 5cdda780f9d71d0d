from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.plan import attention_parts
from pipo_ray.plan.attention_parts import SeenTokens, share_out
from pipo_ray.plan.kv_pages import PAGE_TOKENS


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=3), st.integers(1, 192), st.integers(0, 9000), st.booleans()),
        min_size=1, max_size=6,
    ),
    st.integers(1, 16), st.integers(1, 500),
)  # fmt: skip
def test_every_token_that_is_seen_is_in_one_part(
    sizes: list[tuple[list[int], int, int, bool]], heads: int, programs: int
) -> None:
    seen = []
    for column, (runs, size, first, leaves) in enumerate(sizes):
        stops = tuple(sum(runs[: number + 1]) for number in range(len(runs)))
        length = sum(runs) * PAGE_TOKENS + size
        seen.append(SeenTokens(column, sum(runs), size, 192, min(first, length - 1), stops, leaves))
    work = share_out(seen, heads, programs)
    count = len(seen)
    facts = [work.numbers[8 * number : 8 * number + 8] for number in range(count)]
    parts = [work.numbers[8 * count + 4 * number :][:4] for number in range(work.num_parts)]
    assert work.numbers[8 * count + 4 * work.num_parts :] == [n for n, one in enumerate(seen) if one.leaves]
    assert work.num_leaving == sum(one.leaves for one in seen)
    assert work.num_sequences == count
    begins = [0]
    for one in seen:
        begins.append(begins[-1] + len(one.run_stops))
    at = 0
    for number, (one, fact) in enumerate(zip(seen, facts, strict=True)):
        assert fact[:5] == [one.column, one.num_pages, one.size, one.room, one.first_visible]
        first_part, num_parts = fact[5:7]
        assert first_part == at
        at += num_parts
        tokens: list[int] = []
        for sequence, run, first, pages in parts[first_part : first_part + num_parts]:
            assert sequence == number
            if run < 0:
                begin = one.num_pages * PAGE_TOKENS
                part = list(
                    range(begin + first * PAGE_TOKENS, min(begin + (first + 1) * PAGE_TOKENS, begin + one.size))
                )
            else:
                bounds = (0, *one.run_stops)
                assert bounds[run - begins[number]] <= first
                assert first + pages <= bounds[run - begins[number] + 1]
                part = list(range(first * PAGE_TOKENS, (first + pages) * PAGE_TOKENS))
            assert part[-1] >= one.first_visible, "a part of which nothing is seen"
            tokens += part
        assert tokens == list(range(tokens[0], one.num_pages * PAGE_TOKENS + one.size))
        assert tokens[0] <= one.first_visible
    assert at == work.num_parts


def test_parts_are_as_many_as_programs_are_wanted() -> None:
    seen = [SeenTokens(0, 512, 129, 192, 0, (512,), False)]
    assert share_out(seen, 8, 1056).num_parts == 512 // 4 + 3
    assert share_out(seen, 8, 1).num_parts == 1 + 3
    assert share_out(seen * 32, 8, 1056).num_parts == 32 * (-(-512 // 125) + 3)


def test_what_lies_between_pages_of_a_part_fits_32_bits() -> None:
    pages = 40_000
    parts = share_out([SeenTokens(0, pages, 1, 192, 0, (pages,), False)], 1, 1).num_parts
    assert parts == -(-pages // attention_parts._MOST_PAGES) + 1
