"""Which pieces stay in memory and through which slots the others stream, for a given amount of weight memory."""

from __future__ import annotations

from collections.abc import Sequence

from pipo_ray.errors import BudgetError
from pipo_ray.messages import Placement
from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.pieces import PAGE, Piece, SweepPlan, cut_pieces, largest_uncut_bytes, plan_sweep
from pipo_ray.plan.transfer import WITHOUT_PROFILE, Transfer
from pipo_ray.session.memory import format_least, format_size
from pipo_ray.store.manifest import Manifest

STAGING_SHARE = 0.3
"""Of the weight memory, at most: what slots take is missing for pieces that stay."""

_ARENA_BYTES = 512 << 20
_MOST_PIECES = 4096


def least_slot_bytes(manifest: Manifest) -> int:
    """The smallest slots that are planned with: for the largest tensor that cannot be cut, and not so small that a
    large model has hundreds of thousands of pieces (planning Llama-3-8B's took ten seconds).
    """
    return max(largest_uncut_bytes(manifest.blocks), manifest.total_bytes // _MOST_PIECES // PAGE * PAGE)


def least_weight_bytes(manifest: Manifest, facts: ModelFacts) -> int:
    """Slots and always-resident pieces at the smallest slot size."""
    slot_bytes = least_slot_bytes(manifest)
    sweep = sweep_plan(manifest, facts, slot_bytes)
    return (sweep.max_held + 1) * slot_bytes + sum(p.read_bytes for p in sweep.pieces if p.kind == "rest")


def whole_bytes(manifest: Manifest, facts: ModelFacts) -> int:
    """What the model takes when all of it is resident."""
    slot_bytes = max(largest_uncut_bytes(manifest.blocks), WITHOUT_PROFILE.slot_bytes)
    return sum(piece.read_bytes for piece in cut_pieces(manifest.blocks, slot_bytes))


def sweep_plan(manifest: Manifest, facts: ModelFacts, slot_bytes: int) -> SweepPlan:
    """The sweep with blocks cut for slots of `slot_bytes`."""
    pieces = cut_pieces(manifest.blocks, slot_bytes)
    tensors = [() if unit.kind == "lookup" else unit.tensors for unit in facts.units]
    return plan_sweep(pieces, tensors, facts.events, manifest.aliases)


def place(
    manifest: Manifest, facts: ModelFacts, weight_bytes: int, transfer: Transfer = WITHOUT_PROFILE
) -> tuple[SweepPlan, Placement, int, int, int]:
    """Choose slot size, number of slots (those of `transfer` if there is room) and resident pieces for `weight_bytes`.

    Returns (sweep plan, placement, bytes used, resident bytes, streamed bytes per sweep). Raises BudgetError.
    """
    least = least_slot_bytes(manifest)
    slot_bytes = max(least, WITHOUT_PROFILE.slot_bytes)  # as in `whole_bytes`
    sweep = sweep_plan(manifest, facts, slot_bytes)
    used = sum(piece.read_bytes for piece in sweep.pieces)
    if used <= weight_bytes:
        arenas, places = pack_arenas(sweep.pieces, range(len(sweep.pieces)))
        return sweep, Placement(slot_bytes, 0, arenas, places), used, used, 0
    staging = int(weight_bytes * STAGING_SHARE)
    slot_bytes = max(least, min(transfer.slot_bytes, staging // transfer.num_slots) // 4096 * 4096)
    while True:
        sweep = sweep_plan(manifest, facts, slot_bytes)
        always = sum(p.read_bytes for p in sweep.pieces if p.kind == "rest")
        wanted = transfer.num_slots
        if slot_bytes > transfer.slot_bytes:  # matrices that cannot be cut so small: fewer slots, not more staging
            wanted = transfer.staging_bytes // slot_bytes
        num_slots = max(sweep.max_held + 1, min(wanted, max(staging // slot_bytes, 2)))
        if num_slots * slot_bytes + always <= weight_bytes:
            break
        if slot_bytes == least:
            num_slots = sweep.max_held + 1
            if num_slots * slot_bytes + always > weight_bytes:
                raise BudgetError(
                    f"weights need at least {format_least(num_slots * slot_bytes + always)}, "
                    f"{format_size(weight_bytes)} are given; raise --memory or --weight-memory"
                )
            break
        slot_bytes = max(least, slot_bytes // 2 // 4096 * 4096)
    chosen = choose_residents(sweep.pieces, weight_bytes - num_slots * slot_bytes)
    arenas, places = pack_arenas(sweep.pieces, chosen)
    resident = sum(sweep.pieces[i].read_bytes for i in chosen)
    streamed = sum(sweep.pieces[i].read_bytes for i in sweep.order if i not in places)
    placement = Placement(slot_bytes, num_slots, arenas, places)
    return sweep, placement, num_slots * slot_bytes + resident, resident, streamed


def choose_residents(pieces: Sequence[Piece], budget: int) -> list[int]:
    """Pieces that stay, `budget` bytes at most: what must stay, then others spread evenly over the sweep.

    Evenly, because read-ahead reaches only as far as there are slots: the drive is to have something to do behind every
    resident piece. For each drive by itself, because each is to have as much left to read.
    """
    chosen = [piece.index for piece in pieces if piece.kind == "rest"]
    left = budget - sum(pieces[i].read_bytes for i in chosen)
    others = [piece for piece in pieces if piece.kind != "rest"]
    total = sum(piece.read_bytes for piece in others)
    if left >= total:
        return sorted([*chosen, *(piece.index for piece in others)])
    share = max(0.0, left / total) if total else 0.0
    owed = dict.fromkeys((piece.drive for piece in others), 0.0)
    for piece in others:
        owed[piece.drive] += share * piece.read_bytes
        if owed[piece.drive] >= piece.read_bytes and left >= piece.read_bytes:
            chosen.append(piece.index)
            owed[piece.drive] -= piece.read_bytes
            left -= piece.read_bytes
    return sorted(chosen)


def pack_arenas(pieces: Sequence[Piece], chosen: Sequence[int]) -> tuple[tuple[int, ...], dict[int, tuple[int, int]]]:
    """Room for the `chosen` pieces: bytes of each arena, and where a piece is (arena, offset)."""
    arenas: list[int] = []
    places: dict[int, tuple[int, int]] = {}
    for index in chosen:
        nbytes = pieces[index].read_bytes
        if not arenas or arenas[-1] + nbytes > _ARENA_BYTES:
            arenas.append(0)
        places[index] = (len(arenas) - 1, arenas[-1])
        arenas[-1] += nbytes
    return tuple(arenas), places
