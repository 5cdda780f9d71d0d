"""The order of loads: which load goes into which slot, for ever, known to loader and compute worker without a word
between them.

Streamed pieces are numbered through all sweeps (load numbers). A load takes the slot that has been free longest; as the
order of releases is the same in every sweep, so is the pattern: the queue of free slots after a sweep is a fixed
permutation of the one before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

_ELSEWHERE = -(1 << 40)


class LoadOrder:
    """`order` are the pieces in the order of acquisition in a sweep, `releases` the acquisitions in the order of
    release (see SweepPlan); `resident_rows` maps a resident piece to its row in the slot table; pieces `elsewhere` (on
    the GPU for good) are not loaded at all.

    Not thread-safe: each user has its own.
    """

    def __init__(
        self,
        order: Sequence[int],
        releases: Sequence[int],
        resident_rows: Mapping[int, int],
        num_slots: int,
        elsewhere: Collection[int] = (),
    ) -> None:
        self.order = tuple(order)
        rank: list[int] = []
        streamed = 0
        skipped = frozenset(elsewhere)
        for piece in order:
            if piece in skipped:
                rank.append(_ELSEWHERE)
            elif piece in resident_rows:
                rank.append(-1 - resident_rows[piece])
            else:
                rank.append(streamed)
                streamed += 1
        self._rank = rank
        self.loads_per_sweep = streamed
        self.num_slots = num_slots
        # Names of free slots, oldest first: those of the sweep's beginning, then each released slot.
        free = list(range(num_slots))
        assigned: list[int] = []
        released = [rank[position] for position in releases if rank[position] >= 0]
        pending = 0
        for load in range(streamed):
            while len(free) <= load and pending < len(released) and released[pending] < load:
                free.append(assigned[released[pending]])
                pending += 1
            if len(free) <= load:
                raise ValueError(f"{num_slots} slots are too few: load {load} of a sweep would wait for ever")
            assigned.append(free[load])
        free.extend(assigned[r] for r in released[pending:])
        self._assigned = assigned
        self._ranks, self._assigned_slots = np.array(rank, np.int64), np.array(assigned, np.int64)
        self._last_use = {name: rank for rank, name in enumerate(assigned)}
        earlier: dict[int, int] = {}
        self._use_before: list[int | None] = []
        for rank_in_sweep, name in enumerate(assigned):
            self._use_before.append(earlier.get(name))
            earlier[name] = rank_in_sweep
        self._next = free[streamed:]
        self._sweep = 0
        self._queue = list(range(num_slots))

    def load_number(self, base: int, position: int) -> int | None:
        """The load number of acquisition `position` in the sweep whose first load is `base`; None if the piece is
        resident.
        """
        rank = self._rank[position]
        return None if rank < 0 else base + rank

    def is_elsewhere(self, position: int) -> bool:
        """Whether the piece at `position` is not in RAM at all."""
        return self._rank[position] == _ELSEWHERE

    def is_resident(self, position: int) -> bool:
        """Whether the piece at `position` stays in RAM."""
        return _ELSEWHERE < self._rank[position] < 0

    def resident_row(self, position: int) -> int:
        """The slot-table row of the resident piece at `position`."""
        return -1 - self._rank[position]

    def slot(self, load: int) -> int:
        """The slot that load number `load` goes into."""
        sweep, rank = divmod(load, self.loads_per_sweep)
        self._go_to(sweep)
        return self._queue[self._assigned[rank]]

    def places(self, base: int, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of the acquisitions at positions `start:stop` in the sweep whose first load is `base`, none of a piece that
        is elsewhere: load numbers, and slots; of resident pieces any number below `base`, and -1 minus their rows in
        the slot table. Each int64 [stop - start].
        """
        self._go_to(base // self.loads_per_sweep)
        ranks = self._ranks[start:stop]
        slots = np.array(self._queue)[self._assigned_slots[np.maximum(ranks, 0)]]
        return base + ranks, np.where(ranks < 0, ranks, slots)

    def load_before(self, load: int, first: int) -> int | None:
        """The load that had the slot of `load` before it: until that one is released the slot is not free for `load`.
        None if it is the slot's first load since load number `first`, with which a sweep began.
        """
        sweep, rank = divmod(load, self.loads_per_sweep)
        within = self._use_before[rank]
        name = self._assigned[rank]
        while within is None:
            sweep -= 1
            if sweep * self.loads_per_sweep < first:
                return None
            name = self._next[name]  # as the slot was called a sweep earlier
            within = self._last_use.get(name)
        return sweep * self.loads_per_sweep + within

    def _go_to(self, sweep: int) -> None:
        if sweep != self._sweep:
            steps = sweep - self._sweep
            if steps < 0:
                self._queue, steps = list(range(self.num_slots)), sweep
            power = _power(self._next, steps)
            self._queue = [self._queue[i] for i in power]
            self._sweep = sweep


def _power(permutation: Sequence[int], exponent: int) -> list[int]:
    """`permutation` applied `exponent` times."""
    result = list(range(len(permutation)))
    square = list(permutation)
    while exponent:
        if exponent & 1:
            result = [result[i] for i in square]
        square = [square[i] for i in square]
        exponent >>= 1
    return result
