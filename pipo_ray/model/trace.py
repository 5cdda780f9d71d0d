"""The order in which a model uses its parameters, found by running it once on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.graph import build_graph, set_experts_implementation, stored_tensors
from pipo_ray.model.lean_transformers import without_compiler

TRACE_IMPLEMENTATION = "pipo_trace"
_TRACE_TOKENS = 3

Scratch = Literal["none", "lean", "most"]
"""What attention takes beside its result; see `attention_scratch`."""

_kv_shapes: ContextVar[list[tuple[int, int, int]] | None] = ContextVar("kv_shapes", default=None)
_scratch: ContextVar[Scratch] = ContextVar("scratch", default="none")


@contextmanager
def recorded_kv_shapes() -> Iterator[list[tuple[int, int, int]]]:
    """Whatever is traced in this context adds, per attention layer, what a ragged row caches of a token: heads, and
    elements of a head's key and of its value. Nothing comes from models that do not call a registered attention
    function.
    """
    shapes: list[tuple[int, int, int]] = []
    token = _kv_shapes.set(shapes)
    try:
        yield shapes
    finally:
        _kv_shapes.reset(token)


@contextmanager
def attention_scratch(kind: Scratch) -> Iterator[None]:
    """In this context the trace's attention allocates what our own does for a row of one sequence: "lean" two copies of
    the result and one of keys and values (`dense_attention.py` in parts, pages that are no neighbours), "most" what it
    takes to merge parts in float32 (`kv_spans.py`).
    """
    token = _scratch.set(kind)
    try:
        yield
    finally:
        _scratch.reset(token)


@dataclass(frozen=True)
class Unit:
    """What is bound together: a called module and the stored tensors that it, or a descendant never called itself,
    owns.

    `module` is its name in the graph; `tensors` are stored-tensor names in registration order.
    """

    module: str
    tensors: tuple[str, ...]
    kind: str  # "linear", "lookup", "experts" or "other": how the module uses its tensors


@dataclass(frozen=True)
class Trace:
    """`units` by index, and `events`: (unit index, True on entering, False on leaving) in the order of one forward
    pass.
    """

    units: tuple[Unit, ...]
    events: tuple[tuple[int, bool], ...]

    @property
    def calls(self) -> tuple[int, ...]:
        """Unit indices in the order in which one forward pass enters them."""
        return tuple(unit for unit, enters in self.events if enters)


_QUESTIONS = {
    torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__float__,
    torch.Tensor.tolist, torch.Tensor.nonzero, torch.nonzero, torch.Tensor.unique, torch.unique,
}  # fmt: skip


class _DecideOnMeta(TorchFunctionMode):
    """Answers questions about values that meta tensors do not have: no branch is taken, nothing is found.

    `asked` says whether there were any but for yes or no.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            tensor = args[0]
            self.asked = self.asked or func in _QUESTIONS
            if func is torch.Tensor.__bool__:
                return False
            if func in (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__):
                return 0
            if func is torch.Tensor.__float__:
                return 0.0
            if func is torch.Tensor.tolist:
                return torch.zeros(tensor.shape).tolist()
            if func in (torch.Tensor.nonzero, torch.nonzero):
                return torch.empty(0, tensor.dim(), dtype=torch.long, device="meta")
            if func in (torch.Tensor.unique, torch.unique):
                return torch.empty(0, dtype=tensor.dtype, device="meta")
        if func is torch.arange:
            # Torch's kernel for it on meta is written in Python and imports sympy (half a second).
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


def _trace_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> Any:
    shapes = _kv_shapes.get()
    if shapes is not None:
        shapes.append((key.shape[1], key.shape[3], value.shape[3]))
    batch, heads, tokens = query.shape[:3]
    output = torch.empty(batch, tokens, heads, value.shape[-1], dtype=query.dtype, device="meta")
    scratch = _scratch.get()
    if scratch == "lean":
        held = [torch.empty_like(tensor) for tensor in (output, output, key, value)]
    elif (
        scratch == "most"
    ):  # the mean so far and the part that is added; and the query and the part's mean, as they come
        held = [torch.empty_like(output, dtype=torch.float32) for _ in range(2)]
        held += [torch.empty_like(tensor) for tensor in (query, output, output)]
    return output, None


def _trace_experts(module: nn.Module, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(TRACE_IMPLEMENTATION, _trace_attention)
AttentionMaskInterface.register(TRACE_IMPLEMENTATION, _no_mask)
ALL_EXPERTS_FUNCTIONS.register(TRACE_IMPLEMENTATION, _trace_experts)


def trace_config(config: PretrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, Trace]:
    """Build `config`'s graph on meta and trace it; see `trace`. Returns the meta graph, too."""
    try:
        model = build_graph(config, dtype, attention=TRACE_IMPLEMENTATION)
    except UnsupportedModelError:
        # Some architectures (Falcon) pick an attention class by name and know only the built-in names.
        model = build_graph(config, dtype, attention="eager")
    return model, trace(model)


def trace(model: PreTrainedModel) -> Trace:
    """Run `model` (all of it on meta) once and return the order in which its stored tensors are used.

    Raises UnsupportedModelError if the forward pass cannot be followed.
    """
    called: list[tuple[str, bool]] = []
    with _recording(model, called):
        run_on_meta(model, _TRACE_TOKENS, "its forward pass cannot be traced", use_cache=False)
    return _units_of(model, called)


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of transformers' own cache for a sequence of no tokens, found with two short ones: recurrent and
    convolution states. `model` is all on meta.
    """
    few, many = _cache_bytes(model, _TRACE_TOKENS), _cache_bytes(model, 2 * _TRACE_TOKENS)
    return max(0, 2 * few - many)


def _cache_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    cache = DynamicCache(config=model.config)
    set_experts_implementation(model, TRACE_IMPLEMENTATION)
    try:
        run_on_meta(model, num_tokens, "the size of its cache cannot be found", use_cache=True, past_key_values=cache)
    finally:
        set_experts_implementation(model, "eager")
    tensors: dict[int, torch.Tensor] = {}
    _collect_tensors(cache, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def run_on_meta(model: PreTrainedModel, num_tokens: int, failure: str, **options: Any) -> bool:
    """A forward pass of `num_tokens` tokens without data. Returns whether numbers were asked for, of which there are
    none.

    Raises UnsupportedModelError, which begins with `failure`.
    """
    decisions = _DecideOnMeta()
    try:
        with torch.no_grad(), without_compiler(), decisions, torch.device("meta"):
            model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), **options)
    except Exception as error:
        raise UnsupportedModelError(
            f"architecture {model.config.model_type!r}: {failure}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return decisions.asked


def _collect_tensors(value: Any, found: dict[int, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect_tensors(part, found)
    elif isinstance(value, dict):
        _collect_tensors(list(value.values()), found)
    elif isinstance(value, Cache) or type(value).__module__ == "transformers.cache_utils":
        _collect_tensors(vars(value), found)


@contextmanager
def _recording(model: PreTrainedModel, called: list[tuple[str, bool]]) -> Iterator[None]:
    handles = []

    def recorder(name: str, enters: bool) -> Any:
        def record(*_: Any, **__: Any) -> None:
            called.append((name, enters))

        return record

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(recorder(name, True)))
        handles.append(module.register_forward_hook(recorder(name, False)))
    set_experts_implementation(model, TRACE_IMPLEMENTATION)
    try:
        yield
    finally:
        set_experts_implementation(model, "eager")
        for handle in handles:
            handle.remove()


def _units_of(model: PreTrainedModel, called: list[tuple[str, bool]]) -> Trace:
    stored = stored_tensors(model)
    tied = set(model.state_dict()) - set(stored)
    ever_called = {name for name, _ in called}
    layers = layer_prefixes(model)
    owned: dict[str, list[str]] = {}
    for name in list(stored) + sorted(tied):
        host = name.rpartition(".")[0]
        while host not in ever_called and host:
            host = host.rpartition(".")[0]
        direct = name.rpartition(".")[0] == host
        in_layer = any(host == p or host.startswith(p + ".") for p in layers)
        if direct or in_layer:
            owned.setdefault(host, []).append(name)
    units: list[Unit] = []
    index: dict[str, int] = {}
    events: list[tuple[int, bool]] = []
    for module_name, enters in called:
        if module_name not in owned:
            continue
        if module_name not in index:
            module = model.get_submodule(module_name)
            index[module_name] = len(units)
            units.append(Unit(module_name, tuple(owned[module_name]), _kind(module, module_name, owned[module_name])))
        events.append((index[module_name], enters))
    return Trace(tuple(units), tuple(events))


def _kind(module: nn.Module, name: str, tensors: list[str]) -> str:
    direct = all(t.rpartition(".")[0] == name for t in tensors)
    if isinstance(module, nn.Embedding):
        return "lookup"
    if type(module).forward is nn.Linear.forward and direct:
        return "linear"
    return "experts" if direct and is_experts(module) else "other"


def is_experts(module: nn.Module) -> bool:
    """Whether `module` has fused experts: parameters [experts, ...]."""
    count = getattr(module, "num_experts", None)
    return count is not None and any(p.dim() == 3 and p.shape[0] == count for p in module.parameters(recurse=False))


def layer_prefixes(model: PreTrainedModel) -> list[str]:
    """Names of the decoder layers: the children of the longest ModuleList outside any other ModuleList."""
    best: tuple[int, str] | None = None
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer in lists):
            continue
        lists.append(name)
        if best is None or len(module) > best[0]:
            best = (len(module), name)
    if best is None:
        raise UnsupportedModelError(
            f"architecture {model.config.model_type!r}: no list of decoder layers was found in it"
        )
    return [f"{best[1]}.{i}" for i in range(best[0])]
