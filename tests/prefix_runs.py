"""Sequences that begin on others' KV: single steps, and conversations through the scheduler."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from harness import Pipeline, random_prompts

from pipo_ray.messages import RequestSpec, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.model.batch import PrefixPart, PrefixUse, SweepEntry
from pipo_ray.params import SamplingParams
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import SchedulingLoop


def step(
    name: str, tokens: list[int], start: int, stop: int, prefix: tuple[tuple[str, int, PrefixUse], ...] = ()
) -> SweepEntry:
    parts = tuple(PrefixPart(*part) for part in prefix)
    return SweepEntry(name, tuple(tokens[start:stop]), start, len(tokens), "all", parts)


class Stage:
    """Sweeps of greedy sequences; with no more KV than the limits say."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._runner = pipeline.runner
        self.computed = 0
        self.uses: set[str] = set()
        self.points = 0

    async def set_up(self) -> None:
        self._runner.drop_all()

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        self._runner.drop(request.drop)
        self._runner.cut(request.cut)
        entries = [
            SweepEntry(s.sequence, s.token_ids, s.start, s.capacity, s.logits, s.prefix, s.keep) for s in request.steps
        ]
        outputs = self._runner.run(entries)
        self.computed += sum(s.num_tokens for s in request.steps)
        self.uses |= {part.use for s in request.steps for part in s.prefix}
        self.points += sum(len(s.keep) for s in request.steps)
        results = []
        for one, logits in zip(request.steps, outputs, strict=True):
            if logits is None or not one.sample:
                results.append(StepResult(one.sequence))
                continue
            ends = one.start + one.num_tokens == one.capacity
            results.append(StepResult(one.sequence, int(logits[-1].argmax()), finish_reason="length" if ends else None))
        return SweepResult(request.number, tuple(results), 0.0, 0.0, 0)


async def answers(stage: Stage, limits: Limits, turns: list[list[RequestSpec]]) -> dict[tuple[str, int], list[int]]:
    """Each turn's requests together, when those of the turn before have ended."""
    loop = SchedulingLoop(stage.run_sweep, stage.set_up, limits)
    task = asyncio.get_running_loop().create_task(loop.run())
    result: dict[tuple[str, int], list[int]] = {}
    events: list[TokenEvent] = []
    for requests in turns:
        loop.submit("c", requests)
        left = sum(request.params.n for request in requests)
        while left:
            events = await loop.poll("c", events[-1].number if events else 0, 20.0)
            for event in events:
                assert event.error is None, event.error
                result.setdefault((event.request_id, event.index), []).append(event.result.token_id)  # type: ignore[arg-type]
                left -= event.result.finish_reason is not None
    task.cancel()
    return result


def alone_and_together(pipeline: Pipeline, limits: Limits, turns: list[list[RequestSpec]]) -> tuple[Stage, Stage]:
    """The turns without sharing and with it, which changes no token."""
    alone, together = Stage(pipeline), Stage(pipeline)
    wanted = asyncio.run(answers(alone, replace(limits, sharing="none"), turns))
    assert asyncio.run(answers(together, replace(limits, sharing="shared"), turns)) == wanted
    return alone, together


def conversations(vocab_size: int, seed: int, system_tokens: int = 60) -> list[list[RequestSpec]]:
    """Three turns of four conversations with one beginning, some of whose requests want several samples. What was
    answered is told anew, and not always as it was.
    """
    chance = random.Random(seed)
    system = random_prompts(vocab_size, (system_tokens,), seed)[0]
    said = [system + [chance.randrange(3, vocab_size) for _ in range(chance.randrange(1, 9))] for _ in range(4)]
    turns = []
    for turn in range(3):
        requests = []
        for number, tokens in enumerate(said):
            params = SamplingParams(max_tokens=6, n=chance.choice([1, 1, 3]))
            requests.append(RequestSpec(f"{turn}/{number}", tuple(tokens), params, 0, 6))
            tokens += [chance.randrange(3, vocab_size) for _ in range(chance.randrange(5, 40))]
        turns.append(requests)
    return turns
