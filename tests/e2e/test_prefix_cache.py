"""Conversations and samples through the real actors: what was computed once is not computed again, and no token
changes, whoever dies.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.outputs import RequestOutput
from pipo_ray.plan.transfer import Mode

from .checkpoints import VOCAB_SIZE, prompts_of
from .deaths import let_a_minute_pass
from .footprint import Footprint, wait_until_gone

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(text_llama: Path, mode: Mode) -> Iterator[LLM]:
    with LLM(text_llama, memory="3GiB", weight_memory="450KiB", ray_address="local", mode=mode) as llm:
        footprint = Footprint(llm._session.path, os.getpid())
        yield llm
        footprint.note()
    wait_until_gone(footprint, 2.0)


def counts(llm: LLM) -> tuple[int, int]:
    """Tokens that were computed, and that were not because they had been."""
    scheduler: dict[str, Any] = next(one for one in llm.report()["stages"] if one["stage"] == "Scheduler")
    return scheduler["tokens_computed"], scheduler["tokens_reused"]


def check_greedy(llm: LLM, output: RequestOutput) -> None:
    """Each token is the most probable one behind those before it, computed without any prefix."""
    prompt = list(output.prompt_token_ids)
    for sample in output.outputs:
        (logits,) = llm.score([prompt + sample.token_ids])
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == sample.token_ids


def turn(llm: LLM, history: Sequence[int], seed: int) -> list[int]:
    """Another turn of the conversation; the history after it."""
    return turn_with_a_death(llm, history, seed, victim=None)[0]


def turn_with_a_death(llm: LLM, history: Sequence[int], seed: int, victim: str | None) -> tuple[list[int], bool]:
    """Another turn of the conversation, in which `victim` dies behind the fourth token: the history after it, and
    whether another process had its place at the last token. If none had, it died behind that, with nothing to do, and
    what it kept is lost.
    """
    prompt = [*history, *prompts_of((9,), VOCAB_SIZE, seed)[0]]
    pid = llm.pids().get(victim or "")
    output, killed, replaced = None, False, False
    for output in llm.stream([prompt], GREEDY):
        if pid is not None and victim is not None:
            replaced = llm.pids()[victim] != pid
            if not killed and len(output.outputs[0].token_ids) >= 4:
                os.kill(pid, signal.SIGKILL)
                killed = True
    assert output is not None
    check_greedy(llm, output)
    return prompt + output.outputs[0].token_ids, replaced


def test_a_conversation_goes_on_where_it_was(llm: LLM) -> None:
    history = turn(llm, prompts_of((50,), VOCAB_SIZE)[0], 1)
    for seed in range(2, 5):
        computed, reused = counts(llm)
        before = len(history)
        history = turn(llm, history, seed)
        now_computed, now_reused = counts(llm)
        assert now_reused - reused == before - 1, "all but the last token, which was chosen and never computed"
        scored = len(history)
        assert now_computed - computed - scored == len(history) - before


def test_samples_have_their_prompt_in_common(llm: LLM) -> None:
    (prompt,) = prompts_of((80,), VOCAB_SIZE, seed=7)
    computed, reused = counts(llm)
    (output,) = llm.generate([prompt], SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=6, ignore_eos=True))
    now_computed, now_reused = counts(llm)
    assert now_reused - reused == 3 * 79
    assert now_computed - computed == 80 + 3 + 4 * 5
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    (alone,) = llm.generate([prompt], SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=6, ignore_eos=True))
    assert [sample.token_ids for sample in alone.outputs] == [sample.token_ids for sample in output.outputs]


@pytest.mark.parametrize("victim", ["ComputeWorker", "Scheduler"])
def test_a_conversation_outlives_who_kept_it(llm: LLM, victim: str) -> None:
    history = turn(llm, prompts_of((60,), VOCAB_SIZE, seed=8)[0], 9)
    for seed in range(10, 15):
        let_a_minute_pass(llm)
        history, replaced = turn_with_a_death(llm, history, seed, victim)
        if replaced:
            break
    else:
        pytest.fail(f"the {victim} was always killed too late")
    _, reused = counts(llm)
    before = len(history)
    turn(llm, history, 15)
    assert counts(llm)[1] - reused == before - 1
