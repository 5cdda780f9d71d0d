"""Prefixes that are there already: the books of the compute worker's caches, against a worker that holds tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import DriveError, WorkerLostError
from pipo_ray.messages import RequestSpec, SequenceStep, StepResult, SweepRequest, SweepResult, TokenEvent
from pipo_ray.params import SamplingParams
from pipo_ray.scheduling import loop as loop_module
from pipo_ray.scheduling import prefixes as prefixes_module
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import SchedulingLoop
from pipo_ray.scheduling.policy import admit, form_batch
from pipo_ray.scheduling.prefixes import LEAST_SHARED, PrefixCache, Sharing, _common
from pipo_ray.scheduling.sequences import Sequence


@given(st.lists(st.integers(0, 1), max_size=30), st.lists(st.integers(0, 1), max_size=30), st.integers(0, 30))
def test_common_tokens(one: list[int], other: list[int], shared: int) -> None:
    other = one[:shared] + other
    wanted = 0
    while wanted < min(len(one), len(other)) and one[wanted] == other[wanted]:
        wanted += 1
    assert _common(tuple(one), tuple(other)) == wanted


# -- single decisions
# --------------------------------------------------------------------------------------------------------------

LONG = tuple(range(100, 200))


def sequence(name: str, *tokens: int) -> Sequence:
    return Sequence(name, name, "c", 0, tokens, SamplingParams(), 0, max_tokens=8)


def run(books: PrefixCache, *sequences: Sequence) -> list[list[tuple[str, int, str]]]:
    """Compute their prompts, together; what each begins on."""
    limits = Limits(kv_tokens=10_000, max_batch_tokens=1000)
    steps = form_batch(list(sequences), limits, books)
    for one in sequences:
        one.cached = one.length
    return [[(part.sequence, part.num_tokens, part.use) for part in step.prefix] for step in steps]


def test_samples_share_in_the_sweep_that_computes_their_prompt() -> None:
    assert run(PrefixCache("shared"), *(sequence(name, *LONG) for name in "abc")) == [
        [], [("a", 99, "share")], [("a", 99, "share")],
    ]  # fmt: skip


def test_what_a_copy_is_made_of_is_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix in more parts than attention is to read from."""
    monkeypatch.setattr(prefixes_module, "MOST_PARTS", 1)
    books = PrefixCache("shared")
    a, b, c = sequence("a", *LONG), sequence("b", *LONG[:50], *range(40)), sequence("c", *LONG[:50], *range(40), 1)
    assert run(books, a, b, c) == [[], [("a", 50, "share")], []]
    books.end(c)
    assert run(books, sequence("d", *LONG[:50], *range(35), 2)) == [[("a", 50, "copy"), ("b", 35, "copy")]]


@pytest.mark.parametrize(("behind", "wanted"), [(1, [("a", 90, "take")]), (50, [("a", 90, "share")])])
def test_who_goes_on_where_another_has_ended_takes_its_cache(behind: int, wanted: list[tuple[str, int, str]]) -> None:
    """Unless that has more tokens than it is well to lose."""
    books = PrefixCache("shared")
    a = sequence("a", *LONG[:90], *range(behind))
    run(books, a)
    books.end(a)
    assert run(books, sequence("b", *LONG)) == [wanted]


def test_a_cache_on_which_others_stand_is_not_taken() -> None:
    books = PrefixCache("shared")
    a, b = sequence("a", *LONG), sequence("b", *LONG[:60], 1)
    run(books, a, b)
    books.end(a)
    assert run(books, sequence("c", *LONG, 5)) == [[("a", 100, "share")]]


def test_only_what_comes_behind_equal_tokens_is_equal() -> None:
    """c has b's last tokens, at the same positions, and is another one before."""
    books = PrefixCache("shared")
    a, b = sequence("a", *LONG[:60]), sequence("b", *LONG[:50], *range(40))
    assert run(books, a, b) == [[], [("a", 50, "share")]]
    assert run(books, sequence("c", *LONG[:40], *range(10, 20), *range(40), 1)) == [[("a", 40, "share")]]


def test_only_whole_pages_are_shared() -> None:
    books = PrefixCache("shared", page_tokens=16)
    assert run(books, sequence("a", *LONG), sequence("b", *LONG)) == [[], [("a", 96, "share")]]


def test_few_tokens_are_computed_again() -> None:
    few = LONG[: LEAST_SHARED - 1]
    assert run(PrefixCache("shared"), sequence("a", *few, 1, 2), sequence("b", *few, 3, 4)) == [[], []]


def test_what_was_used_least_recently_is_given_up_first() -> None:
    """And of what others stand on, only the rest; at last nothing, if it would not be enough."""
    books = PrefixCache("shared")
    a, b, c = (sequence(name, *(number + 1000 * place for number in LONG)) for place, name in enumerate("abc"))
    for one in (a, b, c):
        run(books, one)
        books.end(one)
    on_a = sequence("d", *a.prompt[:60], 1)
    assert run(books, on_a) == [[("a", 60, "share")]]
    books.changes()
    assert books.held == 300
    assert books.make_room(1)
    assert books.changes() == (("b",), ())
    assert not books.make_room(141)
    assert books.make_room(140)
    assert books.changes() == (("c",), (("a", 60),))
    assert books.held == 60


# -- a worker, and random clients
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """As the compute worker has it, with tokens in place of their keys and values."""

    prefix: list[tuple[Cache, int]]
    capacity: int
    own: list[int] = field(default_factory=list)

    def tokens(self) -> list[int]:
        return [token for cache, count in self.prefix for token in cache.own[:count]] + self.own


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
    says which sweeps fail, and how.
    """

    def __init__(self, limits: Limits, fails: dict[int, Exception]) -> None:
        self.limits, self.fails = limits, fails
        self.caches: dict[str, Cache] = {}
        self.last: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self.computed = self.sweeps = 0
        self.uses: set[str] = set()
        self._turn = asyncio.Lock()

    async def set_up(self) -> None:
        self.caches.clear()

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        async with self._turn:
            for name, count in request.cut:
                cache = self.caches[name]
                assert 0 < count <= len(cache.own), "a cut to more than there is"
                del cache.own[count:]
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
            steps = [step for step in request.steps if step.sequence not in left_out]
            for step in steps:
                for part in step.prefix:
                    if part.use == "take":  # what it has too much, others may get before it is taken
                        cache = self.caches[part.sequence]
                        cache.capacity = min(cache.capacity, max(_own_capacity(step), len(cache.own)))
            for step in steps:
                if step.spec is not None:
                    self._open(step)
                    self._check_capacity()
            alive = {id(cache) for cache in self.caches.values()}
            for cache in self.caches.values():
                assert all(id(other) in alive for other, _ in cache.prefix), "a cache was dropped that others stand on"
            results = {step.sequence: self._compute(step) for step in steps}
            return SweepResult(
                request.number,
                tuple(results.get(s.sequence, StepResult(s.sequence, left_out=True)) for s in request.steps),
                0.0, 0.0, 0,
            )  # fmt: skip

    def _has_ended(self, step: SequenceStep) -> bool:
        cache = self.caches.get(step.sequence)
        return cache is None or self.last[step.sequence] == -1 or len(cache.tokens()) != step.start

    def _open(self, step: SequenceStep) -> None:
        assert step.spec is not None
        shared = [part for part in step.prefix if part.use == "share"]
        capacity = _own_capacity(step)
        cache = Cache([(self.caches[part.sequence], part.num_tokens) for part in shared], capacity)
        for part in step.prefix[len(shared) :]:
            source = self.caches[part.sequence]
            assert part.num_tokens <= len(source.own), "tokens that are not there cannot be copied"
            if part.use == "take":  # it stays what it is to those that have come to stand on it since it was given
                assert [(id(one), count) for one, count in source.prefix] == [(id(o), n) for o, n in cache.prefix]
                cache = self.caches.pop(part.sequence)
                del cache.own[part.num_tokens :]
                cache.capacity = capacity
            else:
                cache.own += source.own[: part.num_tokens]
        self.caches[step.sequence] = cache
        self.last[step.sequence] = -2
        self.ends[step.sequence] = len(step.spec.prompt_token_ids) + step.spec.max_tokens
        self.uses |= {part.use for part in step.prefix}
        most = prefixes_module.MOST_PARTS
        assert len(shared) <= most

    def _check_capacity(self) -> None:
        """A pool has no room for a moment that it has not got for good."""
        pages = [-(-cache.capacity // self.limits.page_tokens) for cache in self.caches.values()]
        assert sum(pages) * self.limits.page_tokens <= self.limits.kv_tokens, "more KV than the budget"

    def _compute(self, step: SequenceStep) -> StepResult:
        assert step.num_tokens > 0
        name, cache = step.sequence, self.caches[step.sequence]
        assert all(count <= len(other.own) for other, count in cache.prefix), "a prefix that is not there yet"
        before = cache.tokens()
        assert len(before) == step.start, "a token is missing, or there twice"
        if step.spec is not None:
            assert tuple(before) == (*step.spec.prompt_token_ids, *step.spec.generated_token_ids)[: step.start]
        cache.own += [self.last[name]] if step.follows else step.token_ids
        self.computed += step.num_tokens
        assert len(cache.own) <= cache.capacity
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
        most = max(1, min(request.max_tokens, limits.kv_tokens - len(prompt)))
        prompt = prompt[: limits.kv_tokens - most]
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
        alone = [replace(sequence, shared=0) for sequence in [*running, waiting[0]]]
        assert sum(map(limits.reserved, alone)) > limits.kv_tokens


failures = st.dictionaries(st.integers(1, 25), st.sampled_from([WorkerLostError(), DriveError("away")]), max_size=2)


@hypothesis.settings(max_examples=150, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=9),
    st.sampled_from(["shared", "shared", "none"]),
    st.integers(20, 90),
    st.integers(1, 24),
    st.sampled_from([1, 1, 4]),
    st.sampled_from([1, 2, 8]),
    failures,
)
def test_random_clients(
    script: list[Request],
    sharing: Sharing,
    kv_tokens: int,
    batch_tokens: int,
    page_tokens: int,
    most_parts: int,
    fails: dict[int, Exception],
) -> None:
    """Whatever arrives, ends, is aborted or fails: the worker finds every token where it is told that it is, never has
    more than the budget, and nobody's tokens change.
    """
    kv_tokens = kv_tokens // page_tokens * page_tokens
    limits = Limits(kv_tokens, batch_tokens, max_sequences=5, page_tokens=page_tokens, sharing=sharing)
    worker = Worker(limits, dict(fails))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes_module, "LEAST_SHARED", 3)
        patch.setattr(prefixes_module, "MOST_PARTS", most_parts)
        patch.setattr(loop_module, "admit", admit_all_that_fit)
        asyncio.run(asyncio.wait_for(play(worker, script, limits), 60))


def test_who_takes_a_cache_gives_back_beforehand_what_it_has_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request ends early, with room for ten tokens more; the second one begins in the same sweep as the
    third, which takes the first one's cache, and before it: the budget holds both.
    """
    monkeypatch.setattr(prefixes_module, "LEAST_SHARED", 3)
    first, other = (0, 0, 0, 1), (2, 2, 2)
    assert continuation(first, 12) == [1, 0]
    limits = Limits(20, 24, sharing="shared")
    worker = Worker(limits, {})
    common = {"wait": 0, "n": 1, "abort_after": None, "score": False}
    script = [
        Request(behind=0, tokens=0, more=first, max_tokens=12, **common),  # type: ignore[arg-type]
        Request(behind=0, tokens=0, more=other, max_tokens=4, **common),  # type: ignore[arg-type]
        Request(behind=0, tokens=40, more=(1,), max_tokens=3, **common),  # type: ignore[arg-type]
    ]
    asyncio.run(asyncio.wait_for(play(worker, script, limits), 60))
    assert worker.uses == {"take"}
