"""A compute worker that holds tokens in place of their keys and values, and clients that disturb it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from pipo_ray.errors import DriveError, WorkerLostError
from pipo_ray.messages import LostCache, RequestSpec, SequenceStep, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.model.batch import PrefixPart
from pipo_ray.params import SamplingParams
from pipo_ray.scheduling import prefixes as prefixes_module
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import SchedulingLoop
from pipo_ray.scheduling.policy import admit
from pipo_ray.scheduling.prefixes import PrefixCache
from pipo_ray.scheduling.sequences import Sequence
from pipo_ray.scheduling.window import Window


@dataclass(eq=False)
class Cache:
    """As the compute worker has it, with tokens in place of their keys and values. Of all tokens of its line, those
    before `packed` are in pages. `source`: the cache that will give it the tokens it has, in the sweep that runs.
    """

    prefix: list[tuple[Cache, int]]
    capacity: int
    own: list[int] = field(default_factory=list)
    packed: int = 0
    source: Cache | None = None

    @property
    def start(self) -> int:
        return sum(count for _, count in self.prefix)

    @property
    def length(self) -> int:
        return self.start + len(self.own)

    def tokens(self) -> list[int]:
        return [token for cache, count in self.prefix for token in cache.own[:count]] + self.own

    def settle(self, window: Window) -> None:
        """What has left the window is packed."""
        self.packed = max(self.packed, self.start, window.packed_of(self.length, self.start + self.capacity))

    def budget(self, window: Window, page_tokens: int) -> int:
        if not window.tokens or window.places is not None:
            return -(-self.capacity // page_tokens) * page_tokens
        if len(self.own) == self.capacity:
            return window.budget(self.packed - self.start, self.length - self.packed)
        pages = window.packed(self.start + self.capacity - 1) - self.start
        return window.budget(pages, min(self.capacity, window.tokens + window.page_tokens))


def chosen(tokens: Several[int]) -> int:
    """What follows `tokens`, by a rule that asks each of them; 0 ends a sequence."""
    number = 7
    for token in tokens:
        number = (number * 31 + token + 1) % 1009
    return number % 6


def continuation(prompt: Several[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(chosen(tokens))
        if tokens[-1] == 0:
            break
    return tokens[len(prompt) :]


class Worker:
    """Takes one sweep after the other, and checks that all that it is asked for is there, and nothing else. `fails`
    says which sweeps fail, and how; `loses` in which a cache is lost, which one, and whether the sweep is too.
    """

    def __init__(
        self, limits: Limits, fails: dict[int, Exception], loses: dict[int, tuple[int, bool]] | None = None
    ) -> None:
        self.limits, self.fails, self.loses = limits, fails, loses or {}
        self.caches: dict[str, Cache] = {}
        self.lost: dict[str, DriveError | None] = {}
        self.set_ups = 0
        self.waiting: list[tuple[Cache, Cache]] = []
        self.last: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self.computed = self.sweeps = 0
        self.uses: set[str] = set()
        self._turn = asyncio.Lock()

    async def set_up(self) -> None:
        self.set_ups += 1
        self.caches.clear()
        self.waiting.clear()
        self.lost.clear()

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        async with self._turn:
            gone, self.lost = self.lost, {}
            for name, count in request.cut:
                if name in gone:
                    continue
                cache = self.caches[name]
                assert 0 < count <= len(cache.own), "a cut to more than there is"
                self._cut(cache, count)
                cache.capacity = count
            for name in request.drop:
                self.caches.pop(name, None)
            await asyncio.sleep(0)
            self.sweeps += 1
            if (failure := self.fails.pop(self.sweeps, None)) is not None:
                for step in request.steps:
                    self.caches.pop(step.sequence, None)
                if isinstance(failure, WorkerLostError):
                    self.caches.clear()
                raise failure
            left_out = {step.sequence for step in request.steps if step.follows and self._has_ended(step)}
            left_out |= {s.sequence for s in request.steps if s.spec is None and s.sequence not in self.caches}
            for step in request.steps:
                points: dict[str, DriveError | None] = {point.name: None for point in step.keep}
                if step.sequence in left_out:
                    self.lost |= points
                elif any(part.sequence in gone or part.sequence in self.lost for part in step.prefix):
                    self.lost |= {step.sequence: None, **points}
                    left_out.add(step.sequence)
                elif step.spec is not None:
                    gone.pop(step.sequence, None)
            steps = [step for step in request.steps if step.sequence not in left_out]
            for step in steps:
                for part in step.prefix:
                    if part.use == "take":  # what it has too much, others may get before it is taken
                        cache = self.caches[part.sequence]
                        cache.capacity = min(cache.capacity, max(_own_capacity(step), len(cache.own)))
            for step in steps:
                if step.spec is not None:
                    self._open(step)
                for point in step.keep:
                    self.uses.add("point")
                    assert point.prefix[-1].use == "window"
                    own = point.prefix[-1].num_tokens
                    self.caches[point.name] = cache = Cache(self._parts(point.prefix), own)
                    cache.packed = cache.start
                    self._give(cache, self.caches[point.prefix[-1].sequence], own)
                self._check_capacity()
            alive = {id(cache) for cache in self.caches.values()}
            for cache in self.caches.values():
                assert all(id(other) in alive for other, _ in cache.prefix), "a cache was dropped that others stand on"
            which, with_sweep = self.loses.get(self.sweeps, (-1, False))
            if with_sweep:
                self._lose(which)
            results = {step.sequence: self._compute(step) for step in steps if step.sequence not in self.lost}
            assert not self.waiting, "tokens that nobody had"
            if which >= 0 and not with_sweep:
                self._lose(which)
            return SweepResult(
                request.number,
                tuple(results.get(s.sequence, StepResult(s.sequence, left_out=True)) for s in request.steps),
                0.0, 0.0, 0, tuple(LostCache(*one) for one in self.lost.items()),
            )  # fmt: skip

    def _lose(self, which: int) -> None:
        """A cache, and all that stand on it, or await tokens of it."""
        more = sorted(self.caches)[which % len(self.caches) :][:1] if self.caches else []
        gone = list[Cache]()
        while more:
            self.lost |= dict.fromkeys(more, DriveError("a page is gone"))
            gone += [self.caches.pop(name) for name in more]
            self.waiting = [pair for pair in self.waiting if pair[0] not in gone and pair[1] not in gone]
            more = [
                name for name, cache in self.caches.items()
                if any(one is cache.source or any(one is other for other, _ in cache.prefix) for one in gone)
            ]  # fmt: skip

    def _has_ended(self, step: SequenceStep) -> bool:
        cache = self.caches.get(step.sequence)
        return cache is None or self.last[step.sequence] == -1 or len(cache.tokens()) != step.start

    def _cut(self, cache: Cache, count: int) -> None:
        """To so many tokens of its own: with the last ones at 16 bits, or without any."""
        window = self.limits.window
        if window.tokens and cache.start + count > cache.packed:
            assert window.packed(cache.start + count) >= cache.packed, "what a token needs at 16 bits is packed"
        del cache.own[count:]
        cache.packed = min(cache.packed, cache.length)

    def _parts(self, prefix: tuple[PrefixPart, ...]) -> list[tuple[Cache, int]]:
        return [(self.caches[part.sequence], part.num_tokens) for part in prefix if part.use == "share"]

    def _give(self, cache: Cache, source: Cache, count: int) -> None:
        """`cache` gets `count` tokens at 16 bits, now or when the source has computed them."""
        assert source is not cache
        stop = cache.length + count
        if source.source is not None and stop <= source.length:
            source = source.source
        if stop > source.length or source.source is not None:
            self.waiting.append((cache, source))
            cache.source = source
            cache.own += [-1] * count
            return
        assert source.packed <= cache.length, "what is to be copied at 16 bits is packed"
        cache.own += source.tokens()[cache.length : stop]
        self._begins(cache)

    def _open(self, step: SequenceStep) -> None:
        assert step.spec is not None
        shared = [part for part in step.prefix if part.use == "share"]
        capacity = _own_capacity(step)
        cache = Cache(self._parts(step.prefix), capacity)
        cache.packed = cache.start
        for part in step.prefix[len(shared) :]:
            source = self.caches[part.sequence]
            if part.use == "window":
                self._give(cache, source, part.num_tokens)
                continue
            assert part.num_tokens <= len(source.own), "tokens that are not there cannot be copied"
            assert source.source is None
            if part.use == "take":  # it stays what it is to those that have come to stand on it since it was given
                assert [(id(one), count) for one, count in source.prefix] == [(id(o), n) for o, n in cache.prefix]
                cache = self.caches.pop(part.sequence)
                self._cut(cache, part.num_tokens)
                cache.capacity = capacity
                self._begins(cache)
            else:
                assert not self.limits.window.tokens or source.start + part.num_tokens <= source.packed
                cache.own += source.own[: part.num_tokens]
                cache.packed = cache.length
        self.caches[step.sequence] = cache
        self.last[step.sequence] = -2
        self.ends[step.sequence] = len(step.spec.prompt_token_ids) + step.spec.max_tokens
        self.uses |= {part.use for part in step.prefix}
        most = prefixes_module.MOST_PARTS
        assert len(shared) <= most

    def _check_capacity(self) -> None:
        """A pool has no room for a moment that it has not got for good."""
        taken = [cache.budget(self.limits.window, self.limits.page_tokens) for cache in self.caches.values()]
        assert sum(taken) <= self.limits.kv_tokens, "more KV than the budget"
        if (places := self.limits.window.places) is not None:
            caches = self.caches.values()
            windows = sum(len(cache.own) < cache.capacity or cache.length > cache.packed for cache in caches)
            assert windows <= places, "more windows than places"

    def _begins(self, cache: Cache) -> None:
        """A cache goes on, or begins with another's tokens: no page is written before the sweep, if it is elsewhere."""
        packed = cache.packed
        cache.settle(self.limits.window)
        assert self.limits.window.places is None or cache.packed == packed, "a page would have to be written"

    def _compute(self, step: SequenceStep) -> StepResult:
        assert step.num_tokens > 0
        name, cache = step.sequence, self.caches[step.sequence]
        assert cache.source is None, "tokens that are not there yet"
        assert all(count <= len(other.own) for other, count in cache.prefix), "a prefix that is not there yet"
        if self.limits.window.tokens:
            assert all(other.start + count <= other.packed for other, count in cache.prefix), "pages that are not"
        before = cache.tokens()
        assert len(before) == step.start, "a token is missing, or there twice"
        if step.spec is not None:
            assert tuple(before) == (*step.spec.prompt_token_ids, *step.spec.generated_token_ids)[: step.start]
        cache.own += [self.last[name]] if step.follows else step.token_ids
        self.computed += step.num_tokens
        assert len(cache.own) <= cache.capacity
        for other, source in [pair for pair in self.waiting if pair[1] is cache]:
            first = other.start
            assert first >= cache.packed, "what is to be copied at 16 bits is packed"
            other.own, other.source = cache.tokens()[first : other.length], None
            assert -1 not in other.own, "tokens that are not there yet"
            assert first + len(other.own) <= cache.length
            self._begins(other)
            self.waiting.remove((other, source))
        cache.settle(self.limits.window)
        if step.logits == "all":
            assert not step.prefix
            return StepResult(name, logits=np.zeros((step.num_tokens, 1), np.float32))
        if not step.sample:
            return StepResult(name)
        tokens = cache.tokens()
        self.last[name] = token = chosen(tokens)
        reason = "stop" if token == 0 else "length" if len(tokens) + 1 == self.ends[name] else None
        if reason:
            self.last[name] = -1
        return StepResult(name, token, finish_reason=reason)  # type: ignore[arg-type]


def _own_capacity(step: SequenceStep) -> int:
    return step.capacity - sum(part.num_tokens for part in step.prefix if part.use == "share")


@dataclass(frozen=True)
class Request:
    """`wait` events after the one before: a prompt that goes on behind `tokens` of what request `behind` had."""

    wait: int
    behind: int
    tokens: int
    more: tuple[int, ...]
    max_tokens: int
    n: int
    abort_after: int | None
    score: bool


requests = st.builds(
    Request,
    wait=st.integers(0, 12),
    behind=st.integers(0, 8),
    tokens=st.integers(0, 40),
    more=st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple),
    max_tokens=st.integers(1, 9),
    n=st.sampled_from([1, 1, 1, 3]),
    abort_after=st.none() | st.none() | st.integers(0, 6),
    score=st.sampled_from([False] * 9 + [True]),
)


async def play(worker: Worker, script: list[Request], limits: Limits) -> SchedulingLoop:
    """Submit and abort as the script says; who is not disturbed must get what it would get alone."""
    loop = SchedulingLoop(worker.run_sweep, worker.set_up, limits, ahead_s=1.0)
    task = asyncio.get_running_loop().create_task(loop.run())
    events: list[TokenEvent] = []
    said: list[tuple[int, ...]] = []
    got: dict[tuple[str, int], list[int]] = {}
    open_samples: set[tuple[str, int]] = set()
    aborts: dict[int, str] = {}
    disturbed: set[str] = set()

    async def hear(count: int) -> None:
        for _ in range(count):
            if not open_samples or task.done():
                return
            news = await loop.poll("c", events[-1].number if events else 0, 5.0)
            assert news, "nobody gets on"
            events.extend(news)
            for event in news:
                key = (event.request_id, event.index)
                if event.result.token_id is not None:
                    got.setdefault(key, []).append(event.result.token_id)
                if event.result.finish_reason is not None or event.error is not None:
                    open_samples.discard(key)
                if event.error is not None:  # one of `fails`, and not an assertion of the worker's
                    assert isinstance(event.error, DriveError), event.error
                    disturbed.add(event.request_id)
            for at in [at for at in aborts if at <= len(events)]:
                disturbed.add(name := aborts.pop(at))
                loop.abort("c", [name])

    wanted: dict[str, tuple[tuple[int, ...], int]] = {}
    for number, request in enumerate(script):
        await hear(request.wait)
        before = said[request.behind % len(said)] if said else ()
        prompt = before[: request.tokens] + request.more
        most = max(1, min(request.max_tokens, limits.longest - len(prompt)))
        prompt = prompt[: limits.longest - most]
        name = str(number)
        wanted[name] = prompt, most
        said.append(prompt + tuple(continuation(prompt, most)))
        params = SamplingParams(max_tokens=most, n=1 if request.score else request.n)
        if request.abort_after is not None:
            aborts[len(events) + request.abort_after] = name
        if request.score:
            disturbed.add(name)
        open_samples |= {(name, index) for index in range(params.n)}
        loop.submit("c", [RequestSpec(name, prompt, params, 0, most, request.score)])
    await hear(10_000)
    task.cancel()
    if task.done() and not task.cancelled():
        task.result()
    for name, (prompt, most) in wanted.items():
        if name not in disturbed:
            samples = [tokens for (one, _), tokens in got.items() if one == name]
            assert samples
            assert all(tokens == continuation(prompt, most) for tokens in samples)
    return loop


def admit_all_that_fit(
    waiting: deque[Sequence], running: list[Sequence], limits: Limits, prefixes: PrefixCache
) -> None:
    """As `admit`; and nobody must wait who would not have to if nothing were shared or kept."""
    admit(waiting, running, limits, prefixes)
    if waiting and len(running) < limits.max_sequences:
        alone = [replace(sequence, shared=0, to_keep=0, points=0) for sequence in [*running, waiting[0]]]
        assert sum(map(limits.reserved, alone)) > limits.kv_tokens


failures = st.dictionaries(st.integers(1, 25), st.sampled_from([WorkerLostError(), DriveError("away")]), max_size=2)
losses = st.dictionaries(st.integers(1, 25), st.tuples(st.integers(0, 9), st.booleans()), max_size=3)
