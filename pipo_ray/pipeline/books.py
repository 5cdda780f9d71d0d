"""The staging pool's books: what each slot holds, and how full the pool has been."""

from __future__ import annotations

import time

from pipo_ray.errors import BudgetError
from pipo_ray.messages import StageSetup
from pipo_ray.pipeline.slots import SlotState, SlotTable
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter

_SPAN_S = 1.0
"""Of the trace: what a process that is killed did last is lost with a span that has no end."""


class Books:
    """Read from the slot table, which survives any actor; so a new StagingPool has them at once. `trace` gets them as
    they were sampled, in spans of a second at most.
    """

    def __init__(self, table: SlotTable, trace: TraceWriter = NO_TRACE) -> None:
        self._table, self._trace = table, trace
        self._samples = self._busy = self._full = 0
        self.most_in_use = 0
        self._kind, self._since_s = "", 0.0

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
        if self._trace.enabled:
            kind = "no slot ready" if not ready else "all slots ready" if ready == len(states) else "some slots ready"
            self._trace_sample(kind, time.perf_counter())

    def _trace_sample(self, kind: str, now_s: float) -> None:
        if kind != self._kind or now_s - self._since_s >= _SPAN_S:
            if self._kind:
                self._trace.add(self._kind, self._since_s, now_s, {})
            self._kind, self._since_s = kind, now_s

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
