"""Sequences that begin on others' KV: logits as if each had been computed from its first token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from architectures import BY_SLUG
from exact_kernel import exact_kernel
from harness import PackedModel, Pipeline, pack_checkpoint, random_prompts, relative_errors
from hypothesis import given
from hypothesis import strategies as st
from prefix_runs import Stage, answers, conversations, step

import pipo_ray
from pipo_ray.model import attention
from pipo_ray.model.batch import PrefixUse
from pipo_ray.model.fused_rows import attend_row
from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.runner import OutOfStepError
from pipo_ray.model.text import encode_prompt, render_chat
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.scheduling.limits import Limits

TOLERANCE = 1e-5
BUNDLED = Path(pipo_ray.__file__).with_name("bundled")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PackedModel]:
    @cache
    def pack(slug: str) -> PackedModel:
        folder = tmp_path_factory.mktemp(slug)
        BY_SLUG[slug].save(folder / "checkpoint")
        return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32)

    return pack


def close(got: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert got is not None
    assert max(relative_errors(got, wanted)) < TOLERANCE


Way = Literal["cpu", "pool", "pool at once"]
"""Where caches are and how a row attends: as on the CPU; in a pool, one by one; with a kernel for the whole row."""


@contextmanager
def pipeline_in(way: Way, model: PackedModel, kv_tokens: int) -> Iterator[Pipeline]:
    calls: list[int] = []

    def kernel(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return exact_kernel(*arguments, **options)

    def can_attend(_query: object, _values: object, softcap: object, sinks: object) -> bool:
        return way == "pool at once" and softcap is None and sinks is None

    with (
        pytest.MonkeyPatch.context() as patch,
        Pipeline(
            model, slot_bytes=1 << 20, resident_pieces=None, kv_pool=None if way == "cpu" else kv_tokens
        ) as pipeline,
    ):
        patch.setattr(attention, "attend_row", partial(attend_row, kernel=kernel))
        patch.setattr(attention, "can_attend", can_attend)
        yield pipeline
    assert bool(calls) == (way == "pool at once")


@pytest.mark.parametrize(
    ("slug", "way"),
    [
        *((slug, way) for slug in ("llama", "gemma2", "gpt-oss") for way in ("cpu", "pool")),
        *((slug, "pool at once") for slug in ("llama", "mistral")),
    ],
)  # plain; windows and a soft cap; sinks; windows
def test_logits_behind_a_prefix(packed: Callable[[str], PackedModel], slug: str, way: Way) -> None:
    """A line of three caches, in the sweep that computes a part of it and behind it; a copy; and a cache that is
    taken.
    """
    model = packed(slug)
    (tokens,) = random_prompts(model.facts.vocab_size, (90,))
    other = tokens[:50] + random_prompts(model.facts.vocab_size, (40,), seed=6)[0]
    with pipeline_in(way, model, 400) as pipeline:
        run = pipeline.runner.run
        (wanted,), (wanted_other,) = (run([step("x", one, 0, 90)]) for one in (tokens, other))
        assert wanted is not None
        assert wanted_other is not None
        pipeline.runner.drop(["x"])
        run([step("a", tokens, 0, 30)])
        # b begins in the sweep that computes some of what it begins with
        _, got = run([step("a", tokens, 30, 50), step("b", other, 41, 60, (("a", 41, "share"),))])
        close(got, wanted_other[41:60])
        line: tuple[tuple[str, int, PrefixUse], ...] = (("a", 41, "share"), ("b", 15, "share"))
        got_a, got_c = run([step("a", tokens, 50, 51), step("c", other, 56, 70, line)])
        close(got_a, wanted[50:51])
        close(got_c, wanted_other[56:70])
        (got_c,) = run([step("c", other, 70, 71)])
        close(got_c, wanted_other[70:71])
        (got,) = run([step("d", other, 56, 90, (("a", 41, "copy"), ("b", 15, "copy")))])
        close(got, wanted_other[56:])
        pipeline.runner.cut([("a", 45), ("d", 80)])
        assert pipeline.runner.length("a") == 45
        (got,) = run([step("e", other, 70, 90, (("d", 70, "take"),))])
        close(got, wanted_other[70:])
        with pytest.raises(OutOfStepError, match="d: there is no cache"):
            run([step("f", other, 70, 90, (("d", 70, "take"),))])
        (got_c,) = run([step("c", other, 71, 90)])  # its line is still there
        close(got_c, wanted_other[71:])
        (got_a,) = run([step("e", tokens, 45, 90, (("a", 45, "take"),))])  # which stood before others, if in a pool
        close(got_a, wanted[45:])
        pipeline.runner.drop_all()
        assert pipeline.runner.cache_bytes == 0


def test_what_is_taken_gives_back_first_what_it_has_too_much(packed: Callable[[str], PackedModel]) -> None:
    """To those who begin before, in a pool that has no room for both."""
    model = packed("llama")
    tokens, other = random_prompts(model.facts.vocab_size, (15, 7))
    with pipeline_in("pool", model, 20) as pipeline:
        run = pipeline.runner.run
        run([step("a", tokens, 0, 5)])
        run([step("b", other, 0, 7), step("c", tokens[:12], 5, 12, (("a", 5, "take"),))])
        assert [pipeline.runner.length(name) for name in "abc"] == [0, 7, 12]


@pytest.mark.parametrize(
    ("slug", "way", "kv_tokens", "seed"),
    [
        ("llama", "cpu", 600, 3),
        ("llama", "pool", 600, 4),
        ("gemma2", "cpu", 240, 5),
        ("mistral", "pool at once", 240, 6),
        *(
            pytest.param(slug, way, kv_tokens, seed, marks=pytest.mark.slow)
            for slug, way in (
                ("llama", "cpu"),
                ("gpt-oss", "cpu"),
                ("llama", "pool"),
                ("gpt-oss", "pool"),
                ("llama", "pool at once"),
                ("mistral", "pool at once"),
            )
            for kv_tokens in (240, 400, 2000)
            for seed in range(10, 14)
        ),
    ],
)
def test_greedy_tokens_never_change(
    packed: Callable[[str], PackedModel], slug: str, way: Way, kv_tokens: int, seed: int
) -> None:
    """With little KV, too, where what has ended is given up for those that wait."""
    model = packed(slug)
    turns = conversations(model.facts.vocab_size, seed)
    bounds: dict[str, Any] = {"kv_tokens": kv_tokens, "max_batch_tokens": 64}
    with pipeline_in(way, model, kv_tokens) as pipeline:
        alone, together = Stage(pipeline), Stage(pipeline)
        wanted = asyncio.run(answers(alone, Limits(**bounds), turns))
        got = asyncio.run(answers(together, Limits(**bounds, sharing="shared"), turns))
    assert got == wanted
    assert together.computed < (0.8 if kv_tokens < 600 else 0.5) * alone.computed
    assert {"share", "take"} <= together.uses


def test_a_chat_tells_what_was_said_as_it_was() -> None:
    """Tokens of the bundled model's template: what was sent before, the answer, and what comes behind it."""
    tokenizer = load_tokenizer(BUNDLED)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a whale?"}]

    def told() -> list[int]:
        return encode_prompt(tokenizer, render_chat(tokenizer, messages), 1 << 20, None, add_special_tokens=False)

    before = told()
    answer = "A whale is a large animal that lives in the sea."
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And a shark?"}]
    generated = encode_prompt(tokenizer, answer, 1 << 20, None, add_special_tokens=False)
    assert told()[: len(before) + len(generated)] == before + generated


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 1000))
def test_attention_over_a_line_of_caches(counts: list[int], new: int, seed: int) -> None:
    """As over one cache that holds the same keys and values."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts) + new

    def rand(heads: int) -> torch.Tensor:
        return torch.randn(heads, total, 8, generator=generator)

    query, keys, values = rand(4), rand(2), rand(2)
    prefix: tuple[tuple[SequenceCache, int], ...] = ()
    at = 0
    for count in counts:  # each has one token more than the next one begins on
        cache = SequenceCache(count + 1, prefix=prefix)
        cache.append(0, keys[:, at : at + count + 1], values[:, at : at + count + 1])
        prefix += ((cache, count),)
        at += count
    rule = AttentionRule(8**-0.5, sliding_window=7)
    own = slice(at, total)
    got = SequenceCache(new, prefix=prefix).attend(0, query[:, own], keys[:, own], values[:, own], rule)
    whole = SequenceCache(total)
    whole.append(0, keys[:, :at], values[:, :at])
    whole.advance(at)
    wanted = whole.attend(0, query[:, own], keys[:, own], values[:, own], rule)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
