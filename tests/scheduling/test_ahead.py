"""Sweeps that are sent before the one in front has ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from pipo_ray.errors import DriveError, WorkerLostError
from pipo_ray.messages import RequestSpec, SequenceStep, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.params import SamplingParams
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import SchedulingLoop
from pipo_ray.session.processes import identify


class Worker:
    """Takes one sweep after the other, as an actor does. A token is its own position; a sequence ends with the last
    that it may have, or with the token in `ends`. `during` is awaited within each sweep.
    """

    def __init__(self) -> None:
        self.sent: list[SweepRequest] = []
        self.done: list[SweepRequest] = []
        self.left_out: list[str] = []
        self.unwanted: list[str] = []
        self.set_ups = 0
        self.ends: dict[str, int] = {}
        self.during: Callable[[SweepRequest], Awaitable[None]] | None = None
        self._turn = asyncio.Lock()
        self._known: dict[str, list[int]] = {}  # tokens cached, most tokens, last token
        self._ended: set[str] = set()

    async def set_up(self) -> None:
        self.set_ups += 1
        self._known.clear()

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        self.sent.append(request)
        async with self._turn:
            for name in request.drop:
                self._known.pop(name, None)
            await asyncio.sleep(0.005)
            try:
                if self.during is not None:
                    await self.during(request)
            except BaseException:
                for step in request.steps:
                    self._known.pop(step.sequence, None)
                raise
            results = tuple(self._step(step) for step in request.steps)
            self.done.append(request)
            return SweepResult(request.number, results, 0.0, 0.0, 1)

    def _step(self, step: SequenceStep) -> StepResult:
        name = step.sequence
        if step.spec is not None:
            self._known[name] = [0, len(step.spec.prompt_token_ids) + step.spec.max_tokens, -1]
            self._ended.discard(name)
        if step.follows and (name not in self._known or name in self._ended or self._known[name][0] != step.start):
            self.left_out.append(name)
            return StepResult(name, left_out=True)
        known = self._known[name]
        assert known[0] == step.start, "a token is missing in the cache, or there twice"
        if known[2] >= 0 and step.sample and not step.follows and step.start:
            assert step.token_ids[-1] == known[2], "the step does not go on with what was chosen"
        known[0] = token = step.start + step.num_tokens
        if not step.sample:
            return StepResult(name)
        known[2] = token
        reason = "length" if token + 1 == known[1] else "stop" if self.ends.get(name) == token else None
        if reason:
            self._ended.add(name)
        return StepResult(name, token, "x", finish_reason=reason)  # type: ignore[arg-type]


def request(name: str, prompt: int = 3, tokens: int = 4) -> RequestSpec:
    return RequestSpec(name, tuple(range(prompt)), SamplingParams(max_tokens=tokens), 0, tokens)


def play(body: Callable[[SchedulingLoop, Worker], Awaitable[None]], **limits: Any) -> tuple[SchedulingLoop, Worker]:
    """Run `body` beside a loop that sends ahead."""

    async def run() -> tuple[SchedulingLoop, Worker]:
        worker = Worker()
        bounds = Limits(**{"kv_tokens": 100, "max_batch_tokens": 16, **limits})
        loop = SchedulingLoop(
            worker.run_sweep, worker.set_up, bounds, ahead_s=1.0, leave_out=lambda names: worker.unwanted.extend(names)
        )
        task = asyncio.create_task(loop.run())
        try:
            await asyncio.wait_for(body(loop, worker), 30)
        finally:
            task.cancel()
        return loop, worker

    return asyncio.run(run())


async def ended(loop: SchedulingLoop, count: int) -> list[TokenEvent]:
    """The events until `count` requests have ended."""
    events: list[TokenEvent] = []
    while sum(event.result.finish_reason is not None or event.error is not None for event in events) < count:
        events += await loop.poll("c", events[-1].number if events else 0, 5.0)
    return events


def tokens(events: list[TokenEvent], name: str) -> list[int]:
    return [e.result.token_id for e in events if e.request_id == name and e.result.token_id is not None]


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_the_next_sweep_is_there_before_the_one_in_front_has_ended() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def wait(sweep: SweepRequest) -> None:
            if 1 < sweep.number < 6:
                await _until(lambda: len(worker.sent) > sweep.number)

        worker.during = wait
        loop.submit("c", [request("a", 3, 6)])
        events = await ended(loop, 1)
        assert tokens(events, "a") == [3, 4, 5, 6, 7, 8]

    loop, worker = play(body)
    assert [step.follows for sweep in worker.sent for step in sweep.steps] == [False, False, True, True, True, True]
    assert loop.sweeps == len(worker.sent) == 6, "who ends for certain is not sent on"
    assert not worker.left_out


def test_prompts_in_chunks_are_sent_ahead_as_well() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        loop.submit("c", [request("a", 50, 3), request("b", 21, 3)])
        events = await ended(loop, 2)
        assert tokens(events, "a") == [50, 51, 52]
        assert tokens(events, "b") == [21, 22, 23]

    play(body)


def test_a_sequence_that_stops_is_left_out_of_what_was_sent_and_others_go_on() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        worker.ends = {"c/a/0": 5}
        loop.submit("c", [request("a", 3, 40), request("b", 3, 8)])
        events = await ended(loop, 2)
        assert tokens(events, "a") == [3, 4, 5]
        assert tokens(events, "b") == [3, 4, 5, 6, 7, 8, 9, 10]
        loop.submit("c", [request("d", 3, 2)])
        await _until(lambda: any("c/a/0" in sweep.drop for sweep in worker.sent))

    _, worker = play(body)
    assert worker.left_out == ["c/a/0"]


def test_a_sweep_of_which_nothing_is_left_counts_for_nothing() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        worker.ends = {"c/a/0": 6}
        loop.submit("c", [request("a", 3, 40)])
        assert tokens(await ended(loop, 1), "a") == [3, 4, 5, 6]
        loop.submit("c", [request("b")])
        assert tokens(await ended(loop, 2), "b") == [3, 4, 5, 6]

    loop, worker = play(body)
    assert worker.left_out == ["c/a/0"]
    assert loop.sweeps == 8


def test_an_error_ends_all_and_what_was_sent_behind_it_is_forgotten() -> None:
    error = DriveError("the drive is away")

    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def fail(sweep: SweepRequest) -> None:
            if sweep.number == 3 and error is not None and not worker.left_out:
                await _until(lambda: len(worker.sent) > 3)
                raise error

        worker.during = fail
        loop.submit("c", [request("a", 3, 40), request("b", 5, 40)])
        events = await ended(loop, 2)
        assert [event.error for event in events][-2:] == [error, error]
        assert tokens(events, "a") == [3, 4]
        loop.submit("c", [request("d")])
        assert tokens(await ended(loop, 3), "d") == [3, 4, 5, 6]

    _, worker = play(body)
    assert sorted(worker.left_out) == ["c/a/0", "c/b/0"]
    assert worker.set_ups == 2, "it forgets what it has of a sweep that failed"


def test_a_lost_worker_costs_no_token_and_none_comes_twice() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        deaths = iter([None])

        async def die(sweep: SweepRequest) -> None:
            if sweep.number == 3 and next(deaths, "no more") is None:
                await _until(lambda: len(worker.sent) > 3)
                raise WorkerLostError

        worker.during = die
        loop.submit("c", [request("a", 3, 7), request("b", 5, 7)])
        events = await ended(loop, 2)
        assert tokens(events, "a") == [3, 4, 5, 6, 7, 8, 9]
        assert tokens(events, "b") == [5, 6, 7, 8, 9, 10, 11]

    _, worker = play(body)
    assert worker.set_ups == 2


def test_who_comes_late_takes_part_in_the_sweep_behind() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def join(sweep: SweepRequest) -> None:
            if sweep.number == 3:
                await _until(lambda: len(worker.sent) > 3)
                loop.submit("c", [request("b", 5, 3)])

        worker.during = join
        loop.submit("c", [request("a", 3, 9)])
        events = await ended(loop, 2)
        assert tokens(events, "b") == [5, 6, 7]

    _, worker = play(body)
    assert [sweep.number for sweep in worker.sent if len(sweep.steps) == 2] == [5, 6, 7]


def test_what_is_aborted_while_two_sweeps_are_sent_brings_nothing_more() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        async def abort(sweep: SweepRequest) -> None:
            if sweep.number == 3:
                await _until(lambda: len(worker.sent) > 3)
                loop.abort("c", ["a"])

        worker.during = abort
        loop.submit("c", [request("a", 3, 40), request("b", 3, 9)])
        events = await ended(loop, 2)
        assert tokens(events, "a") == [3, 4]
        assert tokens(events, "b") == [3, 4, 5, 6, 7, 8, 9, 10, 11]
        assert any("c/a/0" in sweep.drop for sweep in worker.sent)
        assert worker.unwanted == ["c/a/0"]

    play(body)


def test_nothing_is_sent_behind_a_sweep_whose_logits_go_to_a_client() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        loop.submit("c", [replace(request("a", 50, 1), score=True)])
        await _until(lambda: len(worker.done) >= 3)

    _, worker = play(body, max_scored_tokens=8)
    assert all(sweep.sent_ahead_by is None for sweep in worker.sent)


def test_what_was_sent_ahead_says_who_sent_it() -> None:
    async def body(loop: SchedulingLoop, worker: Worker) -> None:
        loop.submit("c", [request("a", 3, 6)])
        await ended(loop, 1)

    _, worker = play(body)
    ahead = [sweep.sent_ahead_by for sweep in worker.sent]
    assert ahead[0] is None
    assert ahead[-1] == identify(os.getpid())
