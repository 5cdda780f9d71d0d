"""Text from the four real actors, with a weight budget that makes them stream: it is transformers' text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import InputError
from pipo_ray.plan.transfer import Mode

from .checkpoints import EOS, VOCAB_SIZE, prompts_of, reference_greedy, reference_logits
from .footprint import Footprint, wait_until_gone
from .traces import covered, finished_trace, live_events, overlap

NUM_TOKENS = 24
MAX_BATCH_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=7)
PROMPTS = prompts_of((3, 41, 11, 1), VOCAB_SIZE)


@pytest.fixture(scope="module")
def checkpoint(text_llama: Path) -> Path:
    return text_llama


@pytest.fixture(scope="module")
def llm(checkpoint: Path, mode: Mode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    with LLM(
        checkpoint, memory="3GiB", weight_memory="450KiB", ray_address="local", trace=trace,
        max_batch_tokens=MAX_BATCH_TOKENS, mode=mode,
    ) as llm:  # fmt: skip
        assert list(llm.pids()) == ["NvmeLoader", "StagingPool", "ComputeWorker", "Scheduler"]
        # Small as the model is, either mode moves it in its own way.
        setup = llm._stage._setup
        staging = setup.read_threads, setup.placement.num_slots, setup.placement.slot_bytes >> 10
        assert staging == ((4, 6, 20) if mode == "performance" else (3, 4, 12))
        footprint = Footprint(llm._session.path, 0)
        assert len(footprint.processes) >= 7  # gcs_server, raylet, watcher, four actors
        assert footprint.mappings
        yield llm
        footprint.note()
    wait_until_gone(footprint, 1.0)
    check_trace(trace)


def check_trace(file: Path) -> None:
    """One track per actor and kind of task or of waiting, and loads that ran while something was computed."""
    events = finished_trace(file)
    tracks = {(event.actor, event.kind) for event in events}
    assert tracks >= {
        ("NvmeLoader", "weight load"), ("NvmeLoader", "wait for a slot"),
        ("StagingPool", "lease"), ("StagingPool", "some slots ready"), ("StagingPool", "all slots ready"),
        ("ComputeWorker", "sweep"), ("ComputeWorker", "compute"), ("ComputeWorker", "wait for weights"),
        ("ComputeWorker", "no sweep"), ("Scheduler", "sweep"),
    }  # fmt: skip
    for busy, waiting in (("weight load", "wait for a slot"), ("compute", "no sweep")):
        first, second = ([event for event in events if event.kind == kind] for kind in (busy, waiting))
        assert overlap(first, second) < 1e-4  # microseconds are rounded
    loads = [event for event in events if event.kind == "weight load"]
    computes = [event for event in events if event.kind == "compute"]
    # On a busy machine reading may take five times as long as computing, and what overlaps is never more than the less.
    reading = sum(event.end - event.begin for event in loads) / 4  # 4 read threads
    assert overlap(loads, computes) > 0.2 * min(reading, covered(computes))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    """transformers' greedy continuation of each prompt."""
    return [reference_greedy(checkpoint, prompt, NUM_TOKENS) for prompt in PROMPTS]


# --- the same text as transformers -----------------------------------------------------------------------------------


@pytest.mark.both_modes
def test_a_batch_of_different_lengths_is_each_prompt_alone(llm: LLM, alone: list[list[int]]) -> None:
    before = llm.report()
    outputs = llm.generate(PROMPTS, GREEDY)
    after = llm.report()
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * len(PROMPTS)
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    # Streamed, not resident: every sweep read the same bytes again.
    sweeps = after["sweeps"] - before["sweeps"]
    assert after["bytes_streamed"] - before["bytes_streamed"] == sweeps * after["streamed_bytes_per_sweep"]
    assert after["streamed_bytes_per_sweep"] > after["model_bytes"] / 2
    # One sweep serves everybody: far fewer than one per token of each.
    assert sweeps < NUM_TOKENS + 8
    for output in outputs:
        metrics = output.metrics
        assert metrics.num_prompt_tokens == len(output.prompt_token_ids)
        assert metrics.num_generated_tokens == NUM_TOKENS
        assert metrics.ttft_s is not None
        assert metrics.ttft_s > 0
        assert metrics.tokens_per_s is not None
        assert NUM_TOKENS <= metrics.sweeps <= sweeps
        assert metrics.bytes_streamed == metrics.sweeps * after["streamed_bytes_per_sweep"]


def test_a_prompt_longer_than_a_sweep_goes_in_chunks(llm: LLM, checkpoint: Path) -> None:
    (prompt,) = prompts_of((100,), VOCAB_SIZE, seed=1)
    last = max((event.end for event in live_events(llm)), default=0.0)
    (output,) = llm.generate([prompt], replace(GREEDY, max_tokens=4))
    assert output.outputs[0].token_ids == reference_greedy(checkpoint, prompt, 4)
    sweeps = [event for event in live_events(llm, last) if (event.actor, event.kind) == ("ComputeWorker", "sweep")]
    sweeps = [event for event in sweeps if event.begin > last]
    assert [event.labels["starts"] for event in sweeps] == [[s] for s in (0, 16, 32, 48, 64, 80, 96, 100, 101, 102)]
    assert max(event.labels["tokens"] for event in sweeps) == MAX_BATCH_TOKENS


def test_score_is_transformers_logits(llm: LLM, checkpoint: Path) -> None:
    for prompt, logits in zip(PROMPTS, llm.score(PROMPTS), strict=True):
        expected = reference_logits(checkpoint, prompt)
        assert logits.shape == expected.shape
        assert logits.dtype == np.float32
        error = np.abs(logits - expected).max(-1) / np.abs(expected).max(-1)
        assert error.max() <= 1e-4


def test_the_next_sweep_loads_while_this_one_computes(llm: LLM) -> None:
    """A load of the next sweep begins, and may end, before the last piece of this one has been computed: not in every
    sweep on a busy machine, and in none without reading ahead.
    """
    before = max((event.end for event in live_events(llm)), default=0.0)
    llm.generate([PROMPTS[0]], GREEDY)
    events = live_events(llm)
    per_sweep = llm._stage.memory.load_order(llm._stage._setup).loads_per_sweep
    loads = {event.labels["load"]: event for event in events if event.kind == "weight load" and "load" in event.labels}
    whole = [
        number for number in sorted({load // per_sweep for load in loads})
        if all(load in loads for load in range(number * per_sweep, (number + 1) * per_sweep))
    ]  # fmt: skip
    sweeps = [event for event in events if (event.actor, event.kind) == ("ComputeWorker", "sweep")]
    begun, ended = [], []
    for number, sweep in zip(whole, sweeps, strict=False):  # behind the last one loads go on, as far as slots are free
        assert loads[number * per_sweep + per_sweep - 1].end < sweep.end, "these loads are not this sweep's"
        computed = max(event.end for event in events if event.kind == "compute" and event.begin < sweep.end)
        if sweep.begin > before and sweep is not sweeps[-1]:
            first = loads[(number + 1) * per_sweep]
            begun.append(first.begin < computed)
            ended.append(first.end < computed)
    assert len(begun) >= NUM_TOKENS - 2
    assert sum(begun) > 0.5 * len(begun)
    assert any(ended)


# --- requests that come and go ---------------------------------------------------------------------------------------


def test_a_request_joins_while_another_runs(llm: LLM, alone: list[list[int]]) -> None:
    before = llm.report()["sweeps"]
    first = llm.stream(PROMPTS[0], GREEDY)
    for output in first:
        if len(output.outputs[0].token_ids) >= 5:  # on a busy machine several come at once
            break
    second = llm.stream(PROMPTS[2], replace(GREEDY, max_tokens=6))
    # Drained by the other iterator; what the second has missed is shown at once.
    *_, last = first
    *_, joined = second
    assert last.outputs[0].token_ids == alone[0]
    assert joined.outputs[0].token_ids == alone[2][:6]
    assert llm.report()["sweeps"] - before <= NUM_TOKENS + 1


def test_threads_share_the_sweeps(llm: LLM, alone: list[list[int]]) -> None:
    before = llm.report()["sweeps"]
    results: dict[int, list[int]] = {}

    def generate(number: int) -> None:
        seen: list[int] = []
        for output in llm.stream(PROMPTS[number], GREEDY):
            tokens = output.outputs[0].token_ids
            assert tokens[: len(seen)] == seen
            seen = tokens
        results[number] = seen

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(len(PROMPTS))] == alone
    assert llm.report()["sweeps"] - before < 2 * NUM_TOKENS


def test_a_stream_only_grows(llm: LLM, alone: list[list[int]]) -> None:
    seen: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for output in llm.stream(PROMPTS, GREEDY):
        sample = output.outputs[0]
        before = seen.get(output.request_id, [])
        assert len(sample.token_ids) > len(before)
        assert sample.token_ids[: len(before)] == before
        assert sample.text.startswith(texts.get(output.request_id, ""))
        seen[output.request_id], texts[output.request_id] = sample.token_ids, sample.text
        assert output.finished == (len(sample.token_ids) == NUM_TOKENS)
    assert sorted(seen.values()) == sorted(alone)


def test_abort_keeps_what_was_generated(llm: LLM, alone: list[list[int]]) -> None:
    outputs = []
    for output in llm.stream(PROMPTS[2], replace(GREEDY, max_tokens=400)):
        outputs.append(output)
        if len(outputs) == 3:
            llm.abort(output.request_id)
            llm.abort("no such request")
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    tokens = outputs[-1].outputs[0].token_ids
    assert 3 <= len(tokens) < 400
    assert tokens[:NUM_TOKENS] == alone[2][: len(tokens)]
    (after,) = llm.generate([PROMPTS[0]], GREEDY)
    assert after.outputs[0].token_ids == alone[0]
    assert after.metrics.sweeps <= NUM_TOKENS + 2  # of the other request one may be running, and one be sent ahead


def test_a_stream_that_is_left_ends_its_request(llm: LLM, alone: list[list[int]]) -> None:
    for _ in llm.stream(PROMPTS, replace(GREEDY, max_tokens=400)):
        break
    (after,) = llm.generate([PROMPTS[0]], GREEDY)
    assert after.outputs[0].token_ids == alone[0]
    # No other request shares its sweeps: each but the first few computes one token.
    sweeps = [event for event in live_events(llm) if (event.actor, event.kind) == ("ComputeWorker", "sweep")]
    assert [event.labels["tokens"] for event in sweeps[-NUM_TOKENS + 2 :]] == [1] * (NUM_TOKENS - 2)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(llm: LLM) -> None:
    several = replace(SAMPLED, n=2)
    (alone,) = llm.generate([PROMPTS[2]], several)
    first, second = (sample.token_ids for sample in alone.outputs)
    assert [sample.index for sample in alone.outputs] == [0, 1]
    assert first != second
    company = [replace(SAMPLED, seed=1), several, GREEDY, replace(SAMPLED, top_k=5, seed=3)]
    together = llm.generate([PROMPTS[1], PROMPTS[2], PROMPTS[0], PROMPTS[3]], company)
    assert [sample.token_ids for sample in together[1].outputs] == [first, second]
    assert [sample.text for sample in together[1].outputs] == [sample.text for sample in alone.outputs]
    (other,) = llm.generate([PROMPTS[2]], replace(several, seed=8))
    assert other.outputs[0].token_ids not in (first, second)
    assert together[1].metrics.num_generated_tokens == 2 * NUM_TOKENS


def test_logprobs_are_those_of_the_logits(llm: LLM, checkpoint: Path, alone: list[list[int]]) -> None:
    (output,) = llm.generate([PROMPTS[2]], replace(GREEDY, logprobs=3, max_tokens=8))
    sample = output.outputs[0]
    assert sample.logprobs is not None
    logits = reference_logits(checkpoint, PROMPTS[2] + alone[2][:7])[len(PROMPTS[2]) - 1 :].astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    for token, found, row in zip(sample.token_ids, sample.logprobs, expected, strict=True):
        assert next(iter(found)) == token
        assert set(found) == set(np.argsort(-row)[:3].tolist())
        assert found[token].rank == 1
        for one, entry in found.items():
            assert entry.logprob == pytest.approx(row[one], abs=1e-3)
            assert entry.decoded_token is not None
    assert sample.cumulative_logprob == pytest.approx(sum(row.max() for row in expected), abs=1e-2)


def test_text_stop_strings_and_stop_tokens(llm: LLM, checkpoint: Path, alone: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = "Grüße, 世界! "
    (whole,) = llm.generate(prompt, replace(GREEDY, max_tokens=60))
    text = whole.outputs[0].text
    assert whole.prompt == prompt
    assert whole.prompt_token_ids == tokenizer(prompt)["input_ids"]
    decoded = tokenizer.decode(whole.outputs[0].token_ids, skip_special_tokens=True)
    # A character whose last bytes never came is left out.
    assert text == decoded[: len(text)]
    assert not decoded[len(text) :].strip("\ufffd")
    # Two characters in the middle that come once, as a stop string that is hit in a token of its own or across two.
    at = next(
        i for i in range(len(text) // 3, len(text) - 2) if text.find(text[i : i + 2]) == i and text[i : i + 2].isascii()
    )
    stop = text[at : at + 2]
    (stopped,) = llm.generate(prompt, replace(GREEDY, max_tokens=60, stop=["never", stop]))
    sample = stopped.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (text[:at], "stop", stop)
    assert sample.token_ids == whole.outputs[0].token_ids[: len(sample.token_ids)]
    (kept,) = llm.generate(prompt, replace(GREEDY, max_tokens=60, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: at + 2]
    shown = ""
    for output in llm.stream(prompt, replace(GREEDY, max_tokens=60, stop=stop)):
        assert output.outputs[0].text.startswith(shown)
        shown = output.outputs[0].text
    assert shown == text[:at]
    token = alone[2][5]
    (by_token,) = llm.generate([PROMPTS[2]], replace(GREEDY, stop_token_ids=[token]))
    sample = by_token.outputs[0]
    assert sample.token_ids == alone[2][: alone[2].index(token) + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", token)


def test_the_end_of_sequence_token_and_min_tokens(llm: LLM) -> None:
    eager = replace(GREEDY, ignore_eos=False, logit_bias={EOS: 100.0})
    (at_once,) = llm.generate([PROMPTS[0]], eager)
    assert at_once.outputs[0].token_ids == [EOS]
    assert (at_once.outputs[0].finish_reason, at_once.outputs[0].stop_reason) == ("stop", None)
    (later,) = llm.generate([PROMPTS[0]], replace(eager, min_tokens=5))
    assert later.outputs[0].token_ids[5:] == [EOS]
    assert EOS not in later.outputs[0].token_ids[:5]
    (never,) = llm.generate([PROMPTS[0]], replace(eager, ignore_eos=True))
    assert never.outputs[0].token_ids == [EOS] * NUM_TOKENS


# --- about the run ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_the_run_goes_on(llm: LLM, alone: list[list[int]]) -> None:
    with pytest.raises(InputError, match="context is 512 tokens"):
        llm.generate([[5] * 512], GREEDY)
    with pytest.raises(InputError, match="empty"):
        llm.generate([[]], GREEDY)
    with pytest.raises(InputError, match=f"0 to {VOCAB_SIZE - 1}"):
        llm.generate([[VOCAB_SIZE]], GREEDY)
    (full,) = llm.generate([[5] * 510], replace(GREEDY, max_tokens=None))
    assert len(full.outputs[0].token_ids) == 2
    (after,) = llm.generate([PROMPTS[0]], GREEDY)
    assert after.outputs[0].token_ids == alone[0]


def test_the_report(llm: LLM) -> None:
    llm.generate([PROMPTS[0]], GREEDY)
    report = llm.report()
    assert report.keys() == {
        "sweeps", "bytes_streamed", "peak_memory_bytes", "memory_budget_bytes", "weight_memory_bytes",
        "gpu_memory_bytes", "model_bytes", "resident_bytes", "streamed_bytes_per_sweep", "kv_tokens", "elapsed_s",
        "stages", "huge_page_bytes", "kv_ram_bytes", "kv_disk_bytes",
    }  # fmt: skip
    assert report["memory_budget_bytes"] == 3 << 30
    assert 0 < report["weight_memory_bytes"] <= 450 << 10
    assert report["model_bytes"] == report["resident_bytes"] + report["streamed_bytes_per_sweep"]
    assert 100 << 20 < report["peak_memory_bytes"] <= 3 << 30
    assert [stage["stage"] for stage in report["stages"]] == ["NvmeLoader", "StagingPool", "ComputeWorker", "Scheduler"]
    for stage in report["stages"]:
        shares = [stage[share] for share in ("busy", "waiting", "paused", "starved")]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) == pytest.approx(1)
        assert stage["paused_s"] == 0  # it does not run in the background
    loader = report["stages"][0]
    assert loader["bytes_read"] >= report["bytes_streamed"]
    assert loader["retries"] == 0
    assert llm.max_model_len == 512
    assert any("stream from the drive" in line for line in llm.describe())
