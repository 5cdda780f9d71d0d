"""How weights lie in memory: slots as the transfer wants them, and which pieces stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.plan.pieces import PAGE, Piece
from pipo_ray.plan.placement import choose_residents, place
from pipo_ray.plan.transfer import Mode, ReadRate, choose_transfer
from pipo_ray.quant.panels import PANEL_BYTES, SMALL_PANEL_BYTES

from .budget_models import low_bit_model

MIB = 1 << 20


@given(st.integers(1, 4), st.lists(st.integers(1, 8), min_size=1, max_size=80), st.floats(0, 1.1))
def test_every_drive_keeps_its_share(num_drives: int, pages: list[int], share: float) -> None:
    """In turns: what an even choice regardless of drives would get most wrong."""
    pieces = [
        Piece(
            index, f"b{index}", "mlp", f"f{index % num_drives}", 0, count * PAGE, count * PAGE, (), index % num_drives
        )
        for index, count in enumerate(pages)
    ]
    total = sum(piece.read_bytes for piece in pieces)
    budget = int(share * total)
    chosen = set(choose_residents(pieces, budget))
    assert sum(pieces[index].read_bytes for index in chosen) <= max(budget, 0)
    if budget >= total:
        assert chosen == set(range(len(pieces)))
        return
    for drive in range(num_drives):
        own = [piece for piece in pieces if piece.drive == drive]
        kept = sum(piece.read_bytes for piece in own if piece.index in chosen)
        wanted = share * sum(piece.read_bytes for piece in own)
        assert wanted - 9 * PAGE <= kept <= wanted + PAGE


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("panel_bytes", [SMALL_PANEL_BYTES, PANEL_BYTES])
def test_staging_of_panels(name: str, panel_bytes: int) -> None:
    """A panel is in one slot. Of small ones memory-saver stages a quarter of what performance does; large ones it has
    to give two slots, for reads want somewhere to go while one is multiplied.
    """
    manifest, facts = low_bit_model(64, 14336, 4096, name, panel_bytes)

    def staging(threads: int, mode: Mode) -> tuple[int, int]:
        transfer = choose_transfer([ReadRate(2 * MIB, threads, 2e9)], mode)
        _, placement, *_ = place(manifest, facts, manifest.total_bytes // 2, transfer)
        return placement.num_slots, placement.num_slots * placement.slot_bytes

    for threads in (8, 4):
        _, full = staging(threads, "performance")
        num_slots, saving = staging(threads, "memory-saver")
        assert num_slots == 2
        assert saving <= (full / 4 if panel_bytes == SMALL_PANEL_BYTES else full)
