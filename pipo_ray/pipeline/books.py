"""The staging pool's books: what each slot holds, and how full the pool has been."""

from __future__ import annotations

from pipo_ray.errors import BudgetError
from pipo_ray.messages import StageSetup
from pipo_ray.pipeline.slots import SlotState, SlotTable


class Books:
    """Read from the slot table, which survives any actor; so a new StagingPool has them at once."""

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._samples = self._busy = self._full = 0
        self.most_in_use = 0

    def entries(self) -> list[tuple[str, int]]:
        """Per slot its state's name and load number."""
        views = [self._table.view(slot) for slot in range(self._table.num_slots)]
        return [(view.state.name, view.load) for view in views]

    def sample(self) -> None:
        """Look once at what the slots hold."""
        states = [self._table.view(slot).state for slot in range(self._table.num_slots)]
        ready = states.count(SlotState.READY)
        self._samples += 1
        self._full += 0 < ready == len(states)
        self._busy += 0 < ready < len(states)
        self.most_in_use = max(self.most_in_use, len(states) - states.count(SlotState.FREE))

    @property
    def share_busy(self) -> float:
        """Share of the samples in which some slots, but not all, held a piece to compute with: neither side waited."""
        return self._busy / self._samples if self._samples else 0.0

    @property
    def share_full(self) -> float:
        """Share of the samples in which every slot held a piece: the drive waited for the compute worker."""
        return self._full / self._samples if self._samples else 0.0


def check_lease(setup: StageSetup, weight_memory_bytes: int) -> None:
    """Raise BudgetError if slots and resident pieces together exceed the weight budget."""
    placement = setup.placement
    used = placement.num_slots * placement.slot_bytes + sum(placement.arena_bytes)
    if used > weight_memory_bytes:
        raise BudgetError(
            f"slots and resident pieces take {used} bytes, the weight budget is {weight_memory_bytes}; "
            "plan the run again"
        )
