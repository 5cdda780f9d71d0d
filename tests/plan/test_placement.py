"""Which pieces stay: as many from each drive, so that each has as much left to read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.plan.pieces import PAGE, Piece
from pipo_ray.plan.placement import choose_residents


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
