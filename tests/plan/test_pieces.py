"""Cutting blocks into pieces, and the order of a sweep over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan.sweep_strategies import Events, Sweep, piece_of, sweeps

from pipo_ray.errors import BudgetError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.plan.pieces import PAGE, SweepPlan, cut_pieces, largest_uncut_bytes, plan_sweep
from pipo_ray.store.layout import plan_files
from pipo_ray.store.manifest import StoredBlock, StoredTensor

# --- cutting ----------------------------------------------------------------------------------------------------------


@st.composite
def stored_blocks(draw: st.DrawFn) -> tuple[StoredBlock, ...]:
    """Blocks as a store has them: offsets from the store's own layout."""
    specs = []
    for block in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["embedding", "attention", "mlp", "expert", "rest", "head"]))
        tensors = []
        for index in range(draw(st.integers(1, 4))):
            shape = tuple(draw(st.lists(st.integers(1, 300), min_size=0 if index else 1, max_size=2)))
            cut = draw(st.sampled_from(["none", "rows"])) if len(shape) == 2 and kind != "expert" else "none"
            dtype = draw(st.sampled_from(["F32", "BF16", "U8"]))
            expert = block if kind == "expert" else None
            tensors.append(TensorSpec(f"b{block}.t{index}", shape, dtype, expert, cut))  # type: ignore[arg-type]
        specs.append(BlockSpec(f"b{block}", kind, None, tuple(tensors)))  # type: ignore[arg-type]
    file_bytes = draw(st.sampled_from([1 << 12, 1 << 18, 1 << 30]))
    return tuple(block for file in plan_files(specs, file_bytes) for block in file.blocks)


def streamed(blocks: Sequence[StoredBlock]) -> list[tuple[StoredBlock, StoredTensor]]:
    return [(block, tensor) for block in blocks if block.kind != "embedding" for tensor in block.tensors]


@given(stored_blocks(), st.integers(0, 40))
def test_pieces_hold_every_byte_once(blocks: tuple[StoredBlock, ...], more_pages: int) -> None:
    slot_bytes = largest_uncut_bytes(blocks) + more_pages * PAGE
    pieces = cut_pieces(blocks, slot_bytes)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    ranges: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    for piece in pieces:
        assert 0 < piece.read_bytes <= slot_bytes
        assert piece.read_bytes % PAGE == piece.file_offset % PAGE == 0
        assert piece.payload_bytes == sum(tensor.nbytes for tensor in piece.tensors) <= piece.read_bytes
        for tensor in piece.tensors:
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= piece.read_bytes
            begin = piece.file_offset + tensor.offset
            ranges.setdefault((tensor.name, tensor.expert), []).append((begin, begin + tensor.nbytes))
    for _, tensor in streamed(blocks):
        parts = ranges.pop((tensor.name, tensor.expert))
        # In order, without a gap, from the first to the last byte.
        assert parts[0][0] == tensor.offset
        assert parts[-1][1] == tensor.offset + tensor.nbytes
        assert all(stop == start for (_, stop), (start, _) in pairwise(parts))
        assert len(parts) == 1 or tensor.cut == "rows"
    assert not ranges


@given(stored_blocks(), st.integers(0, 8))
def test_row_parts_follow_each_other(blocks: tuple[StoredBlock, ...], more_pages: int) -> None:
    pieces = cut_pieces(blocks, largest_uncut_bytes(blocks) + more_pages * PAGE)
    for _, tensor in streamed(blocks):
        parts = [part for piece in pieces for part in piece.tensors if part.name == tensor.name]
        rows = tensor.shape[0] if tensor.shape else 1
        assert [part.row_start for part in parts] == [0, *(part.row_stop for part in parts[:-1])]
        assert parts[-1].row_stop == rows
        assert all(part.whole == (len(parts) == 1) for part in parts)
        for part in parts:
            assert part.shape == (tensor.shape if part.whole else (part.row_stop - part.row_start, *tensor.shape[1:]))
            assert part.dtype == tensor.dtype


@given(stored_blocks())
def test_pieces_are_in_file_order_within_a_block_and_stay_in_it(blocks: tuple[StoredBlock, ...]) -> None:
    by_name = {block.name: block for block in blocks}
    last: dict[str, int] = {}
    for piece in cut_pieces(blocks, largest_uncut_bytes(blocks)):
        block = by_name[piece.block]
        assert (piece.file, piece.kind) == (block.file, block.kind)
        assert block.offset <= piece.file_offset
        assert piece.file_offset + piece.read_bytes <= block.offset + block.nbytes
        assert piece.file_offset >= last.get(piece.block, 0)
        last[piece.block] = piece.file_offset


@given(stored_blocks(), st.integers(1, 100))
def test_less_than_the_least_slot_is_refused(blocks: tuple[StoredBlock, ...], pages: int) -> None:
    least = largest_uncut_bytes(blocks)
    uncut = [_pages(tensor) for _, tensor in streamed(blocks) if tensor.cut == "none"]
    if not uncut or max(uncut) != least or pages * PAGE >= least:
        return  # only matrices that may be cut: a smaller slot may do for some
    with pytest.raises(BudgetError, match=rf"does not fit a slot of {pages * PAGE} bytes"):
        cut_pieces(blocks, pages * PAGE)


def _pages(tensor: StoredTensor) -> int:
    return -(-(tensor.offset + tensor.nbytes) // PAGE) * PAGE - tensor.offset // PAGE * PAGE


def test_embeddings_are_not_streamed() -> None:
    spec = BlockSpec("embedding.e", "embedding", None, (TensorSpec("e", (1000, 64), "F32", None, "rows"),))
    head = BlockSpec("head", "head", None, (TensorSpec("h", (1000, 64), "F32", None, "rows"),))
    blocks = plan_files([spec, head])[0].blocks
    assert {piece.block for piece in cut_pieces(blocks, 1 << 20)} == {"head"}


@pytest.mark.parametrize("most, step", [(448, 384), (240, 224), (208, 208), (202, 200)])
def test_rows_are_cut_in_multiples_of_what_kernels_like(most: int, step: int) -> None:
    """1000 rows, of which `most` fit into a slot: multiples of 64 where possible, or of 32 or 16."""
    head = BlockSpec("head", "head", None, (TensorSpec("h", (1000, 64), "F32", None, "rows"),))
    pieces = cut_pieces(plan_files([head])[0].blocks, most * 256 + 2 * PAGE)
    cuts = [(piece.tensors[0].row_start, piece.tensors[0].row_stop) for piece in pieces]
    assert cuts == [(start, min(start + step, 1000)) for start in range(0, 1000, step)]
    shapes = SweepPlan(pieces, (), (), (), (), 0).num_matrix_shapes
    assert shapes == len({stop - start for start, stop in cuts})


# --- the order of a sweep ---------------------------------------------------------------------------------------------


@given(sweeps())
def test_a_sweep_holds_what_every_open_call_needs(sweep: Sweep) -> None:
    """Walk through the calls as the binder does, by `calls`, `order` and `uses` alone, and compare with `releases`."""
    pieces, units, events = sweep
    plan = plan_sweep(pieces, units, events, {})
    needs = {
        u: {p.index for p in pieces if any(t.name in tensors for t in p.tensors)} for u, tensors in enumerate(units)
    }
    held: dict[int, int] = {}  # piece -> position
    left: dict[int, int] = {}
    released: list[int] = []
    most = position = 0
    open_calls: list[tuple[int, dict[int, int]]] = []
    calls = iter(plan.calls)
    for unit, enters in events:
        if enters:
            call = next(calls)
            assert call.unit == unit
            assert {*call.whole, *call.streamed} == needs[unit]
            mine = {}
            for piece in call.whole:
                if piece not in held:
                    assert plan.order[position] == piece
                    held[piece] = position
                    left[position] = plan.uses[position]
                    position += 1
                mine[piece] = held[piece]
            most = max(most, len(held))
            for piece in call.streamed:
                assert plan.order[position] == piece
                assert plan.uses[position] == 1
                most = max(most, len(held) + 1)
                released.append(position)
                position += 1
            open_calls.append((unit, mine))
        else:
            closed, mine = open_calls.pop()
            assert closed == unit
            for piece, at in mine.items():
                assert held[piece] == at  # it was never let go, nor acquired again, while it was in use
                left[at] -= 1
                if left[at] == 0:
                    del held[piece]
                    released.append(at)
    assert not held
    assert position == len(plan.order) == len(plan.uses)
    assert sorted(released) == list(range(len(plan.order)))
    assert tuple(released) == plan.releases
    assert most == plan.max_held
    LoadOrder(plan.order, plan.releases, {}, max(plan.max_held, 1))


def plan_of(events: Events, units: list[tuple[str, ...]], *names: str) -> SweepPlan:
    return plan_sweep([piece_of(i, name.split("+"), streams=False) for i, name in enumerate(names)], units, events, {})


def test_a_piece_of_two_units_is_acquired_once() -> None:
    plan = plan_of([(0, True), (0, False), (1, True), (1, False)], [("a",), ("b",)], "a+b")
    assert (plan.order, plan.uses, plan.releases, plan.max_held) == ((0,), (2,), (0,), 1)


def test_a_layer_that_is_called_again_is_loaded_again() -> None:
    plan = plan_of([(0, True), (0, False), (1, True), (1, False)] * 2, [("a",), ("b",)], "a", "b")
    assert (plan.order, plan.uses, plan.max_held) == ((0, 1, 0, 1), (1, 1, 1, 1), 1)


def test_a_child_that_is_called_twice_shares_its_piece_with_its_parent() -> None:
    """The parent's own tensor must not be let go while it runs."""
    events = [(0, True), (1, True), (1, False), (1, True), (1, False), (0, False)]
    plan = plan_of(events, [("a",), ("b",)], "a+b")
    assert (plan.order, plan.uses, plan.releases, plan.max_held) == ((0,), (3,), (0,), 1)


def test_aliases_and_tensors_in_no_piece() -> None:
    pieces = [piece_of(0, ["stored"], streams=False)]
    plan = plan_sweep(
        pieces, [("tied",), ("table",)], [(1, True), (1, False), (0, True), (0, False)], {"tied": "stored"}
    )
    assert plan.order == (0,)
    assert plan.calls[0].whole == plan.calls[0].streamed == ()


@given(stored_blocks(), st.integers(0, 3))
def test_shapes_of_products_are_those_of_the_parts(blocks: tuple[StoredBlock, ...], more_pages: int) -> None:
    pieces = cut_pieces(blocks, largest_uncut_bytes(blocks) + more_pages * PAGE)
    plan = SweepPlan(tuple(pieces), (), (), (), (), 0)
    parts = [(tensor.row_stop - tensor.row_start, tensor.shape) for piece in pieces for tensor in piece.tensors]
    assert plan.num_matrix_shapes == len({(rows, shape[1:]) for rows, shape in parts if len(shape) >= 2})


@given(sweeps())
def test_every_use_is_counted(sweep: Sweep) -> None:
    plan = plan_sweep(*sweep, {})
    wanted = Counter(piece for call in plan.calls for piece in (*call.whole, *call.streamed))
    counted: Counter[int] = Counter()
    for piece, uses in zip(plan.order, plan.uses, strict=True):
        counted[piece] += uses
    assert counted == wanted
