"""Cutting blocks into pieces that fit a slot, and the order in which a sweep uses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipo_ray.errors import BudgetError
from pipo_ray.quant.panels import Panels
from pipo_ray.store.manifest import StoredBlock, StoredTensor

PAGE = 4096


@dataclass(frozen=True)
class PieceTensor:
    """A tensor, an expert's slice, or rows `row_start:row_stop` of one, inside a piece. `offset` is in bytes from the
    slot's start. Of a low-bit weight the rows are panels.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    expert: int | None
    row_start: int
    row_stop: int
    offset: int
    nbytes: int
    whole: bool
    panels: Panels | None = None


@dataclass(frozen=True)
class Piece:
    """A byte range of a block: what one slot holds.

    `file_offset` and `read_bytes` are multiples of 4096, as O_DIRECT wants; the range may begin in a neighbour's last
    page. `payload_bytes` counts only this piece's tensors. `drive` is the number of the store's folder that has the
    file, and of the loader that reads it.
    """

    index: int
    block: str
    kind: str
    file: str
    file_offset: int
    read_bytes: int
    payload_bytes: int
    tensors: tuple[PieceTensor, ...]
    drive: int = 0


@dataclass(frozen=True)
class CallPlan:
    """What a call of a unit needs: pieces bound for the whole call, then pieces that stream through it in order."""

    unit: int
    whole: tuple[int, ...]
    streamed: tuple[int, ...]


@dataclass(frozen=True)
class SweepPlan:
    """`pieces` by index; `calls` one per unit call of a sweep; `order` the pieces in the order in which a sweep
    acquires them.

    `uses[k]` is how many unit calls use the k-th acquisition; `releases` the acquisitions in the order in which they
    are released; `max_held` the most acquisitions held at once.
    """

    pieces: tuple[Piece, ...]
    calls: tuple[CallPlan, ...]
    order: tuple[int, ...]
    uses: tuple[int, ...]
    releases: tuple[int, ...]
    max_held: int

    @property
    def num_drives(self) -> int:
        """How many drives the pieces are on, and so how many loaders there are."""
        return 1 + max((piece.drive for piece in self.pieces), default=0)

    @property
    def num_matrix_shapes(self) -> int:
        """How many shapes there are among the matrices' parts, each of which is a product of its own."""
        tensors = (tensor for piece in self.pieces for tensor in piece.tensors)
        return len({one.shape for one in tensors if len(one.shape) > 1})


def largest_uncut_bytes(blocks: Iterable[StoredBlock]) -> int:
    """Bytes of the largest tensor that must be in one slot, its pages included: the least slot size."""
    least = PAGE
    for block in blocks:
        if block.kind == "embedding":
            continue
        for tensor in block.tensors:
            if tensor.cut == "rows":
                least = max(least, _round_up(_row_bytes(tensor)) + 2 * PAGE)
            else:
                least = max(least, _span(tensor, 0, None)[1])
    return least


def cut_pieces(blocks: Sequence[StoredBlock], slot_bytes: int) -> tuple[Piece, ...]:
    """Cut every block but the embeddings into pieces of at most `slot_bytes`.

    A tensor larger than a slot is split by rows into equal parts if its `cut` allows it. Raises BudgetError otherwise.
    """
    pieces: list[Piece] = []
    for block in blocks:
        if block.kind == "embedding":
            continue
        pending: list[tuple[StoredTensor, int, int]] = []
        for tensor in block.tensors:
            if _span(tensor, 0, None)[1] > slot_bytes:
                _flush(pieces, block, pending)
                for start, stop in _row_parts(tensor, slot_bytes):
                    _flush(pieces, block, [(tensor, start, stop)])
                continue
            if pending and _pages(_first(pending), tensor.offset + tensor.nbytes)[1] > slot_bytes:
                _flush(pieces, block, pending)
            pending.append((tensor, 0, tensor.shape[0] if tensor.shape else 1))
        _flush(pieces, block, pending)
    return tuple(pieces)


def plan_sweep(
    pieces: Sequence[Piece],
    unit_tensors: Sequence[Sequence[str]],
    events: Sequence[tuple[int, bool]],
    aliases: Mapping[str, str],
) -> SweepPlan:
    """Simulate one forward pass over the traced `events` (unit, enters) and number the acquisitions.

    `unit_tensors[u]` are the names of unit u's tensors in graph terms; looked-up tables and tensors in no piece are
    skipped. A piece that is needed again after all its units have run (layers that share weights) is acquired again.
    """
    of_tensor: dict[str, list[int]] = {}
    streams: set[int] = set()
    for piece in pieces:
        for tensor in piece.tensors:
            of_tensor.setdefault(tensor.name, []).append(piece.index)
            if not tensor.whole or tensor.expert is not None:
                streams.add(piece.index)
    plans: list[CallPlan] = []
    order: list[int] = []
    uses: list[int] = []
    users: list[set[int]] = []
    open_uses: list[int] = []
    live: dict[int, int] = {}
    entered: dict[int, list[list[int]]] = {}
    for unit, enters in events:
        if not enters:
            for at in entered[unit].pop():
                open_uses[at] -= 1
            continue
        needed = sorted({p for name in unit_tensors[unit] for p in of_tensor.get(aliases.get(name, name), ())})
        whole = tuple(p for p in needed if p not in streams)
        streamed = tuple(p for p in needed if p in streams)
        used: list[int] = []
        for index in whole:
            at = live.get(index, -1)
            # A unit that comes again has its pieces loaded again, unless a call around it still holds them.
            if at < 0 or (unit in users[at] and not open_uses[at]):
                at = live[index] = len(order)
                order.append(index)
                uses.append(0)
                users.append(set())
                open_uses.append(0)
            uses[at] += 1
            users[at].add(unit)
            open_uses[at] += 1
            used.append(at)
        entered.setdefault(unit, []).append(used)
        order.extend(streamed)
        uses.extend(1 for _ in streamed)
        users.extend({unit} for _ in streamed)
        open_uses.extend(0 for _ in streamed)
        plans.append(CallPlan(unit, whole, streamed))
    releases, max_held = _releases(events, plans, uses)
    return SweepPlan(tuple(pieces), tuple(plans), tuple(order), tuple(uses), releases, max_held)


def positions_of_calls(plan: SweepPlan) -> Sequence[tuple[dict[int, int], int]]:
    """For each call: the position at which each of its whole pieces was acquired, and the position of its first
    streamed piece.
    """
    latest: dict[int, int] = {}
    used: dict[int, int] = {}
    position = 0
    result: list[tuple[dict[int, int], int]] = []
    for call in plan.calls:
        places: dict[int, int] = {}
        for piece in call.whole:
            at = latest.get(piece)
            if at is None or used[at] == plan.uses[at]:
                at = latest[piece] = position
                used[at] = 0
                position += 1
            used[at] += 1
            places[piece] = at
        result.append((places, position))
        position += len(call.streamed)
    return result


def _releases(
    events: Sequence[tuple[int, bool]], plans: Sequence[CallPlan], uses: Sequence[int]
) -> tuple[tuple[int, ...], int]:
    """Acquisitions in the order of release while the calls of `events` nest as they do, and the most that are held at
    the same time.
    """
    position_of: dict[int, int] = {}
    remaining: dict[int, int] = {}
    waiting = iter(plans)
    entered: dict[int, list[tuple[CallPlan, int]]] = {}
    releases: list[int] = []
    position = most = 0
    for unit, enters in events:
        if enters:
            plan = next(waiting)
            for piece in plan.whole:
                if piece not in remaining:
                    position_of[piece] = position
                    remaining[piece] = uses[position]
                    position += 1
            entered.setdefault(unit, []).append((plan, position))
            position += len(plan.streamed)
            most = max(most, len(remaining) + (1 if plan.streamed else 0))
        else:
            plan, first = entered[unit].pop()
            releases.extend(range(first, first + len(plan.streamed)))
            for piece in plan.whole:
                remaining[piece] -= 1
                if not remaining[piece]:
                    del remaining[piece]
                    releases.append(position_of[piece])
    return tuple(releases), most


def _first(pending: Sequence[tuple[StoredTensor, int, int]]) -> int:
    return _span(*pending[0])[0]


def _row_bytes(tensor: StoredTensor) -> int:
    return tensor.nbytes // tensor.shape[0] if tensor.shape else tensor.nbytes


def _span(tensor: StoredTensor, start: int, stop: int | None) -> tuple[int, int]:
    """Absolute byte offset of the first row, and the bytes to read for rows start:stop with whole pages."""
    first = tensor.offset + start * _row_bytes(tensor)
    last = tensor.offset + (tensor.nbytes if stop is None else stop * _row_bytes(tensor))
    return first, _pages(first, last)[1]


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _pages(first: int, last: int) -> tuple[int, int]:
    begin = first // PAGE * PAGE
    return begin, (last + PAGE - 1) // PAGE * PAGE - begin


def _row_parts(tensor: StoredTensor, slot_bytes: int) -> list[tuple[int, int]]:
    if tensor.cut != "rows" or _round_up(_row_bytes(tensor)) + 2 * PAGE > slot_bytes:
        raise BudgetError(
            f"tensor {tensor.name} ({tensor.nbytes} bytes) does not fit a slot of {slot_bytes} bytes and cannot be "
            "split; raise --memory or --weight-memory"
        )
    rows = tensor.shape[0]
    most = (slot_bytes - 2 * PAGE) // _row_bytes(tensor)
    parts = -(-rows // most)
    # Equal parts, in multiples of 64 rows where that is possible, or of 32 or 16: what matrix kernels like.
    step = -(-rows // parts)
    wholes = (-(-step // unit) * unit for unit in (64, 32, 16) if step > unit)
    step = next((whole for whole in wholes if whole <= most), step)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _flush(pieces: list[Piece], block: StoredBlock, pending: list[tuple[StoredTensor, int, int]]) -> None:
    if not pending:
        return
    first = _first(pending)
    tensor, _, stop = pending[-1]
    rows = tensor.shape[0] if tensor.shape else 1
    last = tensor.offset + (tensor.nbytes if stop == rows else stop * _row_bytes(tensor))
    begin, read_bytes = _pages(first, last)
    members = []
    for tensor, start, stop in pending:
        rows = tensor.shape[0] if tensor.shape else 1
        whole = start == 0 and stop == rows
        nbytes = tensor.nbytes if whole else (stop - start) * _row_bytes(tensor)
        offset = tensor.offset + (0 if whole else start * _row_bytes(tensor)) - begin
        shape = tensor.shape if whole else (stop - start, *tensor.shape[1:])
        if tensor.first_row is not None:  # what is stored is itself a part
            whole, start, stop = False, start + tensor.first_row, stop + tensor.first_row
        members.append(
            PieceTensor(
                tensor.name, tensor.dtype, shape, tensor.expert, start, stop, offset, nbytes, whole, tensor.panels
            )
        )
    payload = sum(member.nbytes for member in members)
    place = block.file, begin, read_bytes
    pieces.append(Piece(len(pieces), block.name, block.kind, *place, payload, tuple(members), block.folder))
    pending.clear()
