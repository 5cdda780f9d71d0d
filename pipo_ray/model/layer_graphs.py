"""Decoder layers as graphs, where all weights stay on the GPU: a token's time is then what the host needs to launch.

Llama-3-8B's shape, all of it on an H200: 62 ms for a sweep whose kernels run 8 (`benchmarks/gpu_resident.py`). A layer
is captured as it is, in as many graphs as attention cuts it into. Attention itself is called: its keys grow with each
sweep, and where they lie is the KV cache's affair.

Graphs are captured for a number of tokens, the second time that a sweep has as many. In this sweep and the next one
every layer is computed by its module, too, whose result counts; from then on by the graphs, if they gave the same. A
layer that asks the device for something on the way, like a router of experts, stays a module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipo_ray.model.attention import Attention, around_attention
from pipo_ray.model.kv_cache import RaggedCache
from pipo_ray.pipeline.cuda_graph import Graph, Graphs

logger = logging.getLogger(__name__)

MOST_TOKENS = 64
"""Of a sweep with graphs: with more, kernels take longer than launching them, and what graphs keep takes memory."""
_MOST_SIZES = 16
_CHECKS = 2
"""Sweeps that are computed both ways: in the second one positions are others than when it was captured."""
_TOLERANCE = 0.02
"""Of what a layer adds, and of queries, keys and values, by the norm: the same kernels should give the same."""
_FIRST_BYTES = 96 << 20
"""For the first graphs, besides what they keep: cuBLAS takes up to 2 x 32 MiB for the stream on which they are captured
(https://docs.nvidia.com/cuda/cublas/index.html#cublassetworkspace), the driver some for each graph.
"""

_KEPT = 10
"""Hidden states' worth of what a layer's graphs keep for each token: queries, keys and values (which may be wider),
what goes in and comes out.
"""

Key = tuple[int | str, int | None]
"""Of a tensor among a layer's arguments: position or name, and the index in a tuple."""


def decoder_layers(model: nn.Module, num_layers: int) -> Sequence[nn.Module]:
    """The list of `num_layers` layers in `model`, the outermost if there are several; () if there is none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return tuple(module)
    return ()


class LayerGraphs:
    """`SettledLayers` that computes `layers` by graphs in sweeps of up to `MOST_TOKENS` tokens.

    What layers are given besides tensors and the KV cache must be the same in every sweep.
    """

    def __init__(self, layers: Sequence[nn.Module], graphs: Graphs, hidden_bytes: int) -> None:
        """`hidden_bytes` are those of one token's hidden state."""
        self._modules, self._graphs = layers, graphs
        self._token_bytes = _KEPT * hidden_bytes * len(layers)
        self._layers: list[_Layer] = []
        self._sizes: dict[int, _Size] = {}
        self._sweep: _Sweep | None = None
        self._full = False
        self.sweeps = 0
        """Sweeps computed by graphs, checked ones not counted."""

    def settle(self) -> None:
        """See `SettledLayers.settle`."""
        for module in self._modules:
            layer = _Layer(module, module.forward)
            self._layers.append(layer)
            module.__dict__["forward"] = partial(self._forward, layer)

    def unsettle(self) -> None:
        """See `SettledLayers.unsettle`. The graphs go."""
        for layer in self._layers:
            layer.module.__dict__.pop("forward", None)
        self._layers.clear()
        self._drop()
        self._full = False

    def begin(self, cache: Any, tokens: int) -> None:
        """See `SettledLayers.begin`."""
        self._judge()
        self._sweep = None
        if not self._layers or self._full or tokens > MOST_TOKENS:
            return
        size = self._sizes.get(tokens)
        if size is None:
            if len(self._sizes) < _MOST_SIZES:
                self._sizes[tokens] = _Size()  # kernels are compiled in this sweep, and chosen
            return
        if not size.checks and not self._has_room(tokens):
            self._full = True
            logger.info("no graphs for sweeps of %d tokens: %d bytes are left", tokens, self._graphs.room_bytes)
            return
        self._sweep = _Sweep(size, size.checks < _CHECKS)
        if self._sweep.checked:
            size.checks += 1
        else:
            self.sweeps += 1

    def _has_room(self, tokens: int) -> bool:
        first = not any(size.checks for size in self._sizes.values())
        return self._graphs.room_bytes >= tokens * self._token_bytes + first * _FIRST_BYTES

    def _drop(self) -> None:
        self._sizes.clear()
        self._sweep = None
        self._graphs.close()

    def _judge(self) -> None:
        """Whether the graphs of the sweep before did what the modules do, and had room."""
        if self._sweep is None or not self._sweep.checked:
            return
        if self._graphs.room_bytes < 0:
            logger.info("no graphs: they take %d bytes too much", -self._graphs.room_bytes)
        elif self._sweep.errors and not float(worst := torch.stack(self._sweep.errors).max()) < _TOLERANCE:
            logger.warning("no graphs: they are off by %.1f %%, modules are used", 100 * float(worst))
        else:
            return
        self._drop()
        self._full = True

    def _forward(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        sweep = self._sweep
        if sweep is None or layer.refused:
            return layer.original(*args, **kwargs)
        if sweep.checked:
            return self._check(sweep, layer, args, kwargs)
        captured = sweep.size.layers.get(layer)
        given = _named(args, kwargs)
        if captured is None or not captured.takes(given):
            return layer.original(*args, **kwargs)
        captured.fill(given, sweep.filled)
        captured.run(kwargs["past_key_values"])
        return captured.output

    def _check(self, sweep: _Sweep, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute by the module and, with its attention, by graphs."""
        attended = _Attended()
        try:
            with self._graphs.forbid_waiting(), around_attention(attended.remember(self._graphs)):
                wanted = layer.original(*args, **kwargs)
        except RuntimeError as error:
            layer.refused = True
            logger.info("%s stays a module: %s", type(layer.module).__name__, error)
            with around_attention(attended.repeat()):
                return layer.original(*args, **kwargs)
        given = _named(args, kwargs)
        captured = sweep.size.layers.get(layer)
        if captured is None:
            with self._graphs.count():
                captured = self._capture(sweep, layer, given, attended)
            if captured is None:
                return wanted
            sweep.size.layers[layer] = captured
        elif not captured.takes(given) or not isinstance(wanted, Tensor) or len(attended.calls) != captured.num_calls:
            layer.refused = True
            logger.info("%s stays a module: it is called in another way", type(layer.module).__name__)
            return wanted
        captured.fill(given, sweep.filled)
        sweep.errors += captured.check(attended.calls, wanted, given[0])
        sweep.stand_ins[id(wanted)] = wanted, captured.output
        return wanted

    def _capture(
        self, sweep: _Sweep, layer: _Layer, given: dict[int | str, Any], attended: _Attended
    ) -> _Captured | None:
        inputs, constants = _inputs_of(given, sweep)
        recorder = _Recorder(self._graphs, attended, sweep.size.attended)
        replaced = _replaced(given, inputs)
        try:
            recorder.open()
            with around_attention(recorder.attend):
                output = layer.original(
                    *(value for key, value in replaced.items() if isinstance(key, int)),
                    **{key: value for key, value in replaced.items() if isinstance(key, str)},
                )
            recorder.close()
            if not isinstance(output, Tensor) or not isinstance(given.get("past_key_values"), RaggedCache):
                raise RuntimeError("it returns more than hidden states, or has no KV cache")
        except (RuntimeError, NotImplementedError, TypeError) as error:
            recorder.abandon()
            layer.refused = True
            logger.info("%s stays a module: %s", type(layer.module).__name__, error)
            return None
        return _Captured(recorder.steps, inputs, constants, output)


@dataclass(eq=False)
class _Layer:
    module: nn.Module
    original: Callable[..., Any]
    refused: bool = False


@dataclass
class _Size:
    """Of a number of tokens: how often its graphs were checked, and each layer's. `attended` are the outputs of
    attention, which layers of one shape share.
    """

    checks: int = 0
    layers: dict[_Layer, _Captured] = field(default_factory=dict)
    attended: dict[Any, Tensor] = field(default_factory=dict)


@dataclass
class _Sweep:
    """The sweep that runs. `filled` is what was last copied into an input (by its id); `stand_ins` are the inputs for
    tensors (by theirs) that a layer was given, or returned.
    """

    size: _Size
    checked: bool
    filled: dict[int, Tensor] = field(default_factory=dict)
    stand_ins: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    errors: list[Tensor] = field(default_factory=list)


@dataclass
class _Call:
    """Attention of layer number `layer`, with what it was given and what it gave."""

    layer: int
    attention: Attention
    given: tuple[Tensor, Tensor, Tensor]
    output: Tensor

    def run(self, cache: RaggedCache) -> None:
        cache.layer = self.layer
        self.output.copy_(self.attention(*self.given))


class _Attended:
    """The attention of one layer in one sweep, which must run once."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def remember(self, graphs: Graphs) -> Callable[..., Tensor]:
        """Attention that is remembered."""

        def attend(attention: Attention, cache: RaggedCache, *given: Tensor) -> Tensor:
            with graphs.allow_waiting():
                output = attention(*given)
            self.calls.append(_Call(cache.layer, attention, given, output))  # type: ignore[arg-type]
            return output

        return attend

    def repeat(self) -> Callable[..., Tensor]:
        """What it gave, for the calls that were remembered."""
        before = iter(tuple(self.calls))

        def attend(attention: Attention, cache: RaggedCache, *given: Tensor) -> Tensor:
            call = next(before, None)
            return attention(*given) if call is None else call.output

        return attend


class _Recorder:
    """Captures a layer: graphs, and calls of attention between them."""

    def __init__(self, graphs: Graphs, attended: _Attended, outputs: dict[Any, Tensor]) -> None:
        self.steps: list[Graph | _Call] = []
        self._graphs, self._outputs = graphs, outputs
        self._attended = iter(attended.calls)
        self._open: Graph | None = None

    def open(self) -> None:
        self._open = self._graphs.new()
        self._open.begin()

    def close(self) -> None:
        assert self._open is not None
        self._open.end()
        self.steps.append(self._open)
        self._open = None

    def abandon(self) -> None:
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def attend(self, attention: Attention, cache: RaggedCache, *given: Tensor) -> Tensor:
        call = next(self._attended, None)
        if call is None:
            raise RuntimeError("it attends more often than a moment ago")
        self.close()
        key = call.output.shape, call.output.dtype
        output = self._outputs.get(key)
        if output is None:
            output = self._outputs[key] = torch.empty_like(call.output)
        self.steps.append(_Call(call.layer, attention, given, output))  # type: ignore[arg-type]
        self.open()
        return output


@dataclass
class _Captured:
    """A layer's graphs for a number of tokens: `inputs` are filled before they run, `output` is what they leave."""

    steps: list[Graph | _Call]
    inputs: dict[Key, Tensor]
    constants: dict[Key, Any]
    output: Tensor

    @property
    def num_calls(self) -> int:
        """Of attention."""
        return sum(isinstance(step, _Call) for step in self.steps)

    def takes(self, given: dict[int | str, Any]) -> bool:
        """Whether the arguments are like those of the capture."""
        found = dict(_parts(given))
        if len(found) != len(self.inputs) + len(self.constants):
            return False
        for key, constant in self.constants.items():
            if key not in found or found[key] != constant:
                return False
        for key, input in self.inputs.items():
            tensor = found.get(key)
            if not isinstance(tensor, Tensor) or tensor.shape != input.shape or tensor.dtype != input.dtype:
                return False
        return True

    def fill(self, given: dict[int | str, Any], filled: dict[int, Tensor]) -> None:
        """Copy the arguments in, those that are not there."""
        for (name, index), input in self.inputs.items():
            tensor = given[name] if index is None else given[name][index]
            if tensor is not input and filled.get(id(input)) is not tensor:
                input.copy_(tensor)
                filled[id(input)] = tensor

    def run(self, cache: RaggedCache) -> None:
        """Compute the layer."""
        for step in self.steps:
            if isinstance(step, _Call):
                step.run(cache)
            else:
                step.replay()

    def check(self, calls: list[_Call], wanted: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """Compute the layer but for attention, which gives what it gave in `calls`: by how much it is off."""
        before = iter(calls)
        for step in self.steps:
            if isinstance(step, _Call):
                call = next(before)
                yield from (_off(mine, theirs) for mine, theirs in zip(step.given, call.given, strict=True))
                step.output.copy_(call.output)
            else:
                step.replay()
        yield _off(self.output.float() - hidden.float(), wanted.float() - hidden.float())


def _off(got: Tensor, wanted: Tensor) -> Tensor:
    """By the norm, relative; NaN if either is."""
    got, wanted = got.float(), wanted.float()
    off: Tensor = (got - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return off


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """All arguments by position or name."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


def _parts(given: dict[int | str, Any]) -> Iterator[tuple[Key, Any]]:
    """The arguments, those in tuples one by one, without the KV cache."""
    for name, value in given.items():
        if isinstance(value, tuple):
            yield from (((name, index), part) for index, part in enumerate(value))
        elif not isinstance(value, RaggedCache):
            yield (name, None), value


def _inputs_of(given: dict[int | str, Any], sweep: _Sweep) -> tuple[dict[Key, Tensor], dict[Key, Any]]:
    """For each tensor among the arguments one that a graph can read in every sweep, and the other arguments.

    Where layers are given the same tensor, or what another one returned, they read the same.
    """
    inputs: dict[Key, Tensor] = {}
    constants: dict[Key, Any] = {}
    for key, part in _parts(given):
        if not isinstance(part, Tensor):
            constants[key] = part
            continue
        of, stand_in = sweep.stand_ins.get(id(part), (None, part))
        if of is not part:
            stand_in = torch.empty_like(part)
            sweep.stand_ins[id(part)] = part, stand_in
        inputs[key] = stand_in
    return inputs, constants


def _replaced(given: dict[int | str, Any], inputs: dict[Key, Tensor]) -> dict[int | str, Any]:
    """The arguments with `inputs` in the place of tensors."""
    replaced: dict[int | str, Any] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            replaced[name] = tuple(inputs.get((name, index), part) for index, part in enumerate(value))
        else:
            replaced[name] = inputs.get((name, None), value)
    return replaced
