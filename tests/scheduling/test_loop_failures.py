"""The scheduler's loop with a compute worker that fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipo_ray.errors import ActorFailedError, DriveError, PipoError, WorkerLostError
from pipo_ray.messages import LostCache, RequestSpec, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.params import SamplingParams
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import SchedulingLoop

# Two requests run, the third waits for room in the KV cache.
LIMITS = Limits(20, 512, True, None)


def request(name: str) -> RequestSpec:
    return RequestSpec(name, (5, 6, 7), SamplingParams(max_tokens=4, ignore_eos=True), 1, 4)


class Worker:
    """Raises what is in `failures`, then answers each step with a token, and ends a sequence with its fourth."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.starts: list[list[int]] = []
        self.set_ups = 0

    async def set_up(self) -> None:
        self.set_ups += 1

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        self.starts.append([step.start for step in request.steps])
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        results = tuple(
            StepResult(step.sequence, 9, finish_reason="length" if step.start >= 5 else None) for step in request.steps
        )
        return SweepResult(request.number, results, 0.0, 0.0, 0)


async def events_of(loop: SchedulingLoop, client: str, after: int, count: int) -> list[TokenEvent]:
    """The client's next events until there are so many."""
    while len(events := await loop.poll(client, after, 1.0)) < count:
        await asyncio.sleep(0)
    return events


def outcome(worker: Worker) -> tuple[list[PipoError | None], list[TokenEvent], list[TokenEvent]]:
    """Three requests of two clients, and one more when all have ended: their errors, and the last one's events."""

    async def play() -> tuple[list[PipoError | None], list[TokenEvent], list[TokenEvent]]:
        loop = SchedulingLoop(worker.run_sweep, worker.set_up, LIMITS)
        task = asyncio.get_running_loop().create_task(loop.run())
        loop.submit("a", [request("0"), request("1")])
        loop.submit("b", [request("2")])
        first = [event for event in await events_of(loop, "a", 0, 4) if event.error is not None]
        second = [event for event in await events_of(loop, "b", 0, 1) if event.error is not None]
        numbered = loop._clients["a"].numbered
        loop.submit("a", [request("3")])
        last = await events_of(loop, "a", numbered, 4)
        task.cancel()
        return [event.error for event in [*first, *second]], [*first, *second], last

    return asyncio.run(asyncio.wait_for(play(), 20))


def test_an_error_ends_what_runs_and_what_waits_and_not_the_next_request() -> None:
    error = DriveError("the drive is away")
    errors, events, last = outcome(Worker(None, error))
    assert errors == [error] * 3
    assert [event.request_id for event in events] == ["0", "1", "2"]
    assert [event.result.token_id for event in last] == [9] * 4
    assert last[-1].result.finish_reason == "length"


def test_a_defect_is_an_error_too() -> None:
    errors, _, last = outcome(Worker(None, ZeroDivisionError("no")))
    assert all(isinstance(error, ActorFailedError) and "ZeroDivisionError: no" in str(error) for error in errors)
    assert len(errors) == 3
    assert len(last) == 4


def test_a_sweep_that_has_to_be_done_again_is_no_error() -> None:
    worker = Worker(None, WorkerLostError())

    async def play() -> list[TokenEvent]:
        loop = SchedulingLoop(worker.run_sweep, worker.set_up, LIMITS)
        task = asyncio.get_running_loop().create_task(loop.run())
        loop.submit("a", [request("0")])
        events = await events_of(loop, "a", 0, 4)
        task.cancel()
        return events

    events = asyncio.run(asyncio.wait_for(play(), 20))
    assert [event.error for event in events] == [None] * 4
    assert worker.set_ups == 2
    assert worker.starts[:3] == [[0], [3], [0]]


def play(worker: Worker, limits: Limits, requests: list[RequestSpec], count: int) -> list[TokenEvent]:
    """The first `count` events of these requests."""

    async def run() -> list[TokenEvent]:
        loop = SchedulingLoop(worker.run_sweep, worker.set_up, limits)
        task = asyncio.get_running_loop().create_task(loop.run())
        loop.submit("a", requests)
        events = await events_of(loop, "a", 0, count)
        task.cancel()
        return events

    return asyncio.run(asyncio.wait_for(run(), 20))


class LossyWorker(Worker):
    """In sweeps of these numbers request 0 has lost its cache, to a drive, or with None without an error of its own."""

    def __init__(self, losses: dict[int, PipoError | None]) -> None:
        super().__init__()
        self._losses = losses

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        result = await super().run_sweep(request)
        if len(self.starts) not in self._losses:
            return result
        name = "a/0/0"
        results = [replace(one, left_out=one.sequence == name) for one in result.results]
        return replace(result, results=tuple(results), lost=(LostCache(name, self._losses[len(self.starts)]),))


@pytest.mark.parametrize("sharing", ["none", "shared"])
@pytest.mark.parametrize("losses", [{3: DriveError("away")}, {3: None}])
def test_a_sequence_that_has_lost_its_cache_is_computed_again_and_no_other(sharing: Any, losses: Any) -> None:
    worker = LossyWorker(losses)
    events = play(worker, replace(LIMITS, sharing=sharing), [request("0"), request("1")], 8)
    assert worker.starts == [[0, 0], [3, 3], [4, 4], [5, 0], [5]]
    assert worker.set_ups == 1
    assert [event.request_id for event in events].count("0") == 4
    assert not any(event.error for event in events)


@pytest.mark.parametrize("sharing", ["none", "shared"])
def test_one_request_ends_with_an_error_and_no_other(sharing: Any) -> None:
    """One that the drive has lost twice."""
    error = DriveError("its pages are gone")
    worker = LossyWorker({2: DriveError("away"), 3: error})
    events = play(worker, replace(LIMITS, sharing=sharing), [request("0"), request("1")], 6)
    assert [(event.request_id, event.error) for event in events if event.error] == [("0", error)]
    assert worker.starts == [[0, 0], [3, 3], [4, 0], [5]]


def test_a_worker_that_does_not_know_a_sequence_begins_anew() -> None:
    """For a reason that it does not tell."""

    class Forgetful(Worker):
        async def run_sweep(self, request: SweepRequest) -> SweepResult:
            result = await super().run_sweep(request)
            if len(self.starts) != 2:
                return result
            first, *others = result.results
            return replace(result, results=(StepResult(first.sequence, left_out=True), *others))

    worker = Forgetful()
    events = play(worker, LIMITS, [request("0"), request("1")], 8)
    assert worker.set_ups == 2
    assert not any(event.error for event in events)


class ScoringWorker(Worker):
    """Each position's logits are its number."""

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        result = await super().run_sweep(request)
        (step,) = request.steps
        logits = np.arange(step.start, step.start + step.num_tokens, dtype=np.float32)[:, None]
        return replace(result, results=(StepResult(step.sequence, logits=logits),))


def test_logits_come_once_though_they_are_computed_again() -> None:
    worker = ScoringWorker(None, None, WorkerLostError())
    scored = replace(request("0"), prompt_token_ids=tuple(range(3, 10)), max_tokens=1, score=True)
    events = play(worker, replace(LIMITS, max_batch_tokens=3), [scored], 3)
    assert worker.starts == [[0], [3], [6], [0], [3], [6]]
    assert np.concatenate([event.result.logits for event in events]).ravel().tolist() == list(range(7))
    assert events[-1].result.finish_reason == "length"
