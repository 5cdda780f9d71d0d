"""Binding parameters to the memory of the piece they are in, just before a unit runs, and letting go behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.cpu_linear import CpuProducts
from pipo_ray.model.lanes import Lanes
from pipo_ray.model.low_bit import LowBitProducts
from pipo_ray.model.part_runs import PartRuns
from pipo_ray.model.piece_views import view_of
from pipo_ray.model.settled_layers import SettledLayers
from pipo_ray.model.streamed import (
    FusedExperts,
    LinearProduct,
    LookedUpTable,
    LowBitMatrix,
    RowParts,
    SplitMatrix,
    SplitProduct,
    Unbound,
)
from pipo_ray.model.trace import Trace
from pipo_ray.pipeline.weight_stream import HostStream, WeightStream
from pipo_ray.plan.pieces import CallPlan, PieceTensor, SweepPlan, positions_of_calls

_REMEMBERED = 8192
"""Views of pieces in a memory, at most: some kilobytes each."""

TableReader = Callable[[str, torch.Tensor], torch.Tensor]
"""(stored table name, row ids [n]) -> rows [n, width] on the compute device."""


@dataclass
class _Held:
    """An acquired piece: its memory, where that begins, and how many uses (times lanes) are still to come."""

    memory: torch.Tensor
    storage: int
    remaining: int


@dataclass
class _Place:
    """Where a parameter of a piece is put: one of a module's dictionaries, and what stands there in between."""

    holder: dict[str, Any]
    leaf: str
    tensor: PieceTensor
    unbound: torch.Tensor


@dataclass
class _Bindings:
    """What was put into the places of a piece when it was last bound, for `memory`."""

    memory: torch.Tensor
    storage: int
    values: list[torch.Tensor]


@dataclass
class _Walk:
    """One lane's place in the sweep: the next call, the next acquisition, and the calls it is inside of."""

    call: int = 0
    inside: list[_OpenCall] = field(default_factory=list)


@dataclass
class _OpenCall:
    plan: CallPlan
    index: int
    first_position: int
    next_streamed: int = 0
    current: int | None = None


class Binder:
    """Binds `model`'s parameters during sweeps over `plan`, fed by `stream`.

    `model` is a graph with parameters on meta (`build_graph`); `trace` and `plan` belong to it. Between `begin` and
    `end` one forward pass runs, or several in `Lanes`. With `products`, those make the products with 16-bit weights;
    `low_bit` those with low-bit weights, if there are any. `layers` are told when everything is bound for good.

    Where nothing streams, everything stays bound after the first sweep, and the hooks are taken off: memory that is
    never given back need not be watched, and a hook on every module costs a fifth of what surrounds small products.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        plan: SweepPlan,
        aliases: dict[str, str],
        stream: WeightStream,
        read_rows: TableReader,
        products: CpuProducts | None = None,
        low_bit: LowBitProducts | None = None,
        layers: SettledLayers | None = None,
    ) -> None:
        self._low_bit, self._layers = low_bit, layers
        self._products = products
        self._bound = (lambda weight: weight) if products is None else products.bind
        self._model, self._trace, self._plan, self._stream = model, trace, plan, stream
        self._part_runs: PartRuns | None = None
        if products is not None and isinstance(stream, HostStream) and stream.streams and not stream.is_traced:
            self._part_runs = PartRuns(plan, stream, products)
        self._lanes: Lanes | None = None
        self._num_lanes = 1
        self._held: dict[int, _Held] = {}
        self._walks: dict[int, _Walk] = {0: _Walk()}
        positions = positions_of_calls(plan)
        self._first_positions = [first for _, first in positions]
        self._whole_position = [wholes for wholes, _ in positions]
        owners: dict[str, list[tuple[nn.Module, str]]] = {}
        unbound: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._settled = False
        self._unit_index = {unit.module: index for index, unit in enumerate(trace.units)}
        streamed_names = {
            tensor.name
            for piece in plan.pieces
            for tensor in piece.tensors
            if not tensor.whole or tensor.expert is not None
        }
        for unit in trace.units:
            for alias in unit.tensors:
                name = aliases.get(alias, alias)
                owner_name, _, leaf = alias.rpartition(".")
                owner = model.get_submodule(owner_name)
                if unit.kind == "lookup":
                    self._stand_in(owner, leaf, LookedUpTable, self._table_answer(name, read_rows))
                elif name in streamed_names and unit.kind == "experts":
                    self._stand_in(owner, leaf, FusedExperts, self._expert_answer(name))
                elif name in streamed_names:
                    self._stand_in(owner, leaf, SplitMatrix, self._rows_answer(name))
                else:
                    owners.setdefault(name, []).append((owner, leaf))
                    meta = getattr(owner, leaf)
                    unbound.setdefault(name, Unbound.make(tuple(meta.shape), meta.dtype, stream.device, None))
                    _dictionary(owner, leaf)[leaf] = unbound[name]
        self._places = [
            [
                _Place(_dictionary(owner, leaf), leaf, tensor, unbound[tensor.name])
                for tensor in piece.tensors
                for owner, leaf in owners.get(tensor.name, ())
            ]
            for piece in plan.pieces
        ]
        self._bindings: dict[int, _Bindings] = {}  # of each piece, as it was last bound
        self._weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # by tensor and memory
        self._watch()

    # -- a sweep
    # ----------------------------------------------------------------------------------------------------------

    def begin(self, lanes: Lanes | None = None, num_lanes: int = 1) -> None:
        """A sweep of `num_lanes` forward passes begins."""
        if lanes is not None and self._settled:
            self._unsettle()
        self._lanes, self._num_lanes = lanes, num_lanes
        self._walks = {lane: _Walk() for lane in range(num_lanes)}
        self._stream.begin_sweep()

    def finish_pass(self) -> None:
        """This lane's forward pass is over: pieces of calls that the model left out are passed by."""
        if self._settled:
            return
        walk = self._walk()
        while walk.call < len(self._plan.calls):
            self._skip_call(walk)

    def end(self) -> None:
        """All passes are over."""
        if self._held:
            raise UnsupportedModelError(f"{len(self._held)} pieces are still held at the end of a sweep")
        self._stream.end_sweep()
        if self._stream.all_stay and self._lanes is None and not self._settled:
            self._settle()

    def abandon(self) -> None:
        """The sweep failed: let go of everything; the next one begins anew."""
        if self._settled:
            self._unsettle()
        for position in list(self._held):
            self._take_away(self._plan.order[position])
        self._held.clear()
        self._stream.abandon()

    def _settle(self) -> None:
        """Put everything where it was in the sweep that has just ended, for good."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for piece in self._bindings:
            self._put(piece)
        for module in self._linears():
            weight = module._parameters["weight"]
            if isinstance(weight, LowBitMatrix):
                module.__dict__["forward"] = partial(_times, weight.product, module._parameters["bias"])
        self._stay_awake(True)
        self._settled = True
        if self._layers is not None:
            self._layers.settle()

    def _unsettle(self) -> None:
        for piece in self._bindings:
            self._take_away(piece)
        for module in self._linears():
            module.__dict__.pop("forward", None)
        self._stay_awake(False)
        if self._layers is not None:
            self._layers.unsettle()
        self._settled = False
        self._watch()

    def _stay_awake(self, on: bool) -> None:
        for products in (self._products, self._low_bit):
            if products is not None:
                products.stay_awake(on)

    def _linears(self) -> list[nn.Module]:
        modules = [self._model.get_submodule(unit.module) for unit in self._trace.units]
        return [module for module in modules if type(module) is nn.Linear]

    def _watch(self) -> None:
        """Put a hook in front of every unit, and one behind it."""
        for unit in self._trace.units:
            module = self._model.get_submodule(unit.module)
            self._handles.append(module.register_forward_pre_hook(self._enter_hook(unit.module)))
            self._handles.append(module.register_forward_hook(self._leave_hook(unit.module)))

    # -- hooks
    # ------------------------------------------------------------------------------------------------------------

    def _enter_hook(self, name: str) -> Any:
        unit = self._unit_index[name]

        def enter(module: nn.Module, args: Any) -> None:
            walk = self._walk()
            calls = self._plan.calls
            while walk.call < len(calls) and calls[walk.call].unit != unit:
                self._skip_call(walk)
            if walk.call >= len(calls):
                raise UnsupportedModelError(
                    f"module {name} was called out of the traced order; this architecture cannot be streamed"
                )
            open_call = _OpenCall(calls[walk.call], walk.call, self._first_positions[walk.call])
            for piece in open_call.plan.whole:
                self._hold(self._whole_position[walk.call][piece])
            walk.inside.append(open_call)
            walk.call += 1

        return enter

    def _leave_hook(self, name: str) -> Any:
        unit = self._unit_index[name]

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            walk = self._walk()
            open_call = walk.inside.pop()
            if open_call.plan.unit != unit:
                raise UnsupportedModelError(
                    f"module {name} was left out of order; this architecture cannot be streamed"
                )
            kept = self._outliving(open_call, output)
            self._close(open_call)
            return kept

        return leave

    def _outliving(self, open_call: _OpenCall, output: Any) -> Any:
        """`output` with copies of what lies in a piece's memory: a returned parameter must outlive its piece."""
        places = self._whole_position[open_call.index]
        storages = {self._held[places[piece]].storage for piece in open_call.plan.whole}
        return _copied_out(output, storages) if storages else output

    def _close(self, open_call: _OpenCall) -> None:
        self._pass_streamed(open_call, len(open_call.plan.streamed))
        for piece in open_call.plan.whole:
            self._let_go(self._whole_position[open_call.index][piece])

    def _skip_call(self, walk: _Walk) -> None:
        plan = self._plan.calls[walk.call]
        for piece in plan.whole:
            self._hold(self._whole_position[walk.call][piece])
        self._close(_OpenCall(plan, walk.call, self._first_positions[walk.call]))
        walk.call += 1

    def _walk(self) -> _Walk:
        return self._walks[0 if self._lanes is None else self._lanes.current]

    # -- pieces
    # -----------------------------------------------------------------------------------------------------------

    def _hold(self, position: int) -> torch.Tensor:
        held = self._held.get(position)
        if held is None:
            if self._lanes is not None:
                self._lanes.arrive(position)
                held = self._held.get(position)
            if held is None:
                memory = self._stream.acquire(position)
                storage = self._bind(position, memory)
                held = self._held[position] = _Held(memory, storage, self._plan.uses[position] * self._num_lanes)
        return held.memory

    def _let_go(self, position: int) -> None:
        held = self._held[position]
        held.remaining -= 1
        if held.remaining == 0:
            self._take_away(self._plan.order[position])
            del self._held[position]
            self._stream.release(position)

    def _bind(self, position: int, memory: torch.Tensor) -> int:
        """Put views of `memory` into the piece's places; where the memory's storage begins.

        A piece that stays in the same memory is not looked at again.
        """
        piece = self._plan.order[position]
        bindings = self._bindings.get(piece)
        if bindings is None or bindings.memory is not memory:
            values = [self._weight(memory, place.tensor) for place in self._places[piece]]
            bindings = self._bindings[piece] = _Bindings(memory, memory.untyped_storage().data_ptr(), values)
        self._put(piece)
        return bindings.storage

    def _put(self, piece: int) -> None:
        for place, value in zip(self._places[piece], self._bindings[piece].values, strict=True):
            place.holder[place.leaf] = value

    def _take_away(self, piece: int) -> None:
        for place in self._places[piece]:
            place.holder[place.leaf] = place.unbound

    def _weight(self, memory: torch.Tensor, tensor: PieceTensor) -> torch.Tensor:
        """What is bound: the tensor, or the rows of it that are in the piece, over the piece's memory.

        In a memory that it was in before it is what it was: making it costs more than a small product, and a piece
        sees few slots.
        """
        of, weight = self._weights.get((id(tensor), id(memory)), (None, None))
        if weight is None or of is not memory:
            view = view_of(memory, tensor)
            if tensor.panels is None:
                weight = self._bound(view)
            else:
                assert self._low_bit is not None, "a plan with low-bit weights needs their products"
                weight = self._low_bit.bind(view, tensor.panels, tensor.row_start)
            if len(self._weights) >= _REMEMBERED:
                self._weights.clear()
            self._weights[id(tensor), id(memory)] = memory, weight
        return weight

    # -- what streams through a call
    # ----------------------------------------------------------------------------------------

    def _pass_streamed(self, open_call: _OpenCall, stop: int) -> None:
        """Release the streamed piece in hand, and take and release those before index `stop`."""
        if open_call.current is not None:
            self._let_go(open_call.current)
            open_call.current = None
        while open_call.next_streamed < stop:
            position = self._streamed_position(open_call, open_call.next_streamed)
            self._hold(position)
            self._let_go(position)
            open_call.next_streamed += 1

    def _streamed_position(self, open_call: _OpenCall, index: int) -> int:
        return open_call.first_position + index

    def _take_streamed(self, open_call: _OpenCall, index: int) -> torch.Tensor:
        """The memory of the call's streamed piece `index`; the ones before it are passed by."""
        position = self._streamed_position(open_call, index)
        if open_call.current != position:
            if index < open_call.next_streamed:
                raise UnsupportedModelError(
                    "streamed weights were used out of order; this architecture cannot be streamed"
                )
            self._pass_streamed(open_call, index)
            self._hold(position)
            open_call.current = position
            open_call.next_streamed = index + 1
        return self._held[position].memory

    def _stand_in(self, owner: nn.Module, leaf: str, kind: Any, answer: Any) -> None:
        meta = owner._parameters[leaf]
        assert meta is not None
        owner._parameters[leaf] = kind.make(tuple(meta.shape), meta.dtype, self._stream.device, answer)

    def _table_answer(self, name: str, read_rows: TableReader) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: read_rows(name, ids)

    def _run_parts(self, open_call: _OpenCall, index: int, name: str, product: SplitProduct) -> int:
        """Have machine code multiply with the streamed pieces from `index` on that are parts of `name` alone; the index
        behind them.
        """
        alone = self._lanes is None and self._num_lanes == 1
        is_refused = product.compiled == [None]  # asking again for every part would cost more each time
        if self._part_runs is None or not alone or is_refused or index < open_call.next_streamed:
            return index
        stop = self._part_runs.stop(open_call.index, index, name)
        if stop > index:
            self._pass_streamed(open_call, index)
            first = self._streamed_position(open_call, 0)
            stop = self._part_runs.multiply(first + index, first + stop, product) - first
            open_call.next_streamed = stop
        return stop

    def _rows_answer(self, name: str) -> RowParts:
        places = [
            (piece.index, tensor) for piece in self._plan.pieces for tensor in piece.tensors if tensor.name == name
        ]
        kept: list[tuple[int, int, torch.Tensor]] = []

        def parts(product: SplitProduct | None) -> Iterator[tuple[int, int, torch.Tensor]]:
            if self._settled:
                if not kept:
                    kept.extend(self._part(self._bindings[piece].memory, tensor) for piece, tensor in places)
                yield from kept
                return
            kept.clear()
            open_call = self._walk().inside[-1]
            behind = 0
            for index, piece in enumerate(open_call.plan.streamed):
                if index >= behind and product is not None:
                    behind = self._run_parts(open_call, index, name, product)
                if index < behind:
                    continue
                for tensor in self._plan.pieces[piece].tensors:
                    if tensor.name == name:
                        yield self._part(self._take_streamed(open_call, index), tensor)

        return parts

    def _part(self, memory: torch.Tensor, tensor: PieceTensor) -> tuple[int, int, torch.Tensor]:
        """First row, the one behind the last, and the rows between them of a matrix that is split."""
        start, stop = tensor.row_start, tensor.row_stop
        if tensor.panels is not None:
            start, stop = tensor.panels.rows_of(start, stop)
        return start, stop, self._weight(memory, tensor)

    def _expert_answer(self, name: str) -> Callable[[int], torch.Tensor]:
        places: dict[int, tuple[int, PieceTensor]] = {}
        for piece in self._plan.pieces:
            for tensor in piece.tensors:
                if tensor.name == name and tensor.expert is not None:
                    places[tensor.expert] = (piece.index, tensor)

        def slice_of(expert: int) -> torch.Tensor:
            piece, tensor = places[expert]
            if self._settled:
                return self._weight(self._bindings[piece].memory, tensor)
            open_call = self._walk().inside[-1]
            memory = self._take_streamed(open_call, open_call.plan.streamed.index(piece))
            return self._weight(memory, tensor)

        return slice_of


def _times(product: LinearProduct, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    """What `nn.Linear.forward` would come to, by a longer way."""
    return product(input, bias)


def _copied_out(value: Any, storages: set[int]) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone() if value.untyped_storage().data_ptr() in storages else value
    if type(value) in (tuple, list):
        return type(value)(_copied_out(part, storages) for part in value)
    return value


def _dictionary(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """Where a module has the parameter or buffer of that name."""
    return owner._parameters if leaf in owner._parameters else owner._buffers
