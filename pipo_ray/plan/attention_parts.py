"""How attention of several sequences' tokens to packed pages is shared out. Pure arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipo_ray.plan.kv_pages import PAGE_TOKENS

_MOST_PAGES = 1024
"""In a part: what lies between two of them is a number of 32 bits."""


class SeenTokens(NamedTuple):
    """What a token sees that comes alone: it is number `column` of its row, and the last of `size` tokens of a window
    with room for `room`, behind `num_pages` packed pages. `run_stops` are the numbers of pages behind the last one of
    each run of neighbours; tokens before `first_visible` are not seen. With `leaves` the window's first page is to be
    packed then.
    """

    column: int
    num_pages: int
    size: int
    room: int
    first_visible: int
    run_stops: tuple[int, ...]
    leaves: bool


@dataclass(frozen=True)
class AttentionWork:
    """Whole numbers for the kernels, see `triton_kernels/packed_attention.py`: of `num_sequences` sequences, behind
    them of `num_parts` parts, behind them which of the sequences have a page that leaves their window.
    """

    numbers: list[int]
    num_sequences: int
    num_parts: int
    num_leaving: int


def share_out(sequences: Sequence[SeenTokens], num_heads: int, num_programs: int) -> AttentionWork:
    """Parts of as many pages as there are for each of about `num_programs`, which take a part for one of `num_heads`
    heads; none has pages of two runs.
    """
    begins = [min(one.first_visible // PAGE_TOKENS, one.num_pages) for one in sequences]
    all_pages = sum(one.num_pages - begin for one, begin in zip(sequences, begins, strict=True))
    pages = min(max(1, -(-all_pages * num_heads // num_programs)), _MOST_PAGES)
    facts: list[int] = []
    parts: list[int] = []
    runs = num_parts = 0
    for number, (one, begin) in enumerate(zip(sequences, begins, strict=True)):
        first_part, at = num_parts, begin
        for run, stop in enumerate(one.run_stops):
            while at < min(stop, one.num_pages):
                count = min(pages, min(stop, one.num_pages) - at)
                parts += (number, runs + run, at, count)
                at += count
                num_parts += 1
        runs += len(one.run_stops)
        in_window = max(0, one.first_visible - one.num_pages * PAGE_TOKENS) // PAGE_TOKENS
        for tile in range(in_window, -(-one.size // PAGE_TOKENS)):
            parts += (number, -1, tile, 1)
            num_parts += 1
        facts += (
            one.column, one.num_pages, one.size, one.room, one.first_visible, first_part, num_parts - first_part, 0
        )  # fmt: skip
    leaving = [number for number, one in enumerate(sequences) if one.leaves]
    return AttentionWork([*facts, *parts, *leaving], len(sequences), num_parts, len(leaving))
