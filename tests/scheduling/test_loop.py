"""The scheduler's loop with a compute worker made of two functions: who joins, who leaves, what a death costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pipo_ray.errors import StoreError, WorkerLostError
from pipo_ray.messages import RequestSpec, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.params import SamplingParams
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import SchedulingLoop


class Worker:
    """Answers a step with the number of tokens that the sequence then has, so that every token tells its position."""

    def __init__(self) -> None:
        self.cached: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.sweeps: list[SweepRequest] = []
        self.set_ups = 0
        self.before: Callable[[SweepRequest], Awaitable[None]] | None = None

    async def set_up(self) -> None:
        self.set_ups += 1
        self.cached.clear()

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        self.sweeps.append(request)
        await asyncio.sleep(0)
        if self.before is not None:
            await self.before(request)
        for name in request.drop:
            self.cached.pop(name, None)
        results = []
        for step in request.steps:
            assert self.cached.get(step.sequence, 0) == step.start, "a token is missing in the cache, or there twice"
            if step.spec is not None:
                self.most[step.sequence] = len(step.spec.prompt_token_ids) + step.spec.max_tokens
            length = self.cached[step.sequence] = step.start + len(step.token_ids)
            ends = length + 1 == self.most[step.sequence]
            results.append(
                StepResult(step.sequence, length, "x", finish_reason="length" if ends else None)
                if step.sample
                else StepResult(step.sequence)
            )
        return SweepResult(request.number, tuple(results), 0.0, 0.0, 1000)


def request(name: str, prompt: int = 3, tokens: int = 4, **more: Any) -> RequestSpec:
    return RequestSpec(name, tuple(range(prompt)), SamplingParams(max_tokens=tokens), 0, tokens, **more)


def in_loop(
    body: Callable[[SchedulingLoop, Worker], Awaitable[None]], trace: TraceWriter = NO_TRACE, **limits: Any
) -> tuple[SchedulingLoop, Worker]:
    """Run `body` beside a loop with a worker."""
    worker = Worker()

    async def run() -> SchedulingLoop:
        loop = SchedulingLoop(
            worker.run_sweep, worker.set_up, Limits(**{"kv_tokens": 100, "max_batch_tokens": 16, **limits}), trace
        )
        task = asyncio.create_task(loop.run())
        try:
            await asyncio.wait_for(body(loop, worker), 30)
        finally:
            task.cancel()
        return loop

    return asyncio.run(run()), worker


async def finished(loop: SchedulingLoop, count: int, client: str = "c") -> dict[str, list[TokenEvent]]:
    """The client's events by request, when `count` requests have ended."""
    events: list[TokenEvent] = []
    while sum(event.result.finish_reason is not None for event in events) < count:
        new = await loop.poll(client, events[-1].number if events else 0, 5.0)
        assert not (failed := [event.error for event in new if event.error is not None]), failed
        events += new
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    return {name: [e for e in events if e.request_id == name] for name in {e.request_id for e in events}}


def tokens(events: list[TokenEvent]) -> list[int | None]:
    return [event.result.token_id for event in events if event.result.token_id is not None]


def test_a_request_joins_while_another_runs_and_both_end() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def join(sweep: SweepRequest) -> None:
            if sweep.number == 2:
                loop.submit("c", [request("b", 5, 3)])

        worker.before = join
        loop.submit("c", [request("a", 3, 6)])
        ended = await finished(loop, 2)
        assert tokens(ended["a"]) == [3, 4, 5, 6, 7, 8]
        assert tokens(ended["b"]) == [5, 6, 7]
        both = [sweep.number for sweep in worker.sweeps if len(sweep.steps) == 2]
        assert both == [3, 4, 5]

    loop, worker = in_loop(body)
    assert loop.sweeps == len(worker.sweeps) == 6
    assert loop.bytes_streamed == 6000
    assert worker.set_ups == 1


def test_the_trace_has_the_time_without_a_request(tmp_path: Path) -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        loop.submit("c", [request("a")])
        await finished(loop, 1)
        await asyncio.sleep(0.1)
        loop.submit("d", [request("b")])
        await finished(loop, 1, "d")

    in_loop(body, TraceWriter(tmp_path / "trace.jsonl", "Scheduler"))
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["start", *["no request", *["sweep"] * 4] * 2]
    before, idle, after = events[5:8]
    assert idle["end"] - idle["begin"] >= 0.09
    assert before["end"] <= idle["begin"]
    assert idle["end"] <= after["begin"]


def test_one_waits_until_the_kv_cache_has_room_and_what_left_is_dropped() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        loop.submit("c", [request("a"), request("b")])
        ended = await finished(loop, 2)
        assert tokens(ended["a"]) == tokens(ended["b"]) == [3, 4, 5, 6]
        assert all(len(sweep.steps) == 1 for sweep in worker.sweeps)
        assert worker.sweeps[4].drop == ("c/a/0",)
        assert worker.cached.keys() == {"c/b/0"}

    in_loop(body, kv_tokens=10)


def test_an_aborted_request_ends_at_once_and_its_cache_is_dropped() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def abort(sweep: SweepRequest) -> None:
            if sweep.number == 2:
                loop.abort("c", ["a"])

        worker.before = abort
        loop.submit("c", [request("a", 3, 50), request("b")])
        ended = await finished(loop, 2)
        assert tokens(ended["a"]) == [3], "the sweep that ran meanwhile brings nothing more"
        assert ended["a"][-1].result.finish_reason == "abort"
        assert tokens(ended["b"]) == [3, 4, 5, 6]
        assert "c/a/0" in worker.sweeps[2].drop
        assert "c/a/0" not in worker.cached

    in_loop(body)


def test_a_client_that_leaves_takes_its_requests_with_it() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def leave(sweep: SweepRequest) -> None:
            if sweep.number == 2:
                loop.leave("gone")

        worker.before = leave
        loop.submit("gone", [request("a", 3, 50), request("waits", 60, 30)])
        loop.submit("c", [request("a")])
        assert tokens((await finished(loop, 1))["a"]) == [3, 4, 5, 6]
        assert not loop.knows("gone")
        assert all(step.sequence == "c/a/0" for sweep in worker.sweeps[2:] for step in sweep.steps)

    in_loop(body)


def test_a_lost_worker_costs_the_interrupted_sweep_and_one_prefill() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        deaths = iter([None])

        async def die(sweep: SweepRequest) -> None:
            if sweep.number == 3 and next(deaths, "no more") is None:
                worker.cached.clear()
                raise WorkerLostError

        worker.before = die
        loop.submit("c", [request("a"), request("b", 5)])
        ended = await finished(loop, 2)
        assert tokens(ended["a"]) == [3, 4, 5, 6], "no token is repeated or changed"
        assert tokens(ended["b"]) == [5, 6, 7, 8]
        again = worker.sweeps[3]
        assert [step.start for step in again.steps] == [0, 0]
        specs = [step.spec for step in again.steps if step.spec is not None]
        assert [spec.generated_token_ids for spec in specs] == [(3, 4), (5, 6)]

    loop, worker = in_loop(body)
    assert worker.set_ups == 2
    assert len(worker.sweeps) == loop.sweeps + 1


def test_a_resubmitted_request_goes_on_behind_what_was_streamed() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        loop.submit("c", [request("a", generated={0: (3, 4)})])
        assert tokens((await finished(loop, 1))["a"]) == [5, 6]

    in_loop(body)


def test_what_a_restart_does_not_cure_ends_the_request_and_wakes_the_client() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def damage(sweep: SweepRequest) -> None:
            raise StoreError("block 3 is damaged")

        worker.before = damage
        loop.submit("c", [request("a")])
        (event,) = await loop.poll("c", 0, 20.0)
        assert event.request_id == "a"
        assert isinstance(event.error, StoreError)

    in_loop(body)
