"""The scheduler's loop: forms sweeps, has them run, hands tokens out, and mends what died. Knows Ray only through two
callables.

Shortly before a sweep ends the next one is sent, for those who will go on by all that is known, so that the compute
worker begins it at once: a call there and back takes 2 - 8 ms, in which nothing would be computed or copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pipo_ray.errors import ActorFailedError, PipoError, WorkerLostError
from pipo_ray.messages import (
    RequestSpec,
    SequenceStep,
    StageTimes,
    StepResult,
    SweepRequest,
    SweepResult,
    TokenEvent,
)
from pipo_ray.outputs import FinishReason
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.policy import admit, after, form_batch
from pipo_ray.scheduling.prefixes import PrefixCache
from pipo_ray.scheduling.sequences import Sequence as RunningSequence
from pipo_ray.session.processes import ProcessId, identify

AHEAD_S = 0.05
"""How long before the end of a sweep the next one is sent: calls are faster, and who arrives before takes part."""

RECOMPUTED = 1
"""So often a sequence whose KV pages a drive has lost is computed again: the drive may have recovered, and another
place in the file is taken. After that its request ends.
"""

RunSweep = Callable[[SweepRequest], Awaitable[SweepResult]]
SetUp = Callable[[], Awaitable[None]]


@dataclass
class _Sent:
    """A sweep that the compute worker has been given; `lost`: sequences that begin anew since, whatever it makes of
    them.
    """

    request: SweepRequest
    result: asyncio.Future[SweepResult]
    begin: float
    lost: set[str] = field(default_factory=set)


@dataclass
class _Client:
    """A driver or API server that submits requests: the events that it has not yet acknowledged."""

    events: deque[TokenEvent] = field(default_factory=deque)
    numbered: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class SchedulingLoop:
    """Owns the request queue. `run_sweep` and `set_up` raise WorkerLostError when the compute worker died, PipoError
    for what a restart does not cure. Sweeps are run in the order in which they are sent; the next one is sent `ahead_s`
    seconds before the end of the one that runs is expected, None: when it has ended. `leave_out` tells the worker that
    nobody wants these sequences' steps in a sweep sent ahead any more; if it comes too late, they are computed.
    """

    def __init__(
        self,
        run_sweep: RunSweep,
        set_up: SetUp,
        limits: Limits,
        trace: TraceWriter = NO_TRACE,
        ahead_s: float | None = None,
        leave_out: Callable[[Sequence[str]], object] = lambda _: None,
    ) -> None:
        self._run_sweep, self._set_up, self._limits, self._trace = run_sweep, set_up, limits, trace
        self._waiting: deque[RunningSequence] = deque()
        self._running: list[RunningSequence] = []
        self._clients: dict[str, _Client] = {}
        self._prefixes = PrefixCache(limits.sharing, limits.page_tokens, limits.window, copies=limits.copies)
        self._wake = asyncio.Event()
        self._worker_ready = False
        # A cache that is rebuilt begins at the first token, which is no step that follows.
        self._ahead_s = ahead_s if limits.rebuild_length is None else None
        self._leave_out = leave_out
        self._process = identify(os.getpid())
        self._turn = 0
        self._next: _Sent | None = None
        self._stale: _Sent | None = None  # sent behind a sweep that failed
        self._last_sweep_s: float | None = None
        self._started = time.perf_counter()
        self._sweeping_s = self._compute_s = 0.0
        self.sweeps = 0
        self.bytes_streamed = 0
        self.tokens_computed = self.tokens_reused = 0

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
        aborted = []
        for sequence in [*self._waiting, *self._running]:
            if sequence.client == client and sequence.request_id in wanted:
                self._event(sequence, StepResult(sequence.name, finish_reason="abort"))
                aborted.append(sequence.name)
                self._prefixes.end(sequence)
        if self._next is not None and aborted:
            self._leave_out(aborted)
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
        await self._forget_stale()
        if not self._running and not self._waiting and self._next is None:
            begin = time.perf_counter()
            self._wake.clear()
            await self._wake.wait()
            self._trace.add("no request", begin, time.perf_counter(), {})
        if not self._worker_ready:
            await self._revive()
        sent, self._next = self._next, None
        if sent is None:
            admit(self._waiting, self._running, self._limits, self._prefixes)
            steps = form_batch(self._running, self._limits, self._prefixes)
            if not steps:
                return
            sent = self._send(self.sweeps + 1, steps)
        try:
            await self._send_next_in_time(sent)
            await self._sweep(sent)
        except WorkerLostError:
            self._worker_ready = False
            self._stale, self._next = self._next, None
            self._trace.mark("compute worker lost", {"piece": f"sweep {sent.request.number}"})
        except Exception:
            self._stale, self._next = self._next, None
            raise

    def _send(self, number: int, steps: list[SequenceStep], sent_ahead_by: ProcessId | None = None) -> _Sent:
        self._turn += 1
        request = SweepRequest(number, tuple(steps), *self._prefixes.changes(), sent_ahead_by, self._turn)
        result = asyncio.ensure_future(self._run_sweep(request))
        return _Sent(request, result, time.perf_counter())

    async def _send_next_in_time(self, sent: _Sent) -> None:
        """Once `sent` will soon have ended, send the sweep behind it."""
        if self._ahead_s is None or self._last_sweep_s is None:
            return
        if any(step.logits == "all" for step in sent.request.steps):
            return  # logits for a client are megabytes in the object store: no more of them at a time than need be
        expected = sent.begin + self._last_sweep_s - self._ahead_s
        await asyncio.wait({sent.result}, timeout=max(0.0, expected - time.perf_counter()))
        if sent.result.done():
            return
        admit(self._waiting, self._running, self._limits, self._prefixes)
        steps = form_batch(after(self._running, sent.request.steps), self._limits, self._prefixes)
        if steps:
            self._next = self._send(sent.request.number + 1, steps, self._process)

    async def _forget_stale(self) -> None:
        """Wait for a sweep that was sent behind one that failed; what comes of it is of no use."""
        if self._stale is not None:
            await asyncio.wait({self._stale.result})
            self._stale.result.exception()  # heard, and of no importance
            self._stale = None

    def _fail(self, error: PipoError) -> None:
        for sequence in [*self._running, *self._waiting]:
            self._event(sequence, StepResult(sequence.name), error)
        self._running.clear()
        self._waiting.clear()
        self._worker_ready = False  # what is left of the sweep in its caches, nobody knows: it forgets them

    async def _revive(self) -> None:
        while not self._worker_ready:
            try:
                await self._set_up()
                self._worker_ready = True
            except WorkerLostError:
                await asyncio.sleep(0.2)
        self._prefixes.clear()
        for sequence in self._running:
            sequence.cached = 0
        # What they shared is gone: each finds out again what it needs room for.
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()

    async def _sweep(self, sent: _Sent) -> None:
        request, result = sent.request, await sent.result
        end = time.perf_counter()
        if self._next is not None:
            self._next.begin = end
        lost = {one.name: one.error for one in result.lost if one.name not in sent.lost}
        if all(outcome.left_out for outcome in result.results):
            self._lose(lost)
            return  # all that were to go on have ended, or are lost
        self._last_sweep_s = end - sent.begin
        self._sweeping_s += end - sent.begin
        self._compute_s += result.elapsed_s
        self._trace.add("sweep", sent.begin, end, {"piece": f"sweep {request.number}", "sequences": len(request.steps)})
        self.sweeps += 1
        self.bytes_streamed += result.streamed_bytes
        by_name = {sequence.name: sequence for sequence in self._running}
        for step, outcome in zip(request.steps, result.results, strict=True):
            sequence = by_name.get(step.sequence)
            if sequence is None or step.sequence in sent.lost:  # aborted meanwhile, or to be sent again
                continue
            if outcome.left_out:
                if step.sequence not in lost:  # the worker does not know it any more
                    raise WorkerLostError
                continue
            self.tokens_computed += step.num_tokens
            self.tokens_reused += step.start if step.prefix else 0
            self._prefixes.computes(step)
            sequence.cached = step.start + step.num_tokens
            self._take(sequence, outcome)
        self._lose(lost)

    def _lose(self, lost: dict[str, PipoError | None]) -> None:
        """The worker has these caches no more: who runs on one of them is sent again from its first token, in the room
        that it needs now, and who has lost too often ends.
        """
        anew = self._prefixes.lose(lost)
        if self._next is not None:
            self._next.lost |= anew
        left = [sequence for sequence in self._running if sequence.name not in anew]
        waiting = []
        for sequence in [one for one in self._running if one.name in anew]:
            error = lost.get(sequence.name)
            sequence.cached, sequence.losses = 0, sequence.losses + (error is not None)
            if error is not None and sequence.losses > RECOMPUTED:
                self._event(sequence, StepResult(sequence.name), error)
            else:
                waiting.append(sequence)
        self._running = left
        self._waiting.extendleft(reversed(waiting))

    def _take(self, sequence: RunningSequence, outcome: StepResult) -> None:
        finished = outcome.finish_reason is not None
        if outcome.token_id is not None:
            sequence.generated.append(outcome.token_id)
            self._event(sequence, outcome)
        elif outcome.logits is not None:
            finished = sequence.cached == sequence.length
            reason: FinishReason | None = "length" if finished else None
            # Of a sequence that is computed again, the client has the first ones.
            new = outcome.logits[max(0, sequence.scored - (sequence.cached - len(outcome.logits))) :]
            if len(new):
                sequence.scored = sequence.cached
                self._event(sequence, StepResult(outcome.sequence, logits=new, finish_reason=reason))
        if finished:
            self._running.remove(sequence)
            self._prefixes.end(sequence)

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
            {"sweeps": self.sweeps, "bytes_streamed": self.bytes_streamed, "tokens_computed": self.tokens_computed,
             "tokens_reused": self.tokens_reused},
        )  # fmt: skip
