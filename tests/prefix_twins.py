"""Sequences that begin on each other's tokens, each with two caches, of which one is the measure of the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from fake_device import FakeDevice
from hypothesis import strategies as st
from kv_sweeps import segments_of

from pipo_ray.model.kv_cache import RaggedCache
from pipo_ray.model.kv_spans import AttentionRule

WAYS = ["new", "behind", "behind", "passing", "end", "cut", "take", "go"]


class TwinCaches:
    """`make` opens both caches of a sequence with so many tokens of its own behind a line of others'; `has_room` says
    whether the books would, with one of them given up; `sweep` computes so many tokens of each, as far as it is not
    given up behind so many layers.
    """

    def __init__(self) -> None:
        self.pairs: dict[int, tuple[Any, Any]] = {}
        self.lines: dict[int, list[tuple[int, int]]] = {}
        self._names = 0

    def make(self, capacity: int, line: list[tuple[int, int]]) -> tuple[Any, Any]:
        raise NotImplementedError

    def has_room(self, capacity: int, instead_of: int | None = None) -> bool:
        raise NotImplementedError

    def sweep(self, batch: list[tuple[int, int]], layers: int | None = None) -> None:
        raise NotImplementedError

    def caches(self, line: list[tuple[int, int]], which: int) -> tuple[tuple[Any, int], ...]:
        """A line in one of the two."""
        return tuple((self.pairs[one][which], count) for one, count in line)

    def open(self, capacity: int, behind: int | None = None, tokens: int = 0) -> int | None:
        """A sequence with room for so many tokens of its own behind the first `tokens` of another's line; None where
        there is none.
        """
        if not self.has_room(capacity):
            return None
        line = self.line(behind, tokens)
        return self.add(self.make(capacity, line), line)

    def line(self, behind: int | None, tokens: int) -> list[tuple[int, int]]:
        """The sequences that have the first `tokens` of one, and how many each."""
        line, at = list[tuple[int, int]](), 0
        for one, count in [] if behind is None else [*self.lines[behind], (behind, tokens)]:
            if (count := min(count, tokens - at)) > 0:
                line.append((one, count))
                at += count
        return line

    def add(self, pair: tuple[Any, Any], line: list[tuple[int, int]]) -> int:
        """A sequence's name."""
        self._names += 1
        self.pairs[self._names], self.lines[self._names] = pair, line
        return self._names

    def needed(self, name: int) -> int:
        """Its own tokens on which others stand."""
        return max((count for line in self.lines.values() for one, count in line if one == name), default=0)

    def resize(self, name: int, capacity: int, length: int) -> None:
        for cache in self.pairs[name]:
            cache.resize(capacity, length)

    def drop(self, name: int) -> None:
        for cache in self.pairs.pop(name):
            cache.drop()
        del self.lines[name]


class RowTwins(TwinCaches):
    """The first of each pair goes through rows of `store`, the second by itself. Each result of the one must be the
    other's. `heads`: of queries, and of keys and values.
    """

    def __init__(
        self, store: Any, num_layers: int, heads: tuple[int, int], dim: int, device: FakeDevice | None,
        rule: AttentionRule, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.device, self.rule, self.generator = device, rule, torch.Generator().manual_seed(seed)
        self._store, self._num_layers, self._heads, self._dim = store, num_layers, heads, dim

    def sweep(self, batch: list[tuple[int, int]], layers: int | None = None) -> None:
        assert layers is None, "no sweep is given up here"
        total = sum(count for _, count in batch)
        segments = segments_of([(self.pairs[name][0], count) for name, count in batch])
        row = RaggedCache(segments, self._store)
        row.begin_sweep()
        of_queries, of_keys = self._heads
        for layer in range(self._num_layers):
            query, keys, values = (
                torch.randn(heads, total, self._dim, generator=self.generator)
                for heads in (of_queries, of_keys, of_keys)
            )
            row.update(keys[None], values[None], layer)
            row.begin_layer()
            for (name, _), segment in zip(batch, segments, strict=True):
                own = [tensor[:, segment.start : segment.stop] for tensor in (query, keys, values)]
                with nullcontext() if self.device is None else self.device.watching():
                    got = segment.cache.attend(layer, *own, self.rule).clone()
                assert torch.equal(got, self.pairs[name][1].attend(layer, *own, self.rule))
            row.end_layer()
        row.advance()
        for name, count in batch:
            self.pairs[name][1].advance(count)


def histories(page: int, capacity: int, given_up: list[int]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """What happens to sequences of up to `capacity` tokens in pages of `page`, sweep by sweep."""
    return st.lists(
        st.fixed_dictionaries(
            {
                "way": st.sampled_from(WAYS),
                "on": st.integers(0, 9),
                "back": st.sampled_from([0, 0, 1, page - 1, page, page * 3 // 2]),
                "capacity": st.integers(1, capacity),
                "first": st.sampled_from([1, 1, 5, page, page * 3 // 2]),
                "tokens": st.lists(st.sampled_from([0, 1, 1, 1, page // 2, page * 5 // 4]), min_size=8, max_size=8),
                "given_up": st.sampled_from(given_up),
            }
        ),
        min_size=3,
        max_size=13,
    )


def play(two: TwinCaches, history: list[dict[str, Any]], seed: int, check: Callable[[], None] = lambda: None) -> None:
    """Sequences begin behind one that runs or has ended, and in the sweep that computes what they share; ended ones are
    cut, taken and dropped in any order, and at last all.
    """
    ended = set[int]()
    for event in history:
        joins = list[tuple[int, int]]()
        live, way = list(two.pairs), event["way"]
        on = live[event["on"] % len(live)] if live else None
        batch = {
            name: min(count, two.pairs[name][0].capacity - two.pairs[name][0].length)
            for name, count in zip(live, event["tokens"], strict=False)
            if name not in ended
        }
        if way == "new" or on is None:
            if (name := two.open(event["capacity"])) is not None:
                joins = [(name, min(event["first"], event["capacity"]))]
        elif way in ("behind", "passing"):
            passes = batch.get(on, 0) if way == "passing" else 0
            tokens = two.pairs[on][0].start + two.pairs[on][0].length + passes - event["back"]
            if tokens > 0 and (name := two.open(event["capacity"], on, tokens)) is not None:
                joins = [(name, min(event["first"], event["capacity"]))]
        elif way == "end" and two.pairs[on][0].length:
            two.resize(on, two.pairs[on][0].length, two.pairs[on][0].length)
            ended.add(on)
            batch.pop(on, None)
        elif way == "cut" and on in ended:
            kept = max(two.needed(on), two.pairs[on][0].length - event["back"])
            if kept > 0:
                two.resize(on, kept, kept)
        elif way == "take" and on in ended and not two.needed(on):
            length = max(1, two.pairs[on][0].length - event["back"])
            if two.has_room(length + event["capacity"], instead_of=on):
                two.resize(on, length + event["capacity"], length)
                ended.discard(on)
                joins = [(on, 1)]
        elif way == "go" and not two.needed(on):
            batch.pop(on, None)
            ended.discard(on)
            two.drop(on)
        if steps := [(name, count) for name, count in [*batch.items(), *joins] if count]:
            if event["given_up"]:
                two.sweep(steps, event["given_up"])
            two.sweep(steps)
        check()
    chance = random.Random(seed)
    while two.pairs:
        two.drop(chance.choice([name for name in two.pairs if not two.needed(name)]))
