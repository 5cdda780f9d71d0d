"""Decoder layers that compute one token of one sequence as a list of machine code.

With weights that stay in memory a product of one row takes as long as reading the weight, and between two of them
Python and torch's small operations run with cold caches: a fourth of a token's time in int4 (2 cores AMD
EPYC). A layer built of the parts below is one call instead, if that computes what the module computes: it is compared
with it first.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipo_ray.compiled import row_steps, steps
from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.between_rows import BetweenRows
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.crew import run_steps
from pipo_ray.compiled.float_low_bit import FloatLowBit
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.ir import float_word
from pipo_ray.compiled.low_bit import CompiledLowBit
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.steps import Steps
from pipo_ray.compiled.support import row_instructions
from pipo_ray.model.between_products import ACTIVATION, MLP, norm_epsilon, replace_between_products
from pipo_ray.model.cpu_linear import CpuProducts, HalfMatrix
from pipo_ray.model.kv_cache import RaggedCache, SequenceCache
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.low_bit import LowBitProducts
from pipo_ray.model.streamed import LowBitMatrix, SplitMatrix

logger = logging.getLogger(__name__)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION, _HEAD_NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
_MLP = {*MLP, ACTIVATION}
_MULTIPLE = 32
"""Of all lengths, heads' too."""
_TOLERANCE = 0.02
"""Of what a layer adds to its input, by the norm: bf16 sums in another order are within a tenth of it."""


def compile_model(
    model: nn.Module, products: CpuProducts | None, low_bit: LowBitProducts | None, attention: CompiledAttention,
    folder: Path | None = None,
) -> CompiledLayers:  # fmt: skip
    """Have machine code compute what it can of `model` besides products and attention: norms and gates of many tokens
    from now on, and whole layers of one token when what is returned is told that weights stay.
    """
    replace_between_products(model, BetweenRows(folder))
    return CompiledLayers(model, products, low_bit, attention, folder)


class CompiledLayers:
    """The layers of `model` that are built of RMS norms, attention with rotary embedding (with norms of its heads and
    biases, if any), and an MLP with a gate and SiLU; all matrices in bf16 or low bits for our own kernels.

    While `settled`, those compute by machine code in sweeps of one token of the sequence that `begin` tells.
    """

    def __init__(
        self, model: nn.Module, products: CpuProducts | None, low_bit: LowBitProducts | None,
        attention: CompiledAttention, folder: Path | None = None,
    ) -> None:  # fmt: skip
        self._products, self._low_bit, self._attention, self._folder = products, low_bit, attention, folder
        self._candidates = [module for module in model.modules() if _is_built_so(module)]
        self._layers: list[_Layer] = []
        self._cache: SequenceCache | None = None

    def settle(self) -> None:
        """All weights are bound for good."""
        shared: dict[str, torch.Tensor] = {}
        code = None
        for module in self._candidates:
            matrices = _matrices(module, self._products, self._low_bit)
            if matrices is not None:
                code = code or _Code(self._folder)
                layer = _Layer(module, matrices, self._attention, code, shared)
                self._layers.append(layer)
                module.__dict__["forward"] = partial(self._forward, layer)

    def unsettle(self) -> None:
        """They may go."""
        for layer in self._layers:
            layer.module.__dict__.pop("forward", None)
        self._layers.clear()

    def begin(self, cache: Any, tokens: int) -> None:
        """A sweep of so many tokens of the sequence with this cache; None: of several sequences."""
        alone = tokens == 1 and isinstance(cache, SequenceCache) and not cache.prefix
        self._cache = cache if alone else None

    def _forward(self, layer: _Layer, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache
        if cache is None or not layer.takes(cache, hidden_states, kwargs):
            return layer.original(hidden_states, *args, **kwargs)
        if layer.rule is not None:
            return layer.compute(cache, hidden_states, kwargs["position_embeddings"])
        wanted = layer.original(hidden_states, *args, **kwargs)
        if not layer.check(cache, hidden_states, kwargs, wanted):
            layer.module.__dict__.pop("forward", None)
        return wanted


class _Code:
    """The functions that lists are made of."""

    def __init__(self, folder: Path | None) -> None:
        between = row_steps.module(row_instructions())
        self._modules = MachineCode(between, folder), MachineCode(steps.module(), folder)
        self.norm, self.add, self.turn, self.gate = (
            self._modules[0].address(name) for name in (row_steps.NORM, row_steps.ADD, row_steps.TURN, row_steps.GATE)
        )
        self.run = self._modules[1].address(steps.RUN)


_RowProducts = CompiledLowBit | FloatLowBit | CompiledBf16 | CompiledFloats


@dataclass(frozen=True)
class _Part:
    """Rows of a matrix, from `start` to before `stop`, low-bit or bf16, and what multiplies them."""

    start: int
    stop: int
    weight: Any
    products: _RowProducts


_Matrices = dict[str, list[_Part]]
"""Of each matrix its parts, all of one kind."""


class _Layer:
    """One layer's list. `rule` is what its attention asks for, known once the list has been compared with the module.

    `shared` are the buffers of all layers, by name.
    """

    def __init__(
        self, module: Any, matrices: _Matrices, attention: CompiledAttention, code: _Code,
        shared: dict[str, torch.Tensor],
    ) -> None:  # fmt: skip
        self.module, self.rule = module, None
        self.original: Callable[..., Any] = module.forward
        self._matrices, self._code, self._shared, self._attention = matrices, code, shared, attention
        attention_module = module.self_attn
        self._index: int = attention_module.layer_idx
        self._dim: int = attention_module.head_dim
        self._size: int = module.input_layernorm.weight.shape[0]
        self._points: Callable[[tuple[torch.Tensor, torch.Tensor], int, int], None] | None = None

    rule: AttentionRule | None

    def takes(self, cache: SequenceCache, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this call can be the list's."""
        embeddings = kwargs.get("position_embeddings")
        return (
            embeddings is not None
            and hidden_states.shape == (1, 1, self._size)
            and hidden_states.dtype is torch.bfloat16 is embeddings[0].dtype
            and embeddings[0].numel() == embeddings[1].numel() == self._dim
            and isinstance(kwargs.get("past_key_values"), RaggedCache)
            and self._index in cache.layers
            and cache.length < cache.capacity
        )

    def check(self, cache: SequenceCache, hidden_states: torch.Tensor, kwargs: dict[str, Any], wanted: Any) -> bool:
        """Compare the list with `wanted`, what the module has just computed; from then on it is used if it is right.

        It appends the same keys and values at the same place.
        """
        rule = kwargs["past_key_values"].rule
        if not isinstance(wanted, torch.Tensor) or rule is None or not rule.is_plain:
            return False
        memory = cache.layers[self._index]
        if not self._attention.takes_heads(memory[0], *memory):
            return False
        self._list(rule, memory[0].shape[0])
        self.rule = rule
        got = self.compute(cache, hidden_states, kwargs["position_embeddings"])
        error = float((got.float() - wanted.float()).norm() / (wanted.float() - hidden_states.float()).norm())
        if not error < _TOLERANCE:
            logger.info("layer %d: machine code is off by %.1f %%, its module is used", self._index, 100 * error)
            self.rule = None
        return self.rule is not None

    def compute(
        self, cache: SequenceCache, hidden_states: torch.Tensor, embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The layer's output [1, 1, size]."""
        assert self.rule is not None
        assert self._points is not None
        stop = cache.length + 1
        hidden = hidden_states.contiguous()
        output = torch.empty_like(hidden)
        cosine, sine = (part.contiguous() for part in embeddings)
        for context, word in self._reads_hidden:
            context[word] = hidden.data_ptr()
        for context in self._turns:
            context[1], context[2] = cosine.data_ptr(), sine.data_ptr()
        self._last[2] = output.data_ptr()
        self._points(cache.layers[self._index], self.rule.first_visible(stop), stop)
        run_steps(self._code.run, ctypes.addressof(self._context))
        return output

    def _list(self, rule: AttentionRule, kv_heads: int) -> None:
        module, code, size = self.module, self._code, self._size
        attention, mlp = module.self_attn, module.mlp
        self._steps = Steps()
        self._turns: list[Any] = []
        query, key, value = (self._row(name, self._rows(name)) for name in ("q_proj", "k_proj", "v_proj"))
        normed, attended = self._row("normed", size), self._row("attended", query.numel())
        first = self._norm(module.input_layernorm, normed, normed)
        self._multiply(("q_proj", "k_proj", "v_proj"), normed, attention)
        for name, row in (("q", query), ("k", key)):
            norm = getattr(attention, f"{name}_norm", None)
            if norm is not None:
                self._norm(norm, row, row)
            half = self._dim // 2
            self._turns.append(self._add(code.turn, [row.data_ptr(), 0, 0, row.numel() // self._dim, half], row))
        self._points = self._attention.add(
            self._steps, query.view(-1, 1, self._dim),
            (key.view(kv_heads, 1, self._dim), value.view(kv_heads, 1, self._dim)),
            attended.view(-1, 1, self._dim), rule.scale,
        )  # fmt: skip
        self._multiply(("o_proj",), attended, attention)
        middle, added = self._row("middle", size), self._row("o_proj", size)
        second = self._add(code.add, [0, added.data_ptr(), middle.data_ptr(), size], added, middle)
        self._norm(module.post_attention_layernorm, middle, normed)
        self._multiply(("gate_proj", "up_proj"), normed, mlp)
        gate, up = (self._row(name, self._rows(name)) for name in ("gate_proj", "up_proj"))
        self._add(code.gate, [gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel()], gate, up)
        self._multiply(("down_proj",), gate, mlp)
        down = self._row("down_proj", size)
        self._last = self._add(code.add, [middle.data_ptr(), down.data_ptr(), 0, size], middle, down)
        self._reads_hidden = ((first, 0), (second, 0))
        self._context = self._steps.context()

    def _add(self, function: int, words: Sequence[int], *owned: torch.Tensor) -> Any:
        context = context_of(words)
        self._steps.add(function, context, None, *owned)
        return context

    def _norm(self, norm: Any, row: torch.Tensor, output: torch.Tensor) -> Any:
        weight = norm.weight.detach()
        size = weight.numel()
        epsilon = float_word(norm_epsilon(norm))
        words = [row.data_ptr(), weight.data_ptr(), output.data_ptr(), row.numel() // size, size, epsilon]
        return self._add(self._code.norm, words, row, weight, output)

    def _multiply(self, names: Sequence[str], row: torch.Tensor, holder: nn.Module) -> None:
        """Products of one row with these matrices, into the buffers of their names."""
        inputs: dict[int | None, Any] = {}  # by groups of low bits; None: for 16
        for name in names:
            output = self._row(name, self._rows(name))
            bias = getattr(holder, name).bias
            bias = None if bias is None else bias.detach()
            for part in self._matrices[name]:
                rows = slice(part.start, part.stop)
                if isinstance(part.products, CompiledBf16 | CompiledFloats):
                    if None not in inputs:
                        inputs[None] = part.products.add_inputs(self._steps, row)
                    of_part = None if bias is None else bias[rows]
                    part.products.add_product(self._steps, inputs[None], part.weight, of_part, output[rows])
                    continue
                memory, panels = part.weight.packed
                group = panels.low_bit.group
                if group not in inputs:
                    inputs[group] = part.products.add_inputs(self._steps, row, panels.low_bit)
                count = part.stop - part.start
                part.products.add_product(self._steps, memory, panels, count, row, inputs[group], output[rows])
            if bias is not None and isinstance(part.products, CompiledLowBit | FloatLowBit):
                words = [output.data_ptr(), bias.data_ptr(), output.data_ptr(), output.numel()]
                self._add(self._code.add, words, output, bias)

    def _rows(self, name: str) -> int:
        return self._matrices[name][-1].stop

    def _row(self, name: str, size: int) -> torch.Tensor:
        """The buffer of this name and size."""
        key = f"{name} {size}"
        if key not in self._shared:
            with torch.inference_mode(False):
                self._shared[key] = torch.empty(size, dtype=torch.bfloat16)
        return self._shared[key]


def _is_built_so(module: Any) -> bool:
    """Whether a module has a layer's parts. What it makes of them, the comparison tells."""
    if {name for name, _ in module.named_children()} != _LAYER:
        return False
    attention = {name for name, _ in module.self_attn.named_children()}
    mlp = {name for name, _ in module.mlp.named_children()}
    if not (_ATTENTION <= attention <= _ATTENTION | _HEAD_NORMS and mlp == _MLP):
        return False
    linears = [getattr(module.self_attn, name) for name in _ATTENTION]
    linears += [getattr(module.mlp, name) for name in MLP]
    lengths = [length for linear in linears for length in linear.weight.shape]
    return (
        all(type(linear) is nn.Linear for linear in linears)
        and all(norm_epsilon(norm) is not None and norm.weight.dim() == 1 for norm in _norms(module))
        and "SiLU" in type(module.mlp.act_fn).__name__
        and isinstance(getattr(module.self_attn, "layer_idx", None), int)
        and isinstance(getattr(module.self_attn, "head_dim", None), int)
        and not any(length % _MULTIPLE for length in (*lengths, module.self_attn.head_dim))
    )


def _norms(module: Any) -> list[Any]:
    """All of a layer, those of heads included."""
    of_heads = [part for name, part in module.self_attn.named_children() if name in _HEAD_NORMS]
    return [module.input_layernorm, module.post_attention_layernorm, *of_heads]


def _matrices(module: Any, products: CpuProducts | None, low_bit: LowBitProducts | None) -> _Matrices | None:
    """Where a layer's matrices are; None if one is not for our own kernels."""
    found: _Matrices = {}
    for holder, names in ((module.self_attn, _ATTENTION), (module.mlp, MLP)):
        for name in names:
            weight = getattr(holder, name)._parameters["weight"]
            whole = [(0, weight.shape[0], weight)]
            parts = weight.parts() if isinstance(weight, SplitMatrix) else whole
            made = [_part(start, stop, part, products, low_bit) for start, stop, part in parts]
            found[name] = [part for part in made if part is not None]
            if len(found[name]) < len(made):
                return None
    return found if all(norm.weight.dtype is torch.bfloat16 for norm in _norms(module)) else None


def _part(
    start: int, stop: int, weight: torch.Tensor, products: CpuProducts | None, low_bit: LowBitProducts | None
) -> _Part | None:
    compiled: _RowProducts | None = None
    if isinstance(weight, LowBitMatrix) and weight.packed is not None and low_bit is not None:
        compiled = low_bit.compiled_for(weight.packed[1], stop - start)
    elif isinstance(weight, HalfMatrix) and products is not None:
        weight = weight.as_subclass(torch.Tensor)
        compiled = products.compiled_for(weight)
    return None if compiled is None else _Part(start, stop, weight, compiled)
