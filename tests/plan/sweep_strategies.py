"""Random sweeps: pieces, units that use them, and calls that nest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from pipo_ray.plan.pieces import PAGE, Piece, PieceTensor, SweepPlan

Events = list[tuple[int, bool]]
Sweep = tuple[list[Piece], list[tuple[str, ...]], Events]


def piece_of(index: int, names: Sequence[str], *, streams: bool) -> Piece:
    """A piece of page size; one that streams holds rows of its only tensor."""
    tensors = tuple(
        PieceTensor(name, "U8", (PAGE,), None, index, index + 1, 0, PAGE // len(names), whole=not streams)
        for name in names
    )
    return Piece(index, f"block{index}", "layer", "f", index * PAGE, PAGE, PAGE, tensors)


@st.composite
def sweeps(draw: st.DrawFn) -> Sweep:
    """Pieces with one to three tensors, units that use any of them, and calls nested at random (never within
    themselves)."""
    pieces = []
    plain: list[str] = []
    split: list[str] = []
    for index in range(draw(st.integers(1, 7))):
        if draw(st.booleans()) and split and draw(st.booleans()):
            pieces.append(piece_of(index, [split[-1]], streams=True))
        elif draw(st.integers(0, 3)) == 0:
            split.append(f"split{index}")
            pieces.append(piece_of(index, [split[-1]], streams=True))
        else:
            names = [f"p{index}.{n}" for n in range(draw(st.integers(1, 3)))]
            plain += names
            pieces.append(piece_of(index, names, streams=False))
    # A unit whose matrix streams is a leaf with that matrix alone, as linear layers are.
    units: list[tuple[str, ...]] = [(name,) for name in split]
    units += [
        tuple(draw(st.lists(st.sampled_from(plain), unique=True, max_size=3))) if plain else ()
        for _ in range(draw(st.integers(1, 5)))
    ]
    events: Events = []

    def call(outer: tuple[int, ...], depth: int) -> None:
        unit = draw(st.sampled_from([u for u in range(len(units)) if u not in outer]))
        events.append((unit, True))
        if unit >= len(split) and depth < 3:
            for _ in range(draw(st.integers(0, 3))):
                if len(outer) + 1 < len(units):
                    call((*outer, unit), depth + 1)
        events.append((unit, False))

    for _ in range(draw(st.integers(1, 5))):
        call((), 0)
    return pieces, units, events


def steps(plan: SweepPlan, events: Events) -> Iterator[tuple[str, int]]:
    """What the compute worker does in a sweep: ("acquire", position) and ("release", position), in order."""
    held: dict[int, int] = {}
    left: dict[int, int] = {}
    position = 0
    calls = iter(plan.calls)
    inside: list[dict[int, int]] = []
    for _, enters in events:
        if not enters:
            for piece, at in inside.pop().items():
                left[at] -= 1
                if left[at] == 0:
                    del held[piece]
                    yield "release", at
            continue
        call = next(calls)
        for piece in call.whole:
            if piece not in held:
                held[piece] = position
                left[position] = plan.uses[position]
                yield "acquire", position
                position += 1
        inside.append({piece: held[piece] for piece in call.whole})
        for _ in call.streamed:
            yield "acquire", position
            yield "release", position
            position += 1
