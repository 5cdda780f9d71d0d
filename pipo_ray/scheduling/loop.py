"""The scheduler's loop: forms sweeps, has them run, hands tokens out, and mends what died. Knows Ray only through two
callables.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pipo_ray.errors import ActorFailedError, PipoError
from pipo_ray.messages import RequestSpec, StageTimes, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.outputs import FinishReason
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.scheduling.policy import Limits, admit, form_batch
from pipo_ray.scheduling.sequences import Sequence as RunningSequence


class WorkerLostError(Exception):
    """The compute worker's process is gone, and will come back empty; or its sweep has to be done again."""


RunSweep = Callable[[SweepRequest], Awaitable[SweepResult]]
SetUp = Callable[[], Awaitable[None]]


@dataclass
class _Client:
    """A driver or API server that submits requests: the events that it has not yet acknowledged."""

    events: deque[TokenEvent] = field(default_factory=deque)
    numbered: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class SchedulingLoop:
    """Owns the request queue. `run_sweep` and `set_up` raise WorkerLostError when the compute worker died, PipoError
    for what a restart does not cure.
    """

    def __init__(self, run_sweep: RunSweep, set_up: SetUp, limits: Limits, trace: TraceWriter = NO_TRACE) -> None:
        self._run_sweep, self._set_up, self._limits, self._trace = run_sweep, set_up, limits, trace
        self._waiting: deque[RunningSequence] = deque()
        self._running: list[RunningSequence] = []
        self._clients: dict[str, _Client] = {}
        self._drop: list[str] = []
        self._wake = asyncio.Event()
        self._worker_ready = False
        self._started = time.perf_counter()
        self._sweeping_s = self._compute_s = 0.0
        self.sweeps = 0
        self.bytes_streamed = 0
        self.tokens_computed = 0

    # -- clients
    # ----------------------------------------------------------------------------------------------------------

    def submit(self, client: str, requests: Sequence[RequestSpec]) -> None:
        """Queue `requests`. Those with `generated` tokens go on behind them."""
        self._clients.setdefault(client, _Client())
        for request in requests:
            for index in range(request.params.n):
                if index in request.finished:
                    continue
                self._waiting.append(
                    RunningSequence(
                        name=f"{client}/{request.request_id}/{index}",
                        request_id=request.request_id,
                        client=client,
                        index=index,
                        prompt=request.prompt_token_ids,
                        params=request.params,
                        seed=request.seed,
                        max_tokens=request.max_tokens,
                        score=request.score,
                        generated=list(request.generated.get(index, ())),
                    )
                )
        self._wake.set()

    def knows(self, client: str) -> bool:
        """Whether `client` has submitted to this scheduler; if not, an earlier one died and the client must submit
        again.
        """
        return client in self._clients

    async def poll(self, client: str, after: int, timeout_s: float) -> list[TokenEvent]:
        """The client's events with a number above `after`; waits up to `timeout_s` seconds for the first. Earlier ones
        are forgotten.
        """
        state = self._clients[client]
        while state.events and state.events[0].number <= after:
            state.events.popleft()
        if not state.events:
            state.arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(state.arrived.wait(), timeout_s)
        return list(state.events)

    def abort(self, client: str, request_ids: Sequence[str]) -> None:
        """End these requests; a sweep that runs is not interrupted."""
        wanted = set(request_ids)
        for sequence in [*self._waiting, *self._running]:
            if sequence.client == client and sequence.request_id in wanted:
                self._event(sequence, StepResult(sequence.name, finish_reason="abort"))
                self._drop.append(sequence.name)
        self._waiting = deque(s for s in self._waiting if s.client != client or s.request_id not in wanted)
        self._running = [s for s in self._running if s.client != client or s.request_id not in wanted]

    def leave(self, client: str) -> None:
        """The client is gone: its requests end, its events are forgotten."""
        self.abort(client, [s.request_id for s in [*self._waiting, *self._running] if s.client == client])
        self._clients.pop(client, None)

    # -- the loop
    # ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run sweeps for ever. An error ends the requests that run or wait; whatever is asked next is tried again."""
        while True:
            try:
                await self._step()
            except PipoError as error:
                self._fail(error)
            except Exception as error:  # a defect of ours: the clients must hear of it instead of waiting for ever
                self._fail(ActorFailedError(f"Scheduler: {type(error).__name__}: {error}"))

    async def _step(self) -> None:
        if not self._running and not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        if not self._worker_ready:
            await self._revive()
        admit(self._waiting, self._running, self._limits)
        steps = form_batch(self._running, self._limits)
        if steps:
            await self._sweep(SweepRequest(self.sweeps + 1, tuple(steps), tuple(self._drop)))

    def _fail(self, error: PipoError) -> None:
        for sequence in [*self._running, *self._waiting]:
            self._event(sequence, StepResult(sequence.name), error)
            self._drop.append(sequence.name)
        self._running.clear()
        self._waiting.clear()

    async def _revive(self) -> None:
        while not self._worker_ready:
            try:
                await self._set_up()
                self._worker_ready = True
            except WorkerLostError:
                await asyncio.sleep(0.2)
        for sequence in self._running:
            sequence.cached = 0
        self._drop.clear()

    async def _sweep(self, request: SweepRequest) -> None:
        begin = time.perf_counter()
        try:
            result = await self._run_sweep(request)
        except WorkerLostError:
            self._worker_ready = False
            self._trace.mark("compute worker lost", {"piece": f"sweep {request.number}"})
            return
        end = time.perf_counter()
        self._sweeping_s += end - begin
        self._compute_s += result.elapsed_s
        self._trace.add("sweep", begin, end, {"piece": f"sweep {request.number}", "sequences": len(request.steps)})
        self._drop = [name for name in self._drop if name not in request.drop]
        self.sweeps += 1
        self.bytes_streamed += result.streamed_bytes
        by_name = {sequence.name: sequence for sequence in self._running}
        for step, outcome in zip(request.steps, result.results, strict=True):
            sequence = by_name.get(step.sequence)
            if sequence is None:  # aborted meanwhile; its cache exists
                self._drop.append(step.sequence)
                continue
            self.tokens_computed += len(step.token_ids)
            sequence.cached = step.start + len(step.token_ids)
            self._take(sequence, outcome)

    def _take(self, sequence: RunningSequence, outcome: StepResult) -> None:
        finished = outcome.finish_reason is not None
        if outcome.token_id is not None:
            sequence.generated.append(outcome.token_id)
            self._event(sequence, outcome)
        elif outcome.logits is not None:
            finished = sequence.cached == sequence.length
            reason: FinishReason | None = "length" if finished else None
            self._event(sequence, StepResult(outcome.sequence, logits=outcome.logits, finish_reason=reason))
        if finished:
            self._running.remove(sequence)
            self._drop.append(sequence.name)

    def _event(self, sequence: RunningSequence, outcome: StepResult, error: PipoError | None = None) -> None:
        client = self._clients.get(sequence.client)
        if client is None:
            return
        client.numbered += 1
        client.events.append(
            TokenEvent(
                client.numbered,
                sequence.request_id,
                sequence.index,
                outcome,
                self.sweeps,
                self.bytes_streamed,
                time.perf_counter(),
                error,
            )
        )
        client.arrived.set()

    def times(self) -> StageTimes:
        """Busy: what a sweep takes here beyond the compute worker's own time, calls included. Waiting: for the compute
        worker.
        """
        total = time.perf_counter() - self._started
        return StageTimes(
            "Scheduler", max(0.0, self._sweeping_s - self._compute_s), self._compute_s, total,
            {"sweeps": self.sweeps, "bytes_streamed": self.bytes_streamed, "tokens_computed": self.tokens_computed},
        )  # fmt: skip
