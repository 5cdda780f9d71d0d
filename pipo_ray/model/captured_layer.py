"""A decoder layer as graphs, for a number of tokens; its attention is called between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipo_ray.model.attention import Attention
from pipo_ray.model.kv_cache import RaggedCache
from pipo_ray.pipeline.cuda_graph import Graph, Graphs

Key = tuple[int | str, int | None]
"""Of a tensor among a layer's arguments: position or name, and the index in a tuple."""


class Places:
    """Memory that a graph reads or writes, with places for as many tokens as it was captured for, along `dim`; None: it
    has nothing to do with them.
    """

    def __init__(self, memory: Tensor, dim: int | None) -> None:
        self.memory, self.dim = memory, dim
        self._parts: dict[int, Tensor] = {}

    def of(self, tokens: int) -> Tensor:
        """The places of the first ones: the same tensor every time."""
        if self.dim is None or self.memory.shape[self.dim] == tokens:
            return self.memory
        part = self._parts.get(tokens)
        if part is None:
            part = self._parts[tokens] = self.memory.narrow(self.dim, 0, tokens)
        return part


@dataclass
class AttentionCall:
    """Attention of layer number `layer`, with what it was given and what it gave."""

    layer: int
    attention: Attention
    given: tuple[Tensor, ...]
    output: Tensor


@dataclass
class AttentionStep:
    """Attention between two graphs: queries, keys and values are where the first one leaves them, [1, heads, places,
    head_dim], the output [1, places, heads, head_dim] where the second one finds it.
    """

    layer: int
    attention: Attention
    given: tuple[Places, ...]
    output: Places

    def run(self, cache: RaggedCache, tokens: int) -> None:
        """Attend."""
        cache.layer = self.layer
        self.output.of(tokens).copy_(self.attention(*(one.of(tokens) for one in self.given)))


class Attended:
    """The attention of one layer in one sweep, which must run once."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def remember(self, graphs: Graphs) -> Callable[..., Tensor]:
        """Attention that is remembered."""

        def attend(attention: Attention, cache: RaggedCache, *given: Tensor) -> Tensor:
            with graphs.allow_waiting():
                output = attention(*given)
            self.calls.append(AttentionCall(cache.layer, attention, given, output))
            return output

        return attend

    def repeat(self) -> Callable[..., Tensor]:
        """What it gave, for the calls that were remembered."""
        before = iter(tuple(self.calls))

        def attend(attention: Attention, cache: RaggedCache, *given: Tensor) -> Tensor:
            call = next(before, None)
            return attention(*given) if call is None else call.output

        return attend


@dataclass
class CapturedLayer:
    """A layer's graphs for a number of tokens: `inputs` are filled before they run, `output` is what they leave."""

    steps: list[Graph | AttentionStep]
    inputs: dict[Key, Places]
    constants: dict[Key, Any]
    output: Places

    @property
    def num_calls(self) -> int:
        """Of attention."""
        return sum(isinstance(step, AttentionStep) for step in self.steps)

    def takes(self, given: dict[int | str, Any], tokens: int) -> bool:
        """Whether the arguments are like those of the capture."""
        found = dict(parts_of(given))
        if len(found) != len(self.inputs) + len(self.constants):
            return False
        for key, constant in self.constants.items():
            if key not in found or not _is_same(found[key], constant):
                return False
        for key, input in self.inputs.items():
            tensor, wanted = found.get(key), input.of(tokens)
            if tensor is not wanted and (
                not isinstance(tensor, Tensor) or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype
            ):
                return False
        return True

    def fill(self, given: dict[int | str, Any], tokens: int, filled: dict[int, Tensor]) -> None:
        """Copy the arguments in, those that are not there."""
        for (name, index), input in self.inputs.items():
            tensor, target = given[name] if index is None else given[name][index], input.of(tokens)
            if tensor is not target and filled.get(id(target)) is not tensor:
                target.copy_(tensor)
                filled[id(target)] = tensor

    def run(self, cache: RaggedCache, tokens: int) -> None:
        """Compute the layer."""
        for step in self.steps:
            if isinstance(step, AttentionStep):
                step.run(cache, tokens)
            else:
                step.replay()

    def check(self, calls: list[AttentionCall], wanted: Tensor, hidden: Tensor, tokens: int) -> Iterator[Tensor]:
        """Compute the layer but for attention, which gives what it gave in `calls`: by how much it is off."""
        before = iter(calls)
        for step in self.steps:
            if isinstance(step, AttentionStep):
                call = next(before)
                yield from (_off(mine.of(tokens), theirs) for mine, theirs in zip(step.given, call.given, strict=True))
                step.output.of(tokens).copy_(call.output)
            else:
                step.replay()
        hidden = hidden.float()
        yield _off(self.output.of(tokens).float() - hidden, wanted.float() - hidden)


def parts_of(given: dict[int | str, Any]) -> Iterator[tuple[Key, Any]]:
    """The arguments, those in tuples one by one, without the KV cache."""
    for name, value in given.items():
        if isinstance(value, tuple):
            yield from (((name, index), part) for index, part in enumerate(value))
        elif not isinstance(value, RaggedCache):
            yield (name, None), value


def _is_same(value: Any, constant: Any) -> bool:
    """As far as it can be told: of tensors in a dictionary it cannot."""
    try:
        return bool(value == constant)
    except (RuntimeError, TypeError, ValueError):
        return False


def _off(got: Tensor, wanted: Tensor) -> Tensor:
    """By the norm, relative; NaN if either is."""
    got, wanted = got.float(), wanted.float()
    off: Tensor = (got - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return off
