"""Decoder layers as graphs, where all weights stay on the GPU: a token's time is then what the host needs to launch.

Llama-3-8B's shape, all of it on an H200: 62 ms for a sweep whose kernels run 8 (`benchmarks/gpu_resident.py`). A layer
is captured as it is, in as many graphs as attention cuts it into. Attention itself is called: its keys grow with each
sweep, and where they lie is the KV cache's affair.

Graphs are captured for a number of tokens (`SIZES`; with fewer, what is in the last places has no meaning), the second
time that a sweep needs them. In this sweep and the next one every layer is computed by its module, too, whose result
counts; from then on by the graphs, if they gave the same. A layer that asks the device for something on the way, like a
router of experts, stays a module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipo_ray.model.attention import Attention, around_attention
from pipo_ray.model.captured_layer import Attended, AttentionCall, AttentionStep, CapturedLayer, Key, Places, parts_of
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.kv_cache import RaggedCache
from pipo_ray.pipeline.cuda_graph import Graph, Graphs

logger = logging.getLogger(__name__)

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tokens for which there are graphs: with more, kernels take longer than launching them, and what graphs keep takes
memory. A third more at most is computed than there is, in products that last as long as reading their weights.
"""
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


def _decoder_layers(model: nn.Module, num_layers: int) -> Sequence[nn.Module]:
    """The list of `num_layers` layers in `model`, the outermost if there are several; () if there is none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return tuple(module)
    return ()


class LayerGraphs:
    """`SettledLayers` that computes the layers of `model`, whose weights are of `dtype`, by graphs in sweeps of a few
    tokens, of which `SIZES` has the most.

    What layers are given besides tensors and the KV cache must be the same in every sweep.
    """

    def __init__(self, model: nn.Module, facts: ModelFacts, dtype: torch.dtype, graphs: Graphs) -> None:
        self._modules, self._graphs = _decoder_layers(model, facts.num_layers), graphs
        self._token_bytes = _KEPT * facts.hidden_size * dtype.itemsize * len(self._modules)
        self._layers: list[_Layer] = []
        self._sizes: dict[int, _Size] = {}
        self._sweep: _Sweep | None = None
        self._given_up = False
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
        self._given_up = False

    def begin(self, cache: Any, tokens: int) -> None:
        """See `SettledLayers.begin`."""
        self._judge()
        self._sweep = None
        places = next((size for size in SIZES if size >= tokens), None)
        if not self._layers or self._given_up or places is None:
            return
        size = self._sizes.get(places)
        if size is None:
            self._sizes[places] = _Size(places)  # kernels are compiled in this sweep, and chosen
            return
        if not size.checks and not self._has_room(places):
            if not size.refused:
                logger.info("no graphs for sweeps of %d tokens: %d bytes are left", places, self._graphs.room_bytes)
            size.refused = True
            return
        self._sweep = _Sweep(size, tokens, size.checks < _CHECKS)
        if self._sweep.checked:
            size.checks += 1
        else:
            self.sweeps += 1

    def _has_room(self, tokens: int) -> bool:
        first = not any(size.checks for size in self._sizes.values())
        return self._graphs.room_bytes >= tokens * self._token_bytes + first * _FIRST_BYTES

    def _drop(self) -> None:
        self._graphs.wait()
        self._sizes.clear()
        self._sweep = None
        self._graphs.give_back()

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
        self._given_up = True

    def _forward(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        sweep = self._sweep
        if sweep is None or layer.refused or layer in sweep.size.modules:
            return layer.original(*args, **kwargs)
        if sweep.checked:
            return self._check(sweep, layer, args, kwargs)
        captured = sweep.size.layers.get(layer)
        given = _named(args, kwargs)
        if captured is None or not captured.takes(given, sweep.tokens):
            return layer.original(*args, **kwargs)
        captured.fill(given, sweep.tokens, sweep.filled)
        captured.run(kwargs["past_key_values"], sweep.tokens)
        return captured.output.of(sweep.tokens)

    def _check(self, sweep: _Sweep, layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute by the module and, with its attention, by graphs."""
        attended = Attended()
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
        elif (
            not captured.takes(given, sweep.tokens)
            or not isinstance(wanted, Tensor)
            or len(attended.calls) != captured.num_calls
        ):
            sweep.size.modules.add(layer)
            logger.info(
                "%s stays a module for %d tokens: it is called in another way",
                type(layer.module).__name__, sweep.size.tokens,
            )  # fmt: skip
            return wanted
        captured.fill(given, sweep.tokens, sweep.filled)
        sweep.errors += captured.check(attended.calls, wanted, given[0], sweep.tokens)
        sweep.stand_ins[id(wanted)] = wanted, captured.output
        return wanted

    def _capture(
        self, sweep: _Sweep, layer: _Layer, given: dict[int | str, Any], attended: Attended
    ) -> CapturedLayer | None:
        inputs, constants = _inputs_of(given, sweep)
        recorder = _Recorder(self._graphs, attended, sweep)
        replaced = _replaced(given, inputs)
        args = [value for key, value in replaced.items() if isinstance(key, int)]
        kwargs = {key: value for key, value in replaced.items() if isinstance(key, str)}
        try:
            if sweep.tokens != sweep.size.tokens:  # kernels of another size: they may be compiled, and loaded
                with around_attention(recorder.pretend):
                    layer.original(*args, **kwargs)
            recorder.open()
            with around_attention(recorder.attend):
                output = layer.original(*args, **kwargs)
            recorder.close()
            if (
                not isinstance(output, Tensor)
                or output.shape[1] != sweep.size.tokens
                or not isinstance(given.get("past_key_values"), RaggedCache)
            ):
                raise RuntimeError("it returns more than hidden states, or has no KV cache")
        except Exception as error:  # what a compiler raises, too
            recorder.abandon()
            layer.refused = True
            logger.info("%s stays a module: %s", type(layer.module).__name__, error)
            return None
        except BaseException:
            recorder.abandon()
            raise
        return CapturedLayer(recorder.steps, inputs, constants, Places(output, 1))


@dataclass(eq=False)
class _Layer:
    module: nn.Module
    original: Callable[..., Any]
    refused: bool = False


@dataclass
class _Size:
    """Of a number of tokens: how often its graphs were checked, whether there is no room for them, and each layer's;
    `modules` are layers without. `attended` are the outputs of attention, which layers of one shape share.
    """

    tokens: int
    checks: int = 0
    refused: bool = False
    layers: dict[_Layer, CapturedLayer] = field(default_factory=dict)
    modules: set[_Layer] = field(default_factory=set)
    attended: dict[Any, Places] = field(default_factory=dict)


@dataclass
class _Sweep:
    """The sweep that runs, of `tokens`. `filled` is what was last copied into an input (by its id); `stand_ins` are the
    inputs for tensors (by theirs) that a layer was given, or returned.
    """

    size: _Size
    tokens: int
    checked: bool
    filled: dict[int, Tensor] = field(default_factory=dict)
    stand_ins: dict[int, tuple[Tensor, Places]] = field(default_factory=dict)
    errors: list[Tensor] = field(default_factory=list)

    def places_for(self, tensor: Tensor) -> Places:
        """Memory for what is like `tensor`, with the places that the graphs have; all zeros, which do no harm."""
        shape = list(tensor.shape)
        of_tokens = len(shape) > 1 and shape[1] == self.tokens
        if of_tokens:
            shape[1] = self.size.tokens
        return Places(tensor.new_zeros(shape), 1 if of_tokens else None)


class _Recorder:
    """Captures a layer: graphs, and calls of attention between them."""

    def __init__(self, graphs: Graphs, attended: Attended, sweep: _Sweep) -> None:
        self.steps: list[Graph | AttentionStep] = []
        self._graphs, self._sweep = graphs, sweep
        self._calls = attended.calls
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
        output = self._output(call)
        self.steps.append(AttentionStep(call.layer, attention, tuple(Places(one, 2) for one in given), output))
        self.open()
        return output.memory

    def pretend(self, attention: Attention, cache: RaggedCache, *given: Tensor) -> Tensor:
        """Attention that gives anything of the right shape."""
        return self._output(self._calls[0]).memory

    def _output(self, call: AttentionCall) -> Places:
        outputs, key = self._sweep.size.attended, (call.output.shape[2:], call.output.dtype)
        if key not in outputs:
            outputs[key] = self._sweep.places_for(call.output)
        return outputs[key]


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """All arguments by position or name."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


def _inputs_of(given: dict[int | str, Any], sweep: _Sweep) -> tuple[dict[Key, Places], dict[Key, Any]]:
    """For each tensor among the arguments one that a graph can read in every sweep, and the other arguments.

    Where layers are given the same tensor, or what another one returned, they read the same.
    """
    inputs: dict[Key, Places] = {}
    constants: dict[Key, Any] = {}
    for key, part in parts_of(given):
        if not isinstance(part, Tensor):
            constants[key] = part
            continue
        of, stand_in = sweep.stand_ins.get(id(part), (None, None))
        if of is not part or stand_in is None:
            stand_in = sweep.places_for(part)
            sweep.stand_ins[id(part)] = part, stand_in
        inputs[key] = stand_in
    return inputs, constants


def _replaced(given: dict[int | str, Any], inputs: dict[Key, Places]) -> dict[int | str, Any]:
    """The arguments with `inputs` in the place of tensors."""
    replaced: dict[int | str, Any] = {}
    for name, value in given.items():
        if isinstance(value, tuple):
            replaced[name] = tuple(_memory(inputs.get((name, index)), part) for index, part in enumerate(value))
        else:
            replaced[name] = _memory(inputs.get((name, None)), value)
    return replaced


def _memory(places: Places | None, value: Any) -> Any:
    return value if places is None else places.memory
