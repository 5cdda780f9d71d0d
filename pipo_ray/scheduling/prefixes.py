"""Prefixes whose KV is there already: the scheduler's books of the caches that the compute worker holds.

Every sequence's KV is a node. While the sequence runs its node grows; when it has ended the node stays, as long as the
KV budget has room for it or others stand on it. A new sequence whose tokens begin like a node's stands on that node: it
computes only what comes behind, and keeps only that itself. So nodes are trees, in which a child is attached to its
parent behind some of the parent's tokens. Keys and values of a token depend on the tokens before it alone, and never
change: parts of a node that still grows may be shared as well, even in the sweep that computes them.

Requests reach the compute worker in order. What a sweep computes that has been sent counts as there for what is sent
behind it; if that sweep fails, all begin anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pipo_ray.messages import SequenceStep
from pipo_ray.model.batch import PrefixPart
from pipo_ray.scheduling.sequences import Sequence

Sharing = Literal["none", "shared"]
"""Whether sequences stand on each other's KV."""

LEAST_SHARED = 32
"""Tokens below which a common prefix is computed again: each part of a prefix costs attention a call per layer."""

MOST_PARTS = 8
"""The most parts that a prefix is read from; one in more parts is copied."""


@dataclass(eq=False)
class _Node:
    """KV of tokens `first` to `computed` of a sequence; those before are its ancestors'.

    `name` is that of the compute worker's cache, which is not there before the sequence has `begun`. The node is
    attached behind `attached` tokens of its parent's line: where the cache begins, or, until it has been copied, where
    the copy will end. `sequence` is None once it has ended, and `token_ids` are then the node's own.
    """

    name: str
    sequence: Sequence | None
    first: int = 0
    computed: int = 0
    stored: int = 0
    begun: bool = False
    token_ids: tuple[int, ...] = ()
    parent: _Node | None = None
    attached: int = 0
    children: list[_Node] = field(default_factory=list)
    last_used: int = 0

    def tokens(self, count: int) -> tuple[int, ...]:
        """The ids of its own first `count` tokens, or of those that there are."""
        stop = min(self.computed, self.first + count)
        if self.sequence is None:
            return self.token_ids[: stop - self.first]
        return self.sequence.tokens(self.first, stop)

    @property
    def needed(self) -> int:
        """Where the tokens end on which others stand."""
        return max((child.attached for child in self.children), default=self.first)

    @property
    def needed_by_running(self) -> int:
        """Where the tokens end on which those that run stand: the least to which it could ever be cut."""
        return max(
            (child.attached for child in self.children if child.sequence or child.needed_by_running > child.first),
            default=self.first,
        )

    def line(self, stop: int) -> list[tuple[_Node, int]]:
        """The nodes that hold tokens 0 to `stop`, and how many of its own each contributes."""
        parts: list[tuple[_Node, int]] = []
        node: _Node | None = self
        while node is not None:
            if stop > node.first:
                parts.append((node, stop - node.first))
                stop = node.first
            node = node.parent
        return parts[::-1]


class PrefixCache:
    """The books of one compute worker's caches. Ended sequences hold `held` tokens of the KV budget, in whole pages of
    `page_tokens`; what those that run have reserved is not in it.
    """

    def __init__(self, sharing: Sharing = "none", page_tokens: int = 1) -> None:
        self._sharing, self._page_tokens = sharing, page_tokens
        self._running: dict[str, _Node] = {}
        self._ended: list[_Node] = []
        self._drop: list[str] = []
        self._cut: dict[str, int] = {}
        self._clock = 0

    @property
    def held(self) -> int:
        """Tokens of KV budget that ended sequences take."""
        return sum(self._pages(node.computed - node.first) for node in self._ended)

    # -- where a sequence begins
    # ------------------------------------------------------------------------------------------

    def place(self, sequence: Sequence, *, alone: bool = False) -> None:
        """Let `sequence`, which has not begun, stand on the longest prefix that is there; with `alone` on none. Sets
        its `begins` and `shared`. Doing it again can only make them larger.
        """
        node = self._running.get(sequence.name)
        if node is None:
            node = self._running[sequence.name] = _Node(sequence.name, sequence)
        if self._sharing == "none" or sequence.score or alone or node.computed > node.first:
            return
        source, matched = self._longest(sequence, stored=False)
        copied = source is not None and len(source.line(matched)) > MOST_PARTS
        if copied:
            if sequence.shared:  # it has reserved no more than what comes behind
                return
            source, matched = self._longest(sequence, stored=True)
        if source is None or matched < LEAST_SHARED or matched <= sequence.begins:
            return
        self._touch(source.line(matched))
        if source.sequence is None and not source.children and source.computed - matched < LEAST_SHARED:
            self._take(sequence, source, matched)
            return
        self._detach(node)
        source.children.append(node)
        node.parent, node.attached = source, matched
        node.first = node.computed = node.stored = 0 if copied else matched
        sequence.begins, sequence.shared = matched, node.first

    def begin(self, sequence: Sequence) -> tuple[PrefixPart, ...]:
        """`sequence` takes its first step in the request that is being formed: what it begins on."""
        node = self._node(sequence)
        node.begun = True
        if self._sharing == "none":
            return ()
        if node.computed > node.first:  # it has taken another's cache
            *shared, (_, own) = node.line(node.computed)
            parts = [PrefixPart(part.name, count) for part, count in shared]
            parts.append(PrefixPart(node.name, own, "take"))
            self._cut.pop(node.name, None)
            node.name = sequence.name
            return tuple(parts)
        if node.parent is None:
            return ()
        line = node.parent.line(node.attached)
        if node.first:
            return tuple(PrefixPart(part.name, count) for part, count in line)
        node.computed = node.attached
        self._detach(node)
        return tuple(PrefixPart(part.name, count, "copy") for part, count in line)

    def forgo_copies(self) -> None:
        """Let nobody who has not begun insist on a prefix that would be copied: until it begins it may be given up."""
        for node in self._running.values():
            if node.parent is not None and node.attached > node.first and node.sequence is not None:
                self._detach(node)
                node.sequence.begins = 0

    def computes(self, step: SequenceStep) -> None:
        """`step`, which does not follow, is in the request that is being formed; or it has been done."""
        if (node := self._running.get(step.sequence)) is not None:
            node.computed = max(node.computed, step.start + step.num_tokens)

    def formed(self) -> None:
        """The request is complete."""
        for node in self._running.values():
            node.stored = node.computed

    # -- what stays
    # -------------------------------------------------------------------------------------------------------

    def end(self, sequence: Sequence) -> None:
        """`sequence` runs no more: its KV stays if others stand on it, or may want to."""
        node = self._running.pop(sequence.name, None)
        if node is None:
            return
        node.token_ids, node.sequence = sequence.tokens(node.first, node.computed), None
        sequence.begins = sequence.shared = 0
        if not node.begun:
            self._detach(node)
            return
        self._ended.append(node)
        self._touch([(node, 0)])
        if node.children or (self._sharing != "none" and not sequence.score and self._is_new(node, sequence)):
            self._cut[node.name] = node.computed - node.first
        else:
            self._cut_to(node, node.first)

    def make_room(self, lacking: int) -> bool:
        """Let ended sequences give up so many tokens of KV budget, those first that were used least recently; if they
        cannot, they give up nothing.
        """
        if lacking > sum(self._pages(n.computed - n.first) - self._pages(n.needed_by_running - n.first)
                         for n in self._ended):  # fmt: skip
            return False
        while lacking > 0:
            node = min((n for n in self._ended if n.needed < n.computed), key=lambda n: n.last_used)
            before = self._pages(node.computed - node.first)
            self._cut_to(node, node.needed)
            lacking -= before - self._pages(node.computed - node.first)
        return True

    def clear(self) -> None:
        """Forget everything, as the compute worker has."""
        for node in self._running.values():
            assert node.sequence is not None
            node.sequence.begins = node.sequence.shared = 0
        self._drop.clear()
        self._cut.clear()
        self._running.clear()
        self._ended.clear()

    def changes(self) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
        """What the compute worker is to drop, and to cut, before what is sent next."""
        result = tuple(self._drop), tuple(self._cut.items())
        self._drop, self._cut = [], {}
        return result

    # -- inside
    # -----------------------------------------------------------------------------------------------------------

    def _node(self, sequence: Sequence) -> _Node:
        self.place(sequence, alone=True)
        return self._running[sequence.name]

    def _longest(self, sequence: Sequence, stored: bool, other_than: _Node | None = None) -> tuple[_Node | None, int]:
        """The node with most of the first tokens of `sequence` (all but the last, whose logits are wanted), and how
        many, in whole pages; `stored`: of those that are there before the request that is being formed.
        """
        tokens = sequence.tokens(0, sequence.length - 1)
        best: _Node | None = None
        most = 0
        roots = [node for node in self._nodes() if node.parent is None or node.attached > node.first]
        candidates = [(node, 0) for node in roots]
        while candidates:
            node, matched = candidates.pop()
            if node is other_than:
                continue
            there = node.stored if stored and node.sequence is not None else node.computed
            head = node.tokens(LEAST_SHARED)
            if matched == 0 and head != tokens[: len(head)]:  # as most are; the rest need not be looked at
                continue
            own = node.tokens(max(0, there - node.first))
            common = _common(tokens[matched:], own) // self._page_tokens * self._page_tokens
            matched += common
            if common and (best is None or (matched, node.last_used) > (most, best.last_used)):
                best, most = node, matched
            candidates += [(n, n.first) for n in node.children if n.attached == n.first and n.first <= matched]
        return best, most

    def _is_new(self, node: _Node, sequence: Sequence) -> bool:
        """Whether the ended `node` has tokens worth keeping, and no other has the same."""
        if node.computed - node.first < LEAST_SHARED:
            return False
        return self._longest(sequence, stored=False, other_than=node)[1] + LEAST_SHARED <= node.computed

    def _take(self, sequence: Sequence, source: _Node, matched: int) -> None:
        """`sequence` goes on with the cache of a sequence that has ended, on which nobody else stands."""
        self._detach(self._running[sequence.name])
        self._ended.remove(source)
        source.sequence, source.token_ids = sequence, ()
        source.computed = source.stored = matched
        self._running[sequence.name] = source
        sequence.begins, sequence.shared = matched, source.first

    def _cut_to(self, node: _Node, stop: int) -> None:
        node.computed = stop
        node.token_ids = node.token_ids[: stop - node.first]
        if stop > node.first:
            self._cut[node.name] = stop - node.first
            return
        self._ended.remove(node)
        self._detach(node)
        self._drop.append(node.name)
        self._cut.pop(node.name, None)

    def _detach(self, node: _Node) -> None:
        if node.parent is not None:
            node.parent.children.remove(node)
            node.parent, node.attached = None, 0

    def _touch(self, line: list[tuple[_Node, int]]) -> None:
        self._clock += 1
        for node, _ in line:
            node.last_used = self._clock

    def _nodes(self) -> Iterator[_Node]:
        yield from self._running.values()
        yield from self._ended

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens) * self._page_tokens


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many first tokens are equal. Halves are compared as a whole, which is far faster than token by token."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low
