"""Which of the caches that are there has most of a sequence's first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipo_ray.scheduling.prefix_node import Node
from pipo_ray.scheduling.window import Window


@dataclass(frozen=True)
class Found:
    """A node on which a sequence may begin behind `matched` tokens; and the one that agrees with it for longest."""

    source: Node | None = None
    matched: int = 0
    alike: Node | None = None
    agreed: int = 0


def longest(
    tokens: tuple[int, ...], nodes: Sequence[Node], window: Window, page_tokens: int, least: int,
    *, stored: bool = False, passing: bool = False,
) -> Found:  # fmt: skip
    """Of `nodes`, with those that they stand on, the one with most of `tokens`, and how many, in whole pages of
    `page_tokens`, at least `least`; `stored`: of those that are there before the request that is being formed;
    `passing`: with those, too, that only that request passes. With a `window` one can begin where it is there alone.
    """
    best: tuple[Node | None, int] = (None, 0)
    alike = best
    among = {*nodes}
    candidates = [(node, 0) for node in nodes if node.parent is None or node.attached > node.first]
    while candidates:
        node, matched = candidates.pop()
        if node not in among:
            continue
        there = node.stored if stored else node.computed
        head = node.tokens(least)
        if matched == 0 and head != tokens[: len(head)]:  # as most are; the rest need not be looked at
            continue
        own = node.tokens(max(0, there - node.first))
        common = common_tokens(tokens[matched:], own) // page_tokens * page_tokens
        matched += common
        if common and _is_better(node, matched, *alike):
            alike = node, matched
        behind = _behind(node, matched, window)
        if common and _is_better(node, behind, *best) and _is_way_in(node, behind, window, passing):
            best = node, behind
        candidates += [(n, n.first) for n in node.children if n.attached == n.first and n.first <= matched]
    return Found(*best, *alike)


def packed_at(node: Node, matched: int, window: Window) -> int:
    """Of the first `matched` tokens of its line, those that whoever begins behind them finds in pages."""
    if not window.tokens:
        return matched
    if node.sequence is None:
        return node.packed
    return window.packed_of(matched, node.sequence.most_cached)


def _behind(node: Node, matched: int, window: Window) -> int:
    """So many tokens, or one less: who begins with a page that is to leave its window would have to pack it where no
    page can be written, if pages are elsewhere.
    """
    if window.places is None or packed_at(node, matched, window) == window.packed(matched):
        return matched
    return matched - 1


def _is_way_in(node: Node, matched: int, window: Window, passing: bool) -> bool:
    """Whether a sequence can begin behind so many tokens that it has in common with the node."""
    if not window.tokens:
        return True
    if node.sequence is not None and not (passing and node.reached):  # it goes on, and its window with it
        return False
    return window.packed(matched) >= node.packed


def _is_better(node: Node, matched: int, other: Node | None, others: int) -> bool:
    return other is None or (matched, node.last_used) > (others, other.last_used)


def common_tokens(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first tokens are equal. Halves are compared as a whole, which is far faster than token by token."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
