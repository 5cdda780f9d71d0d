"""SIGKILL each actor at random points of a generation, and two at once: the stream goes on as if nothing had happened.

The random campaign that goes further is benchmarks/fault_campaign.py.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.pipeline.roll import ACTORS
from pipo_ray.plan.transfer import Mode
from pipo_ray.session import processes

from .checkpoints import VOCAB_SIZE, prompts_of
from .deaths import let_a_minute_pass
from .footprint import Footprint, store_mappings, wait_until_gone
from .traces import Event, live_events

NUM_TOKENS = 24
POINTS = 3
SEED = int(os.environ.get("PIPO_FAULT_SEED", "20"))
JUST_BEFORE_S = 0.05  # a sweep that ended so shortly before the kill may not have been heard of by the driver
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = prompts_of((3, 29, 11), VOCAB_SIZE)
PARAMS = [GREEDY, replace(GREEDY, temperature=1.0, n=2, seed=3), replace(GREEDY, repetition_penalty=1.3, logprobs=1)]
SEQUENCES = 4

Tokens = dict[tuple[int, int], list[int]]


@pytest.fixture(scope="module")
def llm(text_llama: Path, mode: Mode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    with LLM(text_llama, memory="3GiB", weight_memory="450KiB", ray_address="local", trace=trace, mode=mode) as llm:
        footprint = Footprint(llm._session.path, os.getpid())
        yield llm
        footprint.note()
    wait_until_gone(footprint, 2.0)


@pytest.fixture(autouse=True)
def a_minute_later(request: pytest.FixtureRequest) -> None:
    if "llm" in request.fixturenames:
        let_a_minute_pass(request.getfixturevalue("llm"))


class Killer(threading.Thread):
    """SIGKILLs `victims`, `delay_s` after `after` tokens were streamed."""

    def __init__(self, victims: list[int], after: int, delay_s: float) -> None:
        super().__init__(daemon=True)
        self.after, self.killed_at = after, 0.0
        self._victims, self._delay_s, self._reached = victims, delay_s, threading.Event()

    def saw(self, tokens: int) -> None:
        """So many tokens have been streamed."""
        if tokens >= self.after:
            self._reached.set()

    def run(self) -> None:
        self._reached.wait()
        time.sleep(self._delay_s)
        for victim in self._victims:
            os.kill(victim, signal.SIGKILL)
        self.killed_at = time.perf_counter()


def stream(llm: LLM, killer: Killer | None = None) -> tuple[Tokens, dict[tuple[int, int], str]]:
    """Stream PROMPTS, and watch that nothing that was streamed is repeated or changed."""
    tokens: Tokens = {}
    texts: dict[tuple[int, int], str] = {}
    probabilities: dict[tuple[int, int], float] = {}
    first = None
    for output in llm.stream(PROMPTS, PARAMS):
        first = int(output.request_id) if first is None else min(first, int(output.request_id))
        grown = 0
        for sample in output.outputs:
            key = (int(output.request_id), sample.index)
            before = tokens.get(key, [])
            assert sample.token_ids[: len(before)] == before, "a streamed token has changed"
            assert sample.text.startswith(texts.get(key, "")), "streamed text has changed"
            grown += len(sample.token_ids) - len(before)
            tokens[key], texts[key] = sample.token_ids, sample.text
            if sample.logprobs is not None:
                assert len(sample.logprobs) == len(sample.token_ids)
                probabilities[key] = sample.cumulative_logprob or 0.0
        assert grown > 0, "an output without anything new"
        if killer is not None:
            killer.saw(sum(map(len, tokens.values())))
    assert first is not None
    order = {key: (key[0] - first, key[1]) for key in tokens}
    assert len(tokens) == SEQUENCES
    assert set(map(len, tokens.values())) == {NUM_TOKENS}
    return {order[key]: one for key, one in tokens.items()}, {order[key]: one for key, one in texts.items()}


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> tuple[Tokens, dict[tuple[int, int], str], list[Event], float]:
    """Tokens and texts without a death, the sweeps that it took, and how long one took."""
    llm.generate(PROMPTS, PARAMS)  # the first run is slow
    begin = time.perf_counter()
    tokens, texts = stream(llm)
    seconds = time.perf_counter() - begin
    sweeps = sweeps_of(live_events(llm, begin))
    assert len(sweeps) == NUM_TOKENS
    assert sum(event.labels["starts"].count(0) for event in sweeps) == SEQUENCES
    return tokens, texts, sweeps, seconds / NUM_TOKENS


def sweeps_of(events: list[Event]) -> list[Event]:
    """The compute worker's completed sweeps."""
    return [event for event in events if (event.actor, event.kind) == ("ComputeWorker", "sweep")]


def computed(sweeps: list[Event]) -> int:
    """Tokens that went through the model in these sweeps."""
    return sum(event.labels["tokens"] for event in sweeps)


@pytest.mark.parametrize(("victims", "point"), [
    *(
        pytest.param((actor,), point, id=f"{actor}-{point}", marks=[pytest.mark.slow] if point else [])
        for actor in ACTORS
        for point in range(POINTS)
    ),
    pytest.param(("NvmeLoader", "ComputeWorker"), 1, id="NvmeLoader+ComputeWorker"),
    pytest.param(("StagingPool", "Scheduler"), 1, id="StagingPool+Scheduler"),
])  # fmt: skip
def test_killed_actors_come_back(
    victims: tuple[str, ...],
    point: int,
    llm: LLM,
    undisturbed: tuple[Tokens, dict[tuple[int, int], str], list[Event], float],
) -> None:
    expected, expected_texts, expected_sweeps, sweep_s = undisturbed
    chance = random.Random(f"{SEED} {victims} {point}")
    # In the first, second or last third; the last sweeps leave room for what follows.
    third = SEQUENCES * (NUM_TOKENS - 4) // POINTS
    after = chance.randrange(1 + point * third, 1 + (point + 1) * third)
    delay_s = chance.uniform(0, min(1.5 * sweep_s, 0.3))
    before = llm.pids()
    survivors = {processes.identify(pid) for name, pid in before.items() if name not in victims}
    print(f"PIPO_FAULT_SEED={SEED}: SIGKILL {victims} {delay_s * 1e3:.0f} ms after {after} tokens")
    killer = Killer([before[victim] for victim in victims], after, delay_s)
    killer.start()
    begin = time.perf_counter()
    tokens, texts = stream(llm, killer)
    killer.join()
    assert tokens == expected
    assert texts == expected_texts
    # The generation goes on without a staging pool, which is back a little later.
    wait_for_return(llm, before, victims)
    after_pids = llm.pids()
    assert {name for name, pid in after_pids.items() if pid != before[name]} == set(victims)
    assert {processes.identify(pid) for name, pid in after_pids.items() if name not in victims} == survivors
    check_what_was_done_again(live_events(llm, begin), killer.killed_at, victims, expected_sweeps)
    (output,) = llm.generate([PROMPTS[0]], PARAMS[0])
    assert output.outputs[0].token_ids == expected[0, 0]


def wait_for_return(llm: LLM, before: dict[str, int], victims: tuple[str, ...]) -> None:
    deadline = time.monotonic() + 30
    while any(llm.pids()[victim] == before[victim] for victim in victims):
        assert time.monotonic() < deadline, f"{victims} did not come back"
        time.sleep(0.02)


def check_what_was_done_again(
    events: list[Event], killed_at: float, victims: tuple[str, ...], expected: list[Event]
) -> None:
    """At most the interrupted sweep, and the prompts and answers so far for the KV cache."""
    sweeps = sweeps_of(events)
    loads = Counter(event.labels["load"] for event in events if event.kind == "weight load" and "load" in event.labels)
    starts = sum(event.labels["starts"].count(0) for event in sweeps)
    again = len(sweeps) - len(expected)
    if not {"ComputeWorker", "Scheduler"} & set(victims):
        # Loader and staging pool: nothing is computed again, and slots that a dead loader has filled are used.
        assert again == 0
        assert starts == SEQUENCES
        assert [event.labels["tokens"] for event in sweeps] == [event.labels["tokens"] for event in expected]
        # Twice: those that were read, and of which the loader had not yet said so.
        assert sum(count - 1 for count in loads.values()) <= 4
        return
    # A sweep of a dead compute worker is not in the trace; one that a dead scheduler has asked for is.
    interrupted = [event for event in sweeps if event.begin < killed_at and event.end > killed_at - JUST_BEFORE_S]
    assert again <= len(interrupted)
    assert starts <= 2 * SEQUENCES
    rebuilt = sum(len(prompt) * params.n for prompt, params in zip(PROMPTS, PARAMS, strict=True))
    generated = SEQUENCES * sum(event.end < killed_at for event in sweeps)
    assert computed(sweeps) <= computed(expected) + computed(interrupted) + rebuilt + generated


SLOW = pytest.mark.slow  # killed between two generations below, too, where their slots are looked at


@pytest.mark.parametrize("victim", [
    "ComputeWorker", "Scheduler", pytest.param("NvmeLoader", marks=SLOW), pytest.param("StagingPool", marks=SLOW)
])  # fmt: skip
def test_an_actor_killed_between_two_generations(
    victim: str, llm: LLM, undisturbed: tuple[Tokens, dict[tuple[int, int], str], list[Event], float]
) -> None:
    expected = undisturbed[0]
    before = llm.pids()
    os.kill(before[victim], signal.SIGKILL)
    wait_for_return(llm, before, (victim,))
    begin = time.perf_counter()
    assert stream(llm)[0] == expected
    assert len(sweeps_of(live_events(llm, begin))) == NUM_TOKENS


@pytest.mark.parametrize("victim", ["NvmeLoader", "StagingPool"])
def test_slots_are_found_as_they_were_left(victim: str, llm: LLM) -> None:
    """Between two generations the loader has read ahead; whoever dies, that is neither lost nor read again."""
    memory = llm._stage.memory
    table = memory.table

    def states() -> list[tuple[str, int]]:
        views = [table.view(slot) for slot in range(table.num_slots)]
        return [(view.state.name, view.load) for view in views]

    llm.generate([PROMPTS[0]], GREEDY)
    deadline = time.monotonic() + 30
    while {state for state, _ in states()} != {"READY"}:
        assert time.monotonic() < deadline, f"the loader does not read ahead: {states()}"
        time.sleep(0.01)
    assert memory.residents
    expected = states(), [bytes(slot) for slot in memory.slots], [bytes(piece) for piece in memory.residents]
    before = llm.pids()
    at = time.perf_counter()
    os.kill(before[victim], signal.SIGKILL)
    wait_for_return(llm, before, (victim,))
    llm._stage.call(llm._stage.nvme_loader, "ready")
    assert llm._stage.call(llm._stage.staging_pool, "books") == expected[0]
    assert (states(), [bytes(slot) for slot in memory.slots], [bytes(part) for part in memory.residents]) == expected
    assert not [event for event in live_events(llm, at) if event.kind == "weight load"]


def test_every_actor_maps_the_slots_from_shared_memory(llm: LLM) -> None:
    """And nothing was spilled or put into a file, with the store as full as it gets."""
    own = store_mappings(os.getpid())
    assert own
    for name, pid in llm.pids().items():
        assert store_mappings(pid) & own, f"{name} does not map the object store"
    node = Path(llm._session.path) / "ray"
    assert not [path for path in node.rglob("*") if "spill" in path.name or ("plasma" in path.name and path.is_file())]
