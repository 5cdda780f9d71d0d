"""Prefixes whose KV is there already: the scheduler's books of the caches that the compute worker holds.

Every sequence's KV is a node. While the sequence runs its node grows; when it has ended the node stays, as long as the
KV budget has room for it or others stand on it. A new sequence whose tokens begin like a node's stands on that node: it
computes only what comes behind, and keeps only that itself. So nodes are trees, in which a child is attached to its
parent behind some of the parent's tokens. Keys and values of a token depend on the tokens before it alone, and never
change: parts of a node that still grows may be shared as well, even in the sweep that computes them.

Where older tokens are in packed pages, a sequence needs the last ones before it at 16 bits, and a node has those only
of its own last tokens. So sequences share whole pages, copy what is behind them, and can only begin where a node ends
or in the sweep that computes past it; and where a *point* was kept, which is a node that only has such last tokens: at
the end of a long prompt, and where two sequences were seen to part.

Requests reach the compute worker in order. What a sweep computes that has been sent counts as there for what is sent
behind it; if that sweep fails, all begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pipo_ray.messages import SequenceStep
from pipo_ray.model.batch import KeptPoint, PrefixPart
from pipo_ray.scheduling.prefix_node import Node
from pipo_ray.scheduling.prefix_search import Found, common_tokens, longest, packed_at
from pipo_ray.scheduling.sequences import Sequence
from pipo_ray.scheduling.window import NO_WINDOW, Room, Window

Sharing = Literal["none", "shared"]
"""Whether sequences stand on each other's KV."""

LEAST_SHARED = 32
"""Tokens below which a common prefix is computed again: each part of a prefix costs attention a call per layer."""

MOST_PARTS = 8
"""The most parts that a prefix is read from; one in more parts is copied."""

LEAST_KEPT = 64
"""Tokens that whoever comes next must be spared at least for a point to be kept."""


class PrefixCache:
    """The books of one compute worker's caches. Ended sequences have `held` of the KV budget, in whole pages of
    `page_tokens`; what those that run have reserved is not in it. Without `copies` a prefix in too many parts is none.
    """

    def __init__(
        self, sharing: Sharing = "none", page_tokens: int = 1, window: Window = NO_WINDOW, *, copies: bool = True
    ) -> None:
        self._copies = copies
        self._sharing, self._page_tokens, self._window = sharing, page_tokens, window
        self._running: dict[str, Node] = {}
        self._ended: list[Node] = []
        self._made: list[Node] = []  # points, in the request that is being formed
        self._drop: list[str] = []
        self._cut: dict[str, int] = {}
        self._asked: tuple[Node, int] | None = None  # a point of one for the sake of another that is being admitted
        self._clock = self._points = 0

    @property
    def held(self) -> Room:
        """What ended sequences, and points, take of the KV budget."""
        return sum((self._cost(node, node.computed) for node in self._ended), Room())

    @property
    def sequences(self) -> list[Sequence]:
        """Those that have room."""
        return [node.sequence for node in self._running.values() if node.sequence is not None]

    # -- where a sequence begins
    # ------------------------------------------------------------------------------------------

    def place(self, sequence: Sequence, *, alone: bool = False) -> None:
        """Let `sequence`, which has not begun, stand on the longest prefix that is there for sure; with `alone` on
        none. Sets its `begins` and `shared`. Doing it again can only make them larger.
        """
        node = self._running.get(sequence.name)
        if node is None:
            node = self._running[sequence.name] = Node(sequence.name, sequence)
        if self._sharing == "none" or sequence.score or alone or node.computed > node.first:
            return
        found = self._longest(sequence)
        copied = found.source is not None and self._parts(found.source, found.matched) > MOST_PARTS
        if copied:
            if sequence.shared or not self._copies:  # it has reserved no more than what comes behind
                return
            found = self._longest(sequence, stored=True)
        source, matched = found.source, found.matched
        if source is None or matched < LEAST_SHARED or matched <= sequence.begins:
            return
        self._touch(source.line(matched))
        if source.takeable and self._shareable(source) - matched < LEAST_SHARED:
            self._take(sequence, source, matched)
        else:
            self._stand(node, source, matched, copied)

    def start(self, sequence: Sequence) -> int:
        """Where `sequence` begins if it does in the request that is being formed."""
        found = self._in_passing(sequence)
        return sequence.begins if found is None else found.matched

    def begin(self, sequence: Sequence, has_room: Callable[[], bool] = lambda: True) -> tuple[PrefixPart, ...]:
        """`sequence` takes its first step in the request that is being formed: what it begins on. `has_room` says
        whether all that is reserved by then fits, with further points.
        """
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
            node.packed = max(node.packed, self._window.packed_of(node.computed, sequence.most_cached))
            return tuple(parts)
        if (found := self._in_passing(sequence)) is not None and found.source is not None:
            self._stand(node, found.source, found.matched, copied=False)
        self._wish(node, has_room)
        if node.parent is None:
            return ()
        source, matched = node.parent, node.attached
        packed = self._packed_at(source, matched)
        line = source.line(packed)
        parts = [PrefixPart(part.name, count, "share" if node.first else "copy") for part, count in line]
        if matched > packed:
            parts.append(PrefixPart(source.name, matched - packed, "window"))
        node.computed, node.packed = matched, self._window.packed_of(matched, sequence.most_cached)
        self._detach(node)
        if node.first:
            self._attach(node, line[-1][0], node.first)
        return tuple(parts)

    def forgo_copies(self) -> None:
        """Let nobody who has not begun insist on a prefix that would be copied: until it begins it may be given up. Nor
        on room for points.
        """
        for node in self._running.values():
            if node.sequence is None:
                continue
            self._want(node, [])
            if node.parent is not None and node.attached > node.first:
                self._detach(node)
                node.first = node.computed = node.stored = node.sequence.begins = node.sequence.shared = 0

    def computes(self, step: SequenceStep) -> None:
        """`step`, which does not follow, is in the request that is being formed; or it has been done."""
        if (node := self._running.get(step.sequence)) is not None:
            node.computed = max(node.computed, step.start + step.num_tokens)
            node.reached = max(node.reached, node.computed)

    def formed(self, steps: Iterable[SequenceStep] = ()) -> None:
        """The request is complete, with these steps."""
        for step in steps:
            if (node := self._running.get(step.sequence)) is not None:
                node.reached = max(node.reached, step.start + step.num_tokens)
        for node in self._running.values():
            assert node.sequence is not None
            node.stored = node.computed
            if node.reached:
                node.packed = max(node.packed, self._window.packed_of(node.reached, node.sequence.most_cached))
        for node in self._made:
            node.stored = node.computed
        self._made.clear()

    # -- points
    # -----------------------------------------------------------------------------------------------------------

    def wish(self, sequence: Sequence, *, no_points: bool = False) -> None:
        """Let `sequence`, which has not begun, have room for the points that it is to keep, and one that runs before it
        for one where it parts from that. Sets their `to_keep`.
        """
        node = self._running[sequence.name]
        asked, self._asked = self._asked, None
        if not no_points:
            self._wish(node, None)
            self._ask(node)
            return
        self._want(node, [])
        if asked is not None:
            self._want(asked[0], [one for one in asked[0].keep if one != asked[1]])

    def keep(self, sequence: Sequence, start: int, stop: int) -> tuple[KeptPoint, ...]:
        """The points that are kept while `sequence` computes its tokens `start` to before `stop`."""
        node = self._running.get(sequence.name)
        if node is None or not node.keep:
            return ()
        result = []
        for point in [one for one in node.keep if start <= one <= stop]:
            packed = self._packed_at(node, point)
            line = node.line(packed)
            self._points += 1
            kept = Node(
                f"point {self._points}", None, packed, point, packed, True, sequence.tokens(packed, point),
                packed=packed, is_point=True,
            )  # fmt: skip
            if line:
                self._attach(kept, line[-1][0], packed)
            if point < sequence.length - 1:  # one at a prompt's end is the first to go until it has been of use
                self._touch([(kept, 0)])
            self._ended.append(kept)
            self._made.append(kept)
            parts = [PrefixPart(part.name, count) for part, count in line]
            result.append(KeptPoint(kept.name, (*parts, PrefixPart(node.name, point - packed, "window"))))
        self._want(node, [one for one in node.keep if one > stop])
        return tuple(result)

    # -- what stays
    # -------------------------------------------------------------------------------------------------------

    def end(self, sequence: Sequence) -> None:
        """`sequence` runs no more: its KV stays if others stand on it, or may want to."""
        node = self._running.pop(sequence.name, None)
        if node is None:
            return
        node.token_ids, node.sequence = sequence.tokens(node.first, node.computed), None
        node.keep = []
        sequence.forget_prefix()
        if not node.begun:
            self._detach(node)
            return
        self._ended.append(node)
        self._touch([(node, 0)])
        node.stored = node.computed
        if self._window.tokens and self._window.packed(node.computed) < node.packed:
            self._cut_to(node, node.needed)  # it may have computed more than is wanted of it: its last tokens are gone
        elif node.children or (self._sharing != "none" and not sequence.score and self._is_new(node, sequence)):
            self._cut_to(node, self._shareable(node))
        else:
            self._cut_to(node, node.first)

    def make_room(self, lacking: Room) -> bool:
        """Let ended sequences give up so much of the KV budget, those first that were used least recently; if they
        cannot, they give up nothing.
        """
        if (sum((self._beyond(node, node.needed_by_running) for node in self._ended), Room()) - lacking).lacks:
            return False
        while lacking.tokens > 0 or lacking.windows > 0:
            gains = [(node, self._beyond(node, node.needed)) for node in self._ended]
            node, gain = min(
                ((node, gain) for node, gain in gains
                 if (lacking.tokens > 0 < gain.tokens) or (lacking.windows > 0 < gain.windows)),
                key=lambda one: one[0].last_used,
            )  # fmt: skip
            self._cut_to(node, node.needed)
            lacking -= gain
        return True

    def lose(self, names: Iterable[str]) -> set[str]:
        """The compute worker has these caches no more, nor those that stand on them. Returns the sequences that run,
        and have none now.
        """
        names, anew = set(names), set[str]()
        gone = [node for node in self._nodes() if node.name in names]
        for node in gone:  # to which those are added that stand on it
            gone += [child for child in node.children if child not in gone]
        for node in gone:
            self._detach(node)
            if node.sequence is None:
                self._ended.remove(node)
            else:
                anew.add(node.sequence.name)
                del self._running[node.sequence.name]
                node.sequence.forget_prefix()
            self._cut.pop(node.name, None)
            self._drop.append(node.name)
        return anew

    def clear(self) -> None:
        """Forget everything, as the compute worker has."""
        for node in self._running.values():
            assert node.sequence is not None
            node.sequence.forget_prefix()
        self._made.clear()
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

    def _node(self, sequence: Sequence) -> Node:
        self.place(sequence, alone=True)
        return self._running[sequence.name]

    def _longest(
        self, sequence: Sequence, *, stored: bool = False, passing: bool = False, other_than: Node | None = None
    ) -> Found:
        return longest(
            sequence.tokens(0, sequence.length - 1), [node for node in self._nodes() if node is not other_than],
            self._window, 1 if self._window.tokens else self._page_tokens, LEAST_SHARED, stored=stored, passing=passing,
        )  # fmt: skip

    def _in_passing(self, sequence: Sequence) -> Found | None:
        """What `sequence`, which is to begin in the request that is being formed, can begin on in it alone."""
        node = self._node(sequence)
        if self._sharing == "none" or not self._window.tokens or sequence.score or node.computed > node.first:
            return None
        found = self._longest(sequence, passing=True)
        if found.source is None or found.matched < max(LEAST_SHARED, sequence.begins + 1):
            return None
        return found if self._parts(found.source, found.matched) <= MOST_PARTS else None

    def _packed_at(self, source: Node, matched: int) -> int:
        return packed_at(source, matched, self._window)

    def _parts(self, source: Node, matched: int) -> int:
        return len(source.line(self._packed_at(source, matched)))

    def _wish(self, node: Node, has_room: Callable[[], bool] | None) -> None:
        """Want points of `node`, which has not begun: at its prompt's end, if that takes at most half as much as the
        prompt, and where it parts from another one; none where there is one, or somebody wants one. Without `has_room`
        the KV budget has to make some.
        """
        sequence = node.sequence
        assert sequence is not None
        if self._sharing == "none" or not self._window.tokens or sequence.score:
            return
        begins, end = sequence.begins, sequence.length - 1
        wanted = [*node.keep, end] if has_room is None and 2 * self._point_cost(end) <= end else [*node.keep]
        parting = self._longest(sequence, passing=True, other_than=node).agreed
        is_on_its_way = node.parent is not None and node.parent.sequence is not None
        if parting > begins or (parting == begins and is_on_its_way):
            wanted.append(parting)
        there = self._longest(sequence, other_than=node).matched
        wanted = [one for one in {*wanted} if begins <= one and there + LEAST_KEPT <= one]
        wanted = [one for one in wanted if not any(self._wants(other, sequence, one) for other in self._nodes()
                                                   if other is not node)]  # fmt: skip
        had = node.keep
        self._want(node, wanted)
        if has_room is not None and not {*wanted} <= {*had} and not has_room():
            self._want(node, [one for one in wanted if one in had])

    def _ask(self, node: Node) -> None:
        """Want a point of another that runs, where `node` is going to part from it, and which it has yet to reach."""
        sequence = node.sequence
        assert sequence is not None
        if self._sharing == "none" or not self._window.tokens or sequence.score:
            return
        tokens = sequence.tokens(0, sequence.length - 1)
        there = self._longest(sequence).matched
        best, most = None, there + LEAST_KEPT - 1
        for other in self._running.values():
            if other is node or other.sequence is None or other.sequence.score:
                continue
            if other.sequence.tokens(0, LEAST_SHARED) != tokens[:LEAST_SHARED]:
                continue
            common = common_tokens(tokens, other.sequence.tokens(0, other.sequence.length - 1))
            if common in other.keep:
                return
            if common > max(most, other.computed, other.sequence.begins):
                best, most = other, common
        if best is not None:
            self._want(best, [*best.keep, most])
            self._asked = best, most

    def _wants(self, node: Node, sequence: Sequence, point: int) -> bool:
        """Whether a point of these first tokens is wanted of `node`."""
        if node.sequence is None or point not in node.keep:
            return False
        return node.sequence.tokens(0, point) == sequence.tokens(0, point)

    def _want(self, node: Node, points: list[int]) -> None:
        assert node.sequence is not None
        node.keep = sorted(points)
        node.sequence.to_keep, node.sequence.points = sum(map(self._point_cost, points)), len(points)

    def _point_cost(self, num_tokens: int) -> int:
        return self._budget(0, num_tokens - self._window.packed(num_tokens))

    def _is_new(self, node: Node, sequence: Sequence) -> bool:
        """Whether the ended `node` has tokens worth keeping, and no other has the same."""
        if self._shareable(node) - node.first < LEAST_SHARED:
            return False
        return self._longest(sequence, other_than=node).matched + LEAST_SHARED <= node.computed

    def _shareable(self, node: Node) -> int:
        """Of its tokens and those before, those behind which others can begin."""
        return node.computed if self._window.tokens else node.computed // self._page_tokens * self._page_tokens

    def _stand(self, node: Node, source: Node, matched: int, copied: bool) -> None:
        """Let `node`, which has not begun, begin behind `matched` tokens of the line of `source`."""
        assert node.sequence is not None
        self._detach(node)
        self._attach(node, source, matched)
        node.first = node.computed = node.stored = 0 if copied else self._packed_at(source, matched)
        node.sequence.begins, node.sequence.shared = matched, node.first

    def _take(self, sequence: Sequence, source: Node, matched: int) -> None:
        """`sequence` goes on with the cache of a sequence that has ended, on which nobody else stands."""
        self._detach(self._running[sequence.name])
        self._ended.remove(source)
        source.sequence, source.token_ids = sequence, ()
        source.computed = source.stored = matched
        source.reached = 0
        self._running[sequence.name] = source
        sequence.begins, sequence.shared = matched, source.first

    def _cut_to(self, node: Node, stop: int) -> None:
        node.computed = node.stored = stop
        node.packed = min(node.packed, stop)
        node.token_ids = node.token_ids[: stop - node.first]
        if stop > node.first:
            self._cut[node.name] = stop - node.first
            return
        self._ended.remove(node)
        self._detach(node)
        self._drop.append(node.name)
        self._cut.pop(node.name, None)

    def _attach(self, node: Node, parent: Node, attached: int) -> None:
        parent.children.append(node)
        node.parent, node.attached = parent, attached

    def _detach(self, node: Node) -> None:
        if node.parent is not None:
            node.parent.children.remove(node)
            node.parent, node.attached = None, 0

    def _touch(self, line: list[tuple[Node, int]]) -> None:
        self._clock += 1
        for node, _ in line:
            node.last_used = self._clock

    def _nodes(self) -> Iterator[Node]:
        yield from self._running.values()
        yield from self._ended

    def _cost(self, node: Node, stop: int) -> Room:
        """Of the KV budget, what the node has before `stop`."""
        packed = min(stop, node.packed) if self._window.tokens else stop
        has_place = self._window.places is not None and stop > packed
        return Room(self._budget(packed - node.first, stop - packed), int(has_place))

    def _budget(self, packed: int, wide: int) -> int:
        """Tokens of KV budget of so many in pages, and so many at 16 bits; as if in pages, if these have a place."""
        if self._window.places is not None:
            packed, wide = packed + wide, 0
        return self._window.budget(-(-packed // self._page_tokens) * self._page_tokens, wide)

    def _beyond(self, node: Node, stop: int) -> Room:
        """What it has behind `stop`."""
        return self._cost(node, node.computed) - self._cost(node, stop)
