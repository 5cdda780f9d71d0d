"""What the scheduler knows of one cache of the compute worker's."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipo_ray.scheduling.sequences import Sequence


@dataclass(eq=False)
class Node:
    """KV of tokens `first` to `computed` of a sequence; those before are its ancestors'.

    `name` is that of the compute worker's cache, which is not there before the sequence has `begun`. The node is
    attached behind `attached` tokens of its parent's line: where the cache begins, or, until it has been copied, where
    the copy will end. `sequence` is None once it has ended, and `token_ids` are then the node's own.

    With a window: those before `packed` are in pages at the beginning of the request that is being formed, those behind
    at 16 bits, in which the worker may have computed up to `reached`. `keep`: where points are to be kept on the way.
    """

    name: str
    sequence: Sequence | None
    first: int = 0
    computed: int = 0
    stored: int = 0
    begun: bool = False
    token_ids: tuple[int, ...] = ()
    parent: Node | None = None
    attached: int = 0
    children: list[Node] = field(default_factory=list)
    last_used: int = 0
    packed: int = 0
    reached: int = 0
    keep: list[int] = field(default_factory=list)
    is_point: bool = False

    def tokens(self, count: int) -> tuple[int, ...]:
        """The ids of its own first `count` tokens, or of those that there are."""
        stop = min(self.computed, self.first + count)
        if self.sequence is None:
            return self.token_ids[: stop - self.first]
        return self.sequence.tokens(self.first, stop)

    @property
    def takeable(self) -> bool:
        """Whether another sequence may go on with its cache."""
        return self.sequence is None and not self.children and not self.is_point

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

    def line(self, stop: int) -> list[tuple[Node, int]]:
        """The nodes that hold tokens 0 to `stop`, and how many of its own each contributes."""
        parts: list[tuple[Node, int]] = []
        node: Node | None = self
        while node is not None:
            if stop > node.first:
                parts.append((node, stop - node.first))
                stop = node.first
            node = node.parent
        return parts[::-1]
