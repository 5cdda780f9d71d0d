"""Forward passes of many windows in lockstep over weights that are read from a checkpoint, one module's at a time.

Every window walks through the module graph by itself, without a cache, in a lane of its own (`lanes.py`): so any
architecture that transformers runs works, and what a window sees does not depend on the others. All windows reach a
matrix before the first one is multiplied with it: there its inputs are known as a whole, and it may be changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.blocks import TensorSpec
from pipo_ray.model.lanes import Lanes
from pipo_ray.model.layout import TORCH_DTYPES
from pipo_ray.model.streamed import FusedExperts, LookedUpTable, LowBitMatrix, Unbound
from pipo_ray.model.trace import Trace, Unit

_WIDENED_ELEMENTS = 1 << 21
"""Of a 16-bit matrix, so many are widened to float32 at once: 8 MiB, which stay in the cache."""

MatrixHook = Callable[[TensorSpec, Sequence[torch.Tensor], torch.Tensor], "torch.Tensor | None"]
"""(spec, inputs of each window that reaches the matrix, float32 [tokens, columns], weight [rows, columns]) -> the
weight to go on with, or None for the same.
"""

ReadTensor = Callable[[TensorSpec], torch.Tensor]
ReadRows = Callable[[TensorSpec, torch.Tensor], torch.Tensor]


class FinishedError(Exception):
    """Nothing more is wanted of this pass."""


class _Key(NamedTuple):
    name: str
    expert: int | None


@dataclass
class _Walk:
    """One window's place: the next call of the trace, the calls it is inside of, and the last place it was at."""

    call: int = 0
    inside: list[int] = field(default_factory=list)
    place: int = -1


@dataclass
class _Gathered:
    """Inputs of a matrix: those of earlier calls in the pass, and those of the windows that are at it now."""

    before: list[torch.Tensor] = field(default_factory=list)
    now: list[torch.Tensor] = field(default_factory=list)


class LockstepBinder:
    """Binds `model`'s parameters during passes of several windows, each in a lane.

    `model` is a float32 graph on meta, `trace` its trace; `specs` are the stored tensors by (name, expert), `aliases`
    maps tied ones. `read` gives a tensor as it is to be held in memory, `read_rows` the float32 rows of a looked-up
    table. `on_matrix` is asked once for every matrix of nn.Linear, and for every expert if `linear_experts`, when all
    windows have reached it: in the pass's last call of it, with the inputs of all. `on_tensor` is told what is read.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        specs: Mapping[tuple[str, int | None], TensorSpec],
        aliases: Mapping[str, str],
        read: ReadTensor,
        read_rows: ReadRows,
        *,
        linear_experts: bool,
        on_matrix: MatrixHook,
        stop_after_matrices: bool = False,
        on_tensor: Callable[[TensorSpec], None] = lambda spec: None,
    ) -> None:
        self._model, self._trace, self._specs, self._aliases = model, trace, specs, aliases
        self._read, self._read_rows = read, read_rows
        self._linear_experts, self._on_matrix, self._on_tensor = linear_experts, on_matrix, on_tensor
        self._num_experts = Counter(name for name, expert in specs if expert is not None)
        self._calls = trace.calls
        self._bases = self._lay_out()
        self._last_call = {
            name: call for call, unit in enumerate(self._calls) for name in self._names(trace.units[unit])
        }
        linear = [call for call, unit in enumerate(self._calls) if trace.units[unit].kind == "linear"]
        self._stop_after = max(linear, default=-1) if stop_after_matrices else len(self._calls)
        self.lanes = Lanes(1)
        self.stopped = False
        """Set from another thread: the pass ends with FinishedError where it next wants a weight."""
        self._walks: dict[int, _Walk] = {}
        self._num_lanes = 1
        self._left: Counter[int] = Counter()
        self._weights: dict[_Key, tuple[int, torch.Tensor]] = {}
        self._gathered: dict[_Key, _Gathered] = {}
        self._expert_order: dict[str, int] = {}
        self._handles: list[Any] = []
        for index, unit in enumerate(trace.units):
            self._install(index, unit)

    # -- a pass

    def begin(self, num_windows: int) -> None:
        """A pass of so many windows begins: `lanes` is what they take turns in."""
        self.lanes, self._num_lanes = Lanes(num_windows), num_windows
        self.stopped = False
        self._walks, self._left = {}, Counter()
        self._weights, self._gathered = {}, {}

    def finish_window(self) -> None:
        """This lane's forward pass is over."""
        walk = self._walk()
        while walk.call < len(self._calls):
            self._pass_call(walk.call)
            walk.call += 1

    def close(self) -> None:
        """The pass is over, or was given up: no weight stays in memory, and another binder may have the model."""
        for handle in self._handles:
            handle.remove()
        for unit in self._trace.units:
            self._unbind(unit)
        self._weights, self._gathered = {}, {}

    # -- set-up

    def _names(self, unit: Unit) -> list[str]:
        return [self._aliases.get(name, name) for name in unit.tensors]

    def _fused(self, unit: Unit) -> list[str]:
        """Its tensors of fused experts."""
        return [name for name in self._names(unit) if unit.kind == "experts" and name in self._num_experts]

    def _lay_out(self) -> list[int]:
        """The first place of each call: one for what is bound whole or multiplied, behind it one for every expert's
        tensors, in the order of their use.
        """
        bases, place = [], 0
        for call in self._calls:
            bases.append(place)
            unit = self._trace.units[call]
            fused = [self._num_experts[name] for name in self._fused(unit)]
            place += 1 + max(fused, default=0) * len(fused)
        return bases

    def _install(self, index: int, unit: Unit) -> None:
        module = self._model.get_submodule(unit.module)
        for alias, name in zip(unit.tensors, self._names(unit), strict=True):
            owner, leaf = self._owner(alias)
            if unit.kind == "lookup":
                self._stand_in(owner, leaf, LookedUpTable, self._table_answer(name))
            elif name in self._fused(unit):
                self._stand_in(owner, leaf, FusedExperts, self._expert_answer(unit, name))
            elif self._is_matrix(unit, name):
                self._stand_in(owner, leaf, LowBitMatrix, self._matrix_answer(unit, name))
            else:
                self._put(owner, leaf, self._unbound(owner, leaf))
        self._handles.append(module.register_forward_pre_hook(self._enter_hook(index)))
        self._handles.append(module.register_forward_hook(self._leave_hook(index)))

    def _is_matrix(self, unit: Unit, name: str) -> bool:
        spec = self._specs.get((name, None))
        return unit.kind == "linear" and spec is not None and len(spec.shape) == 2

    def _multiplies(self, unit: Unit) -> bool:
        """Whether it is an nn.Linear whose matrix is answered by a stand-in, which sees to the bias, too."""
        return any(self._is_matrix(unit, name) for name in self._names(unit))

    def _whole(self, unit: Unit) -> list[tuple[str, str]]:
        """(name in the graph, stored name) of what is bound as it is."""
        if unit.kind == "lookup":
            return []
        pairs = zip(unit.tensors, self._names(unit), strict=True)
        return [
            (alias, name) for alias, name in pairs if (name, None) in self._specs and not self._is_matrix(unit, name)
        ]

    def _owner(self, alias: str) -> tuple[nn.Module, str]:
        owner, _, leaf = alias.rpartition(".")
        return self._model.get_submodule(owner), leaf

    def _stand_in(self, owner: nn.Module, leaf: str, kind: Any, answer: Any) -> None:
        meta = getattr(owner, leaf)
        self._put(owner, leaf, kind.make(tuple(meta.shape), meta.dtype, torch.device("cpu"), answer))

    def _unbound(self, owner: nn.Module, leaf: str) -> torch.Tensor:
        meta = getattr(owner, leaf)
        return Unbound.make(tuple(meta.shape), meta.dtype, torch.device("cpu"), None)

    def _put(self, owner: nn.Module, leaf: str, value: torch.Tensor) -> None:
        places = owner._parameters if leaf in owner._parameters else owner._buffers
        places[leaf] = value  # type: ignore[assignment]

    # -- hooks

    def _walk(self) -> _Walk:
        return self._walks.setdefault(self.lanes.current, _Walk())

    def _enter_hook(self, unit: int) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            walk = self._walk()
            while walk.call < len(self._calls) and self._calls[walk.call] != unit:
                self._pass_call(walk.call)
                walk.call += 1
            if walk.call >= len(self._calls):
                raise UnsupportedModelError(
                    f"module {self._trace.units[unit].module} was called out of the traced order; this architecture "
                    "cannot be calibrated"
                )
            call = walk.call
            walk.call += 1
            walk.inside.append(call)
            whole = self._whole(self._trace.units[unit])
            if whole and not self._multiplies(self._trace.units[unit]):
                self._arrive(self._bases[call])
                self._bind(whole)

        return enter

    def _leave_hook(self, unit: int) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._pass_call(self._walk().inside.pop())

        return leave

    def _pass_call(self, call: int) -> None:
        """This window is past `call`; behind the last one its tensors go."""
        self._left[call] += 1
        unit = self._trace.units[self._calls[call]]
        if self._left[call] == self._num_lanes:
            self._unbind(unit)

    def _bind(self, whole: list[tuple[str, str]]) -> None:
        for alias, name in whole:
            owner, leaf = self._owner(alias)
            if isinstance(getattr(owner, leaf), Unbound):
                spec = self._specs[name, None]
                self._put(owner, leaf, self._load(spec).to(TORCH_DTYPES[spec.dtype]))

    def _unbind(self, unit: Unit) -> None:
        for alias, _ in self._whole(unit):
            owner, leaf = self._owner(alias)
            if not isinstance(getattr(owner, leaf), Unbound):
                self._put(owner, leaf, self._unbound(owner, leaf))

    def _load(self, spec: TensorSpec) -> torch.Tensor:
        self._on_tensor(spec)
        return self._read(spec)

    def _arrive(self, place: int) -> None:
        walk = self._walk()
        if place < walk.place:
            raise UnsupportedModelError("weights were used out of order; this architecture cannot be calibrated")
        walk.place = place
        self.lanes.arrive(place)
        if self.stopped:
            raise FinishedError

    # -- what answers for a weight

    def _table_answer(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: self._read_rows(self._specs[name, None], ids)

    def _matrix_answer(self, unit: Unit, name: str) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
        biases = [stored for _, stored in self._whole(unit)]

        def product(inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            call = self._walk().inside[-1]
            weight = self._weight(self._specs[name, None], self._bases[call], call, inputs)
            if call == self._stop_after:
                raise FinishedError
            if isinstance(bias, Unbound):
                (stored,) = biases
                bias = self._small(self._specs[stored, None], self._bases[call])
            return _product(inputs, weight, bias)

        return product

    def _expert_answer(self, unit: Unit, name: str) -> Callable[[int], torch.Tensor]:
        fused = self._fused(unit)

        def slice_of(expert: int) -> torch.Tensor:
            call = self._walk().inside[-1]
            # An expert's tensors are used in the same order by all: whichever comes first has the lower place.
            used = [other for other in self._expert_order if other in fused]
            order = self._expert_order.setdefault(name, len(used))
            place = self._bases[call] + 1 + expert * len(fused) + order
            spec = self._specs[name, expert]
            if not self._linear_experts:
                self._arrive(place)
                return self._small(spec, place)

            def product(inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                return _product(inputs, self._weight(spec, place, call, inputs), bias)

            stand_in: torch.Tensor = LowBitMatrix.make(spec.shape, torch.float32, torch.device("cpu"), product)
            return stand_in

        return slice_of

    def _weight(self, spec: TensorSpec, place: int, call: int, inputs: torch.Tensor) -> torch.Tensor:
        """The matrix to multiply `inputs` with, when all windows that come to `place` have brought theirs."""
        key = _Key(spec.name, spec.expert)
        gathered = self._gathered.setdefault(key, _Gathered())
        gathered.now.append(inputs.reshape(-1, spec.shape[1]))
        self._arrive(place)
        held = self._weights.get(key)
        if held is not None and held[0] == place:
            return held[1]
        self._drop_before(place)
        weight = self._load(spec)
        gathered.before += gathered.now
        gathered.now = []
        if call == self._last_call[spec.name]:
            del self._gathered[key]
            changed = self._on_matrix(spec, gathered.before, weight)
            weight = weight if changed is None else changed
        self._weights[key] = place, weight
        return weight

    def _small(self, spec: TensorSpec, place: int) -> torch.Tensor:
        """A tensor that is used whole at `place`, in float32; read once for all windows."""
        key = _Key(spec.name, spec.expert)
        held = self._weights.get(key)
        if held is None or held[0] != place:
            self._drop_before(place)
            held = self._weights[key] = place, self._load(spec).float()
        return held[1]

    def _drop_before(self, place: int) -> None:
        """Nobody comes back to an earlier place: all windows have arrived at this one."""
        self._weights = {key: held for key, held in self._weights.items() if held[0] >= place}


def _product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` in the inputs' float32; a 16-bit `weight` is widened some rows at a time."""
    if weight.dtype == inputs.dtype:
        return F.linear(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])
    output = rows.new_empty(len(rows), len(weight))
    step = max(1, _WIDENED_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        torch.mm(rows, weight[start : start + step].to(rows.dtype).T, out=output[:, start : start + step])
    if bias is not None:
        output += bias
    return output.view(*inputs.shape[:-1], len(weight))
