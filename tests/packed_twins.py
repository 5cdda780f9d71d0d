"""Sequences in packed pages that are elsewhere, and begin on each other; and the same where they are computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from fake_device import FakeDevice
from hypothesis import strategies as st
from prefix_twins import RowTwins

from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS, packed_pages

HEADS, KV_HEADS, DIM = 2, 1, 16
WAYS = ["new", "behind", "behind", "passing", "passing", "point", "end", "cut", "take", "go"]

HISTORIES = st.lists(
    st.fixed_dictionaries(
        {
            "way": st.sampled_from(WAYS),
            "on": st.integers(0, 9),
            "back": st.sampled_from([0, 0, 1, 20, 63]),
            "capacity": st.integers(1, 200),
            "first": st.sampled_from([1, 1, 5, 64, 150]),
            "tokens": st.lists(st.sampled_from([0, 1, 1, 1, 64, 150]), min_size=8, max_size=8),
        }
    ),
    min_size=3,
    max_size=12,
)


class PackedTwins(RowTwins):
    """Sequences whose pages `paged` has, at most `pages` of `page_tokens` of each layer and of so many that `grow`, and
    the same where they are computed.
    """

    def __init__(
        self, paged: Any, bits: tuple[int, ...], device: FakeDevice | None, rule: AttentionRule, seed: int,
        *, pages: int, page_tokens: int = PAGE_TOKENS, grow: int = 100,
    ) -> None:  # fmt: skip
        self.stores = LowBitStore(bits, None, paged), LowBitStore(bits)
        super().__init__(self.stores[0], len(bits), (HEADS, KV_HEADS), DIM, device, rule, seed)
        self._pages, self._page_tokens, self._grow = pages, page_tokens, grow

    def total(self, name: int) -> int:
        return self.pairs[name][0].start + self.pairs[name][0].length

    def begin(self, name: int) -> int:
        """Its first token at 16 bits."""
        layers = self.pairs[name][0]._layers
        return layers[0].begin if layers else self.total(name)

    def open(self, capacity: int, behind: int | None = None, tokens: int = 0) -> int | None:
        """A sequence with room for so many tokens behind the first `tokens` of another's line, the last of which it
        gets at 16 bits; a point, if that is all.
        """
        first = packed_pages(tokens) * PAGE_TOKENS
        if not self.has_room(capacity + tokens - first):
            return None
        line = self.line(behind, first)
        mine, theirs = (
            store.open(capacity + tokens - first, self.caches(line, which), pages=capacity > 0)
            for which, store in enumerate(self.stores)
        )
        if behind is not None:
            for cache, other in zip((mine, theirs), self.pairs[behind], strict=True):
                cache.begin_with(other, tokens - first)
        return self.add((mine, theirs), line)

    def has_room(self, capacity: int, instead_of: int | None = None) -> bool:
        others = [mine for name, (mine, _) in self.pairs.items() if name != instead_of]
        held = sum(-(-tokens // self._page_tokens) for tokens in (capacity, *(one.capacity for one in others)))
        return held <= self._pages and sum(getattr(one.wide, "grows", True) for one in others) < self._grow


def behind(twins: PackedTwins, name: int, back: int, passes: int) -> int | None:
    """A point behind which another can begin: among the last tokens at 16 bits, or in the sweep that passes it."""
    cache, first = twins.pairs[name][0], twins.begin(name)
    total, point = twins.total(name), twins.total(name) + passes - back
    if point > total:
        point = min(point, cache.start + cache.capacity - 1)
    else:
        point = max(point, first + WINDOW_TOKENS if first else 1)
        point = min(point, first + WINDOW_TOKENS + PAGE_TOKENS - 1)  # else a page would have to be packed
    return point if first < point <= total + passes else None


def play(twins: PackedTwins, history: list[dict[str, Any]], seed: int, check: Callable[[], None]) -> None:
    """Sequences begin behind one that runs or has ended, in the sweep that computes what they share, on a point; ended
    ones are cut to what others stand on, taken and dropped in any order, and at last all.
    """
    ended, points = set[int](), set[int]()
    if (first := twins.open(500)) is not None:
        twins.sweep([(first, 330)])
    for event in history:
        joins = list[tuple[int, int]]()
        live = [name for name in twins.pairs if twins.total(name)]
        on = live[event["on"] % len(live)] if live else None
        batch = {
            name: min(count, twins.pairs[name][0].capacity - twins.pairs[name][0].length)
            for name, count in zip(live, event["tokens"], strict=False)
            if name not in ended
        }
        way = event["way"]
        if way == "new" or on is None:
            if (name := twins.open(event["capacity"])) is not None:
                joins = [(name, min(event["first"], event["capacity"]))]
        elif way in ("behind", "passing", "point"):
            passes = 0 if way == "behind" else batch.get(on, 0)
            point = behind(twins, on, event["back"], passes)
            if point is not None:
                if way == "point":
                    if (name := twins.open(0, on, point)) is not None:
                        points.add(name)
                        ended.add(name)
                elif (name := twins.open(event["capacity"], on, point)) is not None:
                    joins = [(name, min(event["first"], event["capacity"]))]
        elif way == "end" and on not in points and twins.pairs[on][0].length:
            twins.resize(on, twins.pairs[on][0].length, twins.pairs[on][0].length)
            ended.add(on)
            batch.pop(on, None)
        elif way == "cut" and on in ended - points and twins.needed(on):
            twins.resize(on, twins.needed(on), twins.needed(on))
        elif way == "take" and on in ended - points and not twins.needed(on):
            point = behind(twins, on, event["back"], 0)
            if point is not None:
                length = point - twins.pairs[on][0].start
                if twins.has_room(length + event["capacity"], instead_of=on):
                    twins.resize(on, length + event["capacity"], length)
                    ended.discard(on)
                    joins = [(on, 1)]
        elif way == "go" and not twins.needed(on):
            batch.pop(on, None)
            twins.drop(on)
        if steps := [(name, count) for name, count in [*batch.items(), *joins] if count]:
            twins.sweep(steps)
        check()
    chance = random.Random(seed)
    while twins.pairs:
        twins.drop(chance.choice([name for name in twins.pairs if not twins.needed(name)]))
