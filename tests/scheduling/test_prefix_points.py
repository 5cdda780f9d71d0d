"""Prefixes in packed pages, with the last tokens at 16 bits: where a sequence may begin, against a worker that holds
tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling.prefix_worker import Request, Worker, admit_all_that_fit, failures, losses, play, requests

from pipo_ray.messages import SequenceStep
from pipo_ray.model.batch import PrefixPart
from pipo_ray.params import SamplingParams
from pipo_ray.scheduling import loop as loop_module
from pipo_ray.scheduling import prefixes as prefixes_module
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.policy import admit, form_batch
from pipo_ray.scheduling.prefixes import PrefixCache
from pipo_ray.scheduling.sequences import Sequence
from pipo_ray.scheduling.window import Room, Window

LONG = tuple(range(100, 2100))
PAGES = Window(128, 64, 2.5)


def sequence(name: str, *tokens: int) -> Sequence:
    return Sequence(name, name, "c", 0, tokens, SamplingParams(), 0, max_tokens=8)


def run(books: PrefixCache, *sequences: Sequence) -> list[SequenceStep]:
    """Compute their prompts, together; their steps."""
    limits = Limits(kv_tokens=50_000, max_batch_tokens=50_000, sharing="shared", window=PAGES)
    running: list[Sequence] = []
    admit(deque(sequences), running, limits, books)
    assert running == list(sequences)
    steps = form_batch(running, limits, books)
    for one in sequences:
        one.cached = one.length
    return steps


def told(parts: Iterable[PrefixPart]) -> list[tuple[str, int, str]]:
    return [(part.sequence, part.num_tokens, part.use) for part in parts]


def test_who_parts_from_another_leaves_a_point_on_which_the_next_begin() -> None:
    """Behind 1000 tokens, where the first one has no tokens at 16 bits any more. The pages are in common then."""
    books = PrefixCache("shared", window=PAGES)
    a, b, c, d = (sequence(name, *LONG[:1000], *range(number, number + 500)) for number, name in enumerate("abcd"))
    (step,) = run(books, a)
    assert [one.prefix[-1].num_tokens for one in step.keep] == [1499 - 1344]  # at its end
    books.end(a)
    (step,) = run(books, b)
    assert step.prefix == ()
    points = {sum(part.num_tokens for part in one.prefix): one for one in step.keep}
    assert set(points) == {1000, 1499}
    assert told(points[1000].prefix) == [("b", 832, "share"), ("b", 168, "window")]
    both = run(books, c, d)
    for one in both:
        assert told(one.prefix) == [("b", 832, "share"), (points[1000].name, 168, "window")]
        assert [sum(part.num_tokens for part in point.prefix) for point in one.keep] == [1499]
    books.end(b)
    books.end(c)
    books.end(d)
    assert books.make_room(books.held)
    assert books.held == Room()


def test_behind_whoever_is_computed_in_the_same_sweep_others_begin_anywhere() -> None:
    books = PrefixCache("shared", window=PAGES)
    steps = run(books, sequence("a", *LONG), sequence("b", *LONG[:700], 1), sequence("c", *LONG[:300], *range(90)))
    assert [told(step.prefix)[0] for step in steps[1:]] == [("a", 512, "share"), ("a", 128, "share")]
    # Points were kept there, which was known when they were admitted; who comes next finds them.
    assert [sum(part.num_tokens for part in point.prefix) for point in steps[0].keep] == [300, 700, 1999]
    steps = run(books, sequence("d", *LONG[:700], 2), sequence("e", *LONG[:300], *range(50), 1))
    assert [told(step.prefix)[0] for step in steps] == [("a", 512, "share"), ("a", 128, "share")]


def test_a_chat_goes_on_with_its_cache_where_it_has_ended() -> None:
    books = PrefixCache("shared", window=PAGES)
    a = sequence("a", *LONG[:250])
    run(books, a)
    books.end(a)
    (step,) = run(books, sequence("b", *LONG[:400]))
    assert told(step.prefix) == [("a", 250, "take")]


def test_what_is_not_at_16_bits_any_more_is_computed_again() -> None:
    """The other one's last 190 of 318 tokens would be needed, of which it has 126."""
    books = PrefixCache("shared", window=PAGES)
    a = sequence("a", *LONG[:320])
    run(books, a)
    books.end(a)
    assert run(books, sequence("b", *LONG[:318], 1))[0].prefix == ()
    assert told(run(books, sequence("c", *LONG[:321]))[0].prefix) == [("a", 320, "take")]


def test_a_short_prompt_leaves_no_point_at_its_end() -> None:
    """It would take more than what it spares."""
    (step,) = run(PrefixCache("shared", window=PAGES), sequence("a", *LONG[:700]))
    assert step.keep == ()


WINDOWS = [Window(tokens, page, share) for tokens, page in ((2, 1), (4, 2), (4, 4)) for share in (0.5, 2.7)]


@hypothesis.settings(max_examples=100, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=9),
    st.sampled_from(WINDOWS),
    st.integers(40, 250),
    st.integers(1, 24),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 3]),
    failures,
)
def test_random_clients(
    script: list[Request],
    window: Window,
    kv_tokens: int,
    batch_tokens: int,
    most_parts: int,
    least_kept: int,
    fails: dict[int, Exception],
) -> None:
    """As with keys and values that are all alike; and what a token is to see at 16 bits, it finds at 16 bits."""
    limits = limits_with(window, kv_tokens, batch_tokens)
    check(Worker(limits, dict(fails)), script, most_parts, least_kept, admit_all_that_fit)


def check(worker: Worker, script: list[Request], most_parts: int, least_kept: int, admits: Callable[..., None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes_module, "LEAST_SHARED", 3)
        patch.setattr(prefixes_module, "LEAST_KEPT", least_kept)
        patch.setattr(prefixes_module, "MOST_PARTS", most_parts)
        patch.setattr(loop_module, "admit", admits)
        asyncio.run(asyncio.wait_for(play(worker, script, worker.limits), 60))


@hypothesis.settings(max_examples=100, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=9), st.sampled_from([(2, 1), (4, 2), (4, 4)]), st.integers(1, 7),
    st.sampled_from([1, 1, 3]), st.integers(40, 250), st.integers(1, 24), st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 3]), failures, losses,
)  # fmt: skip
def test_random_clients_where_windows_have_places_of_their_own(
    script: list[Request], window: tuple[int, int], places: int, pages: int, kv_tokens: int, batch_tokens: int,
    most_parts: int, least_kept: int, fails: dict[int, Exception], loses: dict[int, tuple[int, bool]],
) -> None:  # fmt: skip
    """And pages move: none is written before a sweep, one may hold several packed ones, and some are lost."""
    page_tokens = pages * window[1]
    limits = Limits(
        kv_tokens // page_tokens * page_tokens, batch_tokens, max_sequences=min(5, places), page_tokens=page_tokens,
        sharing="shared", window=Window(*window, places=places), copies=False,
    )  # fmt: skip
    worker = Worker(limits, dict(fails), loses)
    # A page that is shared in part is one more.
    check(worker, script, most_parts, least_kept, admit_all_that_fit if pages == 1 else admit)
    assert worker.set_ups <= 1 + len(fails) - len(worker.fails)


def limits_with(window: Window, kv_tokens: int, batch_tokens: int) -> Limits:
    state = window.budget(0, window.tokens + window.page_tokens) - window.tokens
    return Limits(
        kv_tokens, batch_tokens, max_sequences=5, state_tokens=state, sharing="shared", window=window
    )  # fmt: skip
