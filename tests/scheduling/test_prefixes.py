"""Prefixes that are there already: the books of the compute worker's caches, against a worker that holds tokens."""

from __future__ import annotations

import asyncio

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling.prefix_worker import (
    Request,
    Worker,
    admit_all_that_fit,
    continuation,
    failures,
    losses,
    play,
    requests,
)

from pipo_ray.params import SamplingParams
from pipo_ray.scheduling import loop as loop_module
from pipo_ray.scheduling import prefixes as prefixes_module
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.policy import form_batch
from pipo_ray.scheduling.prefix_search import common_tokens
from pipo_ray.scheduling.prefixes import LEAST_SHARED, PrefixCache, Sharing
from pipo_ray.scheduling.sequences import Sequence
from pipo_ray.scheduling.window import Room


@given(st.lists(st.integers(0, 1), max_size=30), st.lists(st.integers(0, 1), max_size=30), st.integers(0, 30))
def test_common_tokens(one: list[int], other: list[int], shared: int) -> None:
    other = one[:shared] + other
    wanted = 0
    while wanted < min(len(one), len(other)) and one[wanted] == other[wanted]:
        wanted += 1
    assert common_tokens(tuple(one), tuple(other)) == wanted


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


def test_a_cache_is_taken_where_only_parts_of_a_page_are_lost() -> None:
    """36 tokens behind a whole page, which nobody could share."""
    for tokens, wanted in ((64, [("a", 64, "take")]), (1, [("a", 60, "share")])):
        books = PrefixCache("shared", page_tokens=tokens)
        a = sequence("a", *LONG)
        run(books, a)
        books.end(a)
        common = 64 if tokens == 64 else 60
        assert run(books, sequence("b", *LONG[:common], 5, 5)) == [wanted]


def test_without_copies_a_prefix_in_too_many_parts_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes_module, "MOST_PARTS", 1)
    for copies, wanted in ((True, [("a", 40, "copy"), ("b", 40, "copy")]), (False, [])):
        books = PrefixCache("shared", copies=copies)
        a, b = sequence("a", *LONG), sequence("b", *LONG[:40], *range(200, 280))
        assert run(books, a, b) == [[], [("a", 40, "share")]]
        assert run(books, sequence("c", *LONG[:40], *range(200, 240), 1, 2)) == [wanted]


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
    assert books.held == Room(300)
    assert books.make_room(Room(1))
    assert books.changes() == (("b",), ())
    assert not books.make_room(Room(141))
    assert books.make_room(Room(140))
    assert books.changes() == (("c",), (("a", 60),))
    assert books.held == Room(60)


# -- random clients
# --------------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=150, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=9),
    st.sampled_from(["shared", "shared", "none"]),
    st.integers(20, 90),
    st.integers(1, 24),
    st.sampled_from([1, 1, 4]),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    failures,
    losses,
)
def test_random_clients(
    script: list[Request],
    sharing: Sharing,
    kv_tokens: int,
    batch_tokens: int,
    page_tokens: int,
    most_parts: int,
    copies: bool,
    fails: dict[int, Exception],
    loses: dict[int, tuple[int, bool]],
) -> None:
    """Whatever arrives, ends, is aborted, lost or fails: the worker finds every token where it is told that it is,
    never has more than the budget, nobody's tokens change, and what is lost is no reason to begin anew for others.
    """
    kv_tokens = kv_tokens // page_tokens * page_tokens
    limits = Limits(kv_tokens, batch_tokens, max_sequences=5, page_tokens=page_tokens, sharing=sharing, copies=copies)
    worker = Worker(limits, dict(fails), loses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes_module, "LEAST_SHARED", 3)
        patch.setattr(prefixes_module, "MOST_PARTS", most_parts)
        patch.setattr(loop_module, "admit", admit_all_that_fit)
        asyncio.run(asyncio.wait_for(play(worker, script, limits), 60))
    assert copies or "copy" not in worker.uses
    assert worker.set_ups <= 1 + len(fails) - len(worker.fails)


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
