"""StagingPool: keeps the books of slots and resident pieces; hands out the lease under which the others use them."""

from __future__ import annotations

import os
import threading
import time

from pipo_ray.errors import ActorFailedError
from pipo_ray.messages import StageSetup, StageTimes
from pipo_ray.pipeline.books import Books, check_lease
from pipo_ray.pipeline.roll import ActorRoll
from pipo_ray.pipeline.stage_memory import StageMemory
from pipo_ray.pipeline.tracing import TraceWriter

_SAMPLE_S = 0.02
_PATIENCE_S = 30.0


class StagingPool:
    """The memory itself belongs to the driver, who opens the pool, and opens it again after a restart; who holds what
    stands in the slot table, so a new pool has the books at once.
    """

    def __init__(self, roll: str, weight_memory_bytes: int) -> None:
        ActorRoll(roll).sign_in("StagingPool")
        self._weight_memory_bytes = weight_memory_bytes
        self._setup: StageSetup | None = None
        self._opened = threading.Event()
        self._started = time.perf_counter()

    def open(self, setup: StageSetup) -> int:
        """Take the driver's memory into the books. Returns the pid. Raises BudgetError if it is more than the weight
        budget.
        """
        check_lease(setup, self._weight_memory_bytes)
        self._memory = StageMemory.attach(setup)
        trace_file = f"{setup.trace_folder}/StagingPool-{os.getpid()}.jsonl" if setup.trace_folder else None
        self._trace = TraceWriter(trace_file, "StagingPool")
        self._books = Books(self._memory.table, self._trace)
        if self._memory.table.num_slots:  # else the books stay as they are
            threading.Thread(target=self._watch, name="books", daemon=True).start()
        self._setup = setup
        self._opened.set()
        return os.getpid()

    def lease(self, actor: str, patience_s: float) -> StageSetup:
        """What `actor` attaches to: slots, resident pieces, and the order in which slots change hands. Waits until the
        pool is open.
        """
        setup = self._open_setup(patience_s)
        self._trace.mark("lease", {"piece": actor})
        return setup

    def books(self) -> list[tuple[str, int]]:
        """Per slot its state and the load number that it holds or held last."""
        self._open_setup(_PATIENCE_S)
        return self._books.entries()

    def times(self) -> StageTimes:
        """Busy: some slots, but not all, hold a piece to compute with. Waiting, for the compute worker: all do. The
        rest of the time, starved, none does.
        """
        self._open_setup(_PATIENCE_S)  # a new process has no books for a moment
        total = time.perf_counter() - self._started
        return StageTimes(
            "StagingPool", self._books.share_busy * total, self._books.share_full * total, total,
            {"slots": self._memory.table.num_slots, "most_in_use": self._books.most_in_use},
        )  # fmt: skip

    def _open_setup(self, patience_s: float) -> StageSetup:
        if not self._opened.wait(patience_s) or self._setup is None:
            raise ActorFailedError(f"StagingPool: not opened by the driver within {patience_s:.0f} s")
        return self._setup

    def _watch(self) -> None:
        while not self._memory.table.stopped:
            self._books.sample()
            time.sleep(_SAMPLE_S)
