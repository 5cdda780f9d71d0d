"""Who takes part in the next sweep: what holds for every queue and every limit."""

from __future__ import annotations

from collections import deque
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.params import SamplingParams
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.policy import admit, form_batch
from pipo_ray.scheduling.sequences import Sequence


def sequence(name: str, prompt: int, max_tokens: int = 8, *, generated: int = 0, cached: int = 0) -> Sequence:
    return Sequence(
        name=name, request_id=name, client="c", index=0, prompt=tuple(range(prompt)), params=SamplingParams(), seed=0,
        max_tokens=max_tokens, generated=list(range(100, 100 + generated)), cached=cached,
    )  # fmt: skip


@st.composite
def sequences(draw: st.DrawFn) -> list[Sequence]:
    """Running sequences as they can be: fresh, in the middle of their prompt, decoding, or with a cache to rebuild."""
    made = []
    for number in range(draw(st.integers(1, 8))):
        prompt, most = draw(st.integers(1, 40)), draw(st.integers(1, 12))
        generated = draw(st.integers(0, most - 1))
        cached = draw(st.sampled_from([0, prompt + generated - 1, draw(st.integers(0, prompt - 1))]))
        made.append(sequence(str(number), prompt, most, generated=generated, cached=cached))
    return made


limits = st.builds(
    lambda **fields: Limits(kv_tokens=10_000, **fields),
    max_batch_tokens=st.integers(1, 48),
    chunked=st.booleans(),
    rebuild_length=st.none() | st.integers(1, 40),
)


@given(sequences(), limits)
def test_a_sweep(running: list[Sequence], limits: Limits) -> None:
    was_decoding = {
        one.name
        for one in running
        if one.decoding and not (limits.rebuild_length is not None and one.cached <= limits.rebuild_length < one.length)
    }
    steps = form_batch(running, limits)
    by_name = {one.name: one for one in running}
    assert steps, "something runs, and nothing is done"
    assert len({step.sequence for step in steps}) == len(steps)
    decoding = [step for step in steps if step.sequence in was_decoding]
    prompts = [step for step in steps if step.sequence not in was_decoding]
    assert steps == decoding + prompts, "decode steps come first"
    assert all(len(step.token_ids) == 1 for step in decoding)
    for step in steps:
        one = by_name[step.sequence]
        assert step.start == one.cached
        assert step.token_ids == one.tokens(step.start, step.start + len(step.token_ids))
        assert step.sample == (step.start + len(step.token_ids) == one.length)
        assert (step.spec is not None) == (step.start == 0)
        if not limits.chunked:
            assert step.sample, "a prompt that may not be split comes whole"
    # Only a prompt that may not be split, and that alone, or the decoding ones may be more than a sweep's tokens.
    if prompts and (limits.chunked or len(steps) > 1) and len(decoding) < limits.max_batch_tokens:
        assert sum(len(step.token_ids) for step in steps) <= limits.max_batch_tokens


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=10), st.integers(1, 200))
def test_never_more_is_admitted_than_the_kv_cache_can_hold(sizes: list[tuple[int, int]], kv_tokens: int) -> None:
    waiting = deque(sequence(str(number), *size) for number, size in enumerate(sizes))
    before, running = list(waiting), []  # type: ignore[var-annotated]
    admit(waiting, running, Limits(kv_tokens=kv_tokens, max_batch_tokens=16))
    reserved = sum(one.capacity for one in running)
    assert reserved <= kv_tokens
    assert running + list(waiting) == before, "first come, first served"
    if waiting:
        assert reserved + waiting[0].capacity > kv_tokens


@hypothesis.settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=6), limits)
def test_everything_ends(sizes: list[tuple[int, int]], limits: Limits) -> None:
    """Sweeps as the loop runs them: every sequence gets all its tokens, each position is computed in order; and a cache
    that had room for all that could come is full, so there is nothing to move when it is cut to what is in it.
    """
    # A split prompt that crosses the rebuild length would begin anew for ever; no model has both.
    hypothesis.assume(not (limits.chunked and limits.rebuild_length is not None))
    waiting = deque(sequence(str(number), *size) for number, size in enumerate(sizes))
    running: list[Sequence] = []
    sweeps = 0
    while waiting or running:
        sweeps += 1
        assert sweeps < 1000
        admit(waiting, running, limits)
        for step in form_batch(running, limits):
            one = next(one for one in running if one.name == step.sequence)
            one.cached = step.start + len(step.token_ids)
            if step.sample:
                one.generated.append(sweeps)
                if len(one.generated) == one.max_tokens:
                    assert one.cached == step.capacity
                    running.remove(one)


@pytest.mark.parametrize(
    "decoding, prompt, wanted",
    [
        (59, 50, None),  # 5 tokens are left, the least chunk is 8: the prompt waits
        (56, 50, 8),
        (59, 5, 5),  # all of it is no chunk
        (0, 50, 50),
        (0, 100, 64),
    ],
)
def test_no_chunk_is_so_small_that_it_only_delays(decoding: int, prompt: int, wanted: int | None) -> None:
    running = [sequence(f"d{number}", 4, generated=1, cached=4) for number in range(decoding)]
    running.append(sequence("prompt", prompt))
    steps = {step.sequence: len(step.token_ids) for step in form_batch(running, Limits(kv_tokens=9999, **SIXTY_FOUR))}
    assert steps.get("prompt") == wanted


SIXTY_FOUR: dict[str, Any] = {"max_batch_tokens": 64, "chunked": True}


@pytest.mark.parametrize("cached, length, begins", [(20, 21, 0), (19, 20, 19), (21, 22, 21), (10, 30, 0), (0, 30, 0)])
def test_a_sequence_that_crosses_the_rebuild_length_begins_anew(cached: int, length: int, begins: int) -> None:
    one = sequence("a", length - 2, generated=2, cached=cached)
    (step,) = form_batch([one], Limits(kv_tokens=999, max_batch_tokens=64, rebuild_length=20))
    assert step.start == begins
    assert (step.spec is not None) == (begins == 0)


@pytest.mark.parametrize(("page_tokens", "admitted"), [(1, ["a", "b", "c"]), (64, ["a", "b"])])
def test_a_sequence_takes_whole_pages(page_tokens: int, admitted: list[str]) -> None:
    """65 + 1 + 62 tokens fit 128 exactly; in pages of 64 they are 2 + 1 + 1, and 192 is too little."""
    waiting = deque([sequence("a", 60, 5), sequence("b", 0, 1), sequence("c", 50, 12)])
    running: list[Sequence] = []
    tokens = 192 if page_tokens == 64 else 128
    admit(waiting, running, Limits(kv_tokens=tokens, max_batch_tokens=8, page_tokens=page_tokens))
    assert [one.name for one in running] == admitted
