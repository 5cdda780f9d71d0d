"""KV pages on the drive, through the real actors: to the last bit what it is with all of them in RAM, whoever is killed
and whatever the drive does meanwhile.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from architectures import Architecture
from pipeline.failing_drive import FailingDrive

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import BudgetError, DriveError, InputError, ResourceError
from pipo_ray.plan.budget import PROCESS_BYTES, plan_run
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.plan.kv_disk import KVOnDisk, disk_page_bytes, least_ram_bytes, ram_bytes_for
from pipo_ray.plan.transfer import Mode
from pipo_ray.prepare import prepare_store

from .checkpoints import VOCAB_SIZE, make_checkpoint, packed, prompts_of
from .footprint import Footprint, wait_until_gone

LONG, SHORT, OTHER = prompts_of((4200, 40, 4200), VOCAB_SIZE)  # the long ones have no room beside each other
PAGES = len(LONG) // PAGE_TOKENS * PAGE_TOKENS
NEW = 16
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=VOCAB_SIZE)
CHUNK = 400
BUDGET: dict[str, Any] = {
    "weight_memory": "450KiB", "ray_address": "local", "device": "cpu", "max_batch_tokens": CHUNK,
    "max_kv_tokens": 4352 + 256, "kv_on_disk": "5MiB",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    long = Architecture("long-llama", "Llama", "llama", {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 8192})
    return packed(make_checkpoint(tmp_path_factory.mktemp("kv") / "long-llama", long))


def memory(store: Path, kv_bytes: int, weight_bytes: int = 450 << 10) -> int:
    """--memory with which just so much is left to KV pages in RAM."""
    prepared = prepare_store(str(store))
    plan = plan_run(prepared.manifest, prepared.facts, memory_bytes=4 << 30, weight_memory_bytes=weight_bytes,
                    max_batch_tokens=CHUNK)  # fmt: skip
    return PROCESS_BYTES + plan.activation_bytes + weight_bytes + kv_bytes


def details(llm: LLM, stage: str) -> dict[str, Any]:
    return next(one for one in llm.report()["stages"] if one["stage"] == stage)


def ask(llm: LLM, prompt: list[int]) -> tuple[list[int], object]:
    """Tokens, and every token's log probability at each of them: the logits, less what they have in common."""
    (output,) = llm.generate([{"prompt_token_ids": prompt}], PARAMS)
    return output.outputs[0].token_ids, output.outputs[0].logprobs


@pytest.fixture(scope="module")
def expected(store: Path, mode: Mode) -> dict[str, tuple[list[int], object]]:
    """With all pages in RAM, and nothing shared; asked for before a test's own LLM starts."""
    facts = prepare_store(str(store)).facts
    with LLM(
        store, memory=memory(store, ram_bytes_for(facts, 4352 + 256)), prefix_cache=False, mode=mode, **BUDGET
    ) as llm:
        answers = {"long": ask(llm, LONG), "other": ask(llm, OTHER), "short": ask(llm, SHORT)}
        assert details(llm, "NvmeLoader")["kv_saved_bytes"] == 0
    return answers


@pytest.fixture(scope="module")
def llm(store: Path, mode: Mode, failing: FailingDrive, expected: dict[str, Any]) -> Iterator[LLM]:
    """RAM for a quarter of the long prompt's pages, and a drive that can be made to fail."""
    facts = prepare_store(str(store)).facts
    two = least_ram_bytes(facts) + facts.num_layers * disk_page_bytes(facts)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in failing.environment.items():
            patch.setenv(name, value)
        made = LLM(store, memory=memory(store, two), mode=mode, **BUDGET)
    with made as llm:
        assert llm._plan.kv_disk is not None
        assert llm._plan.kv_disk.ram_bytes <= (len(LONG) + NEW) * facts.kv_bytes_per_token / 4
        footprint = Footprint(llm._session.path, os.getpid())
        yield llm
        footprint.note()
    wait_until_gone(footprint, 2.0)
    assert not [path for path in open_files() if path.startswith(os.environ["PIPO_CACHE"]) and "(deleted)" in path]


def open_files() -> list[str]:
    return [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]


@pytest.fixture(autouse=True)
def mended(failing: FailingDrive) -> Iterator[None]:
    failing.mend()
    yield
    failing.mend()


@dataclass(frozen=True)
class Question:
    """A long prompt, and what is answered to it."""

    prompt: list[int]
    answer: tuple[list[int], object]


_turns = itertools.cycle([("long", LONG), ("other", OTHER)])


@pytest.fixture
def long(expected: dict[str, Any]) -> Question:
    """In turns: of what the test before asked, no page is there any more once this has begun."""
    name, prompt = next(_turns)
    return Question(prompt, expected[name])


def test_what_cannot_be_is_said_before_anything_starts(store: Path, tmp_path: Path) -> None:
    options = BUDGET | {"memory": "3GiB"}
    with pytest.raises(ResourceError, match=r"1024\.0 TiB of KV pages do not fit into .*; lower --kv-on-disk"):
        LLM(store, **options | {"kv_on_disk": KVOnDisk(1 << 50, str(tmp_path))})
    with pytest.raises(InputError, match=r"--kv-folder /dev/shm lies in memory \(tmpfs\)"):
        LLM(store, **options | {"kv_on_disk": KVOnDisk(None, "/dev/shm")})
    with pytest.raises(InputError, match="there is no such folder"):
        LLM(store, **options | {"kv_on_disk": KVOnDisk(None, str(tmp_path / "none"))})
    with pytest.raises(BudgetError, match=r"--kv-on-disk 100\.0 KiB is too low: at least 192\.0 KiB would do"):
        LLM(store, **options | {"kv_on_disk": "100KiB"})
    with pytest.raises(BudgetError, match=r"--memory \S+ MiB is too low: .*KV pages"):
        LLM(store, **options | {"memory": memory(store, least_ram_bytes(prepare_store(str(store)).facts) - 5000)})
    assert not list(tmp_path.iterdir())


def test_logits_are_bit_equal_with_a_quarter_of_the_pages_in_ram(
    llm: LLM, long: Question, expected: dict[str, Any]
) -> None:
    """And what is asked a second time begins on the pages that are there."""
    assert ask(llm, long.prompt) == long.answer
    loader = details(llm, "NvmeLoader")
    assert loader["kv_loaded_bytes"] > 5 * loader["kv_saved_bytes"] > 0
    assert ask(llm, SHORT) == expected["short"]
    before = details(llm, "Scheduler")
    assert ask(llm, long.prompt)[0] == long.answer[0]
    after = details(llm, "Scheduler")
    assert after["tokens_reused"] - before["tokens_reused"] == PAGES
    assert after["tokens_computed"] - before["tokens_computed"] == len(LONG) - PAGES + NEW - 1


@pytest.mark.parametrize("actor", ["NvmeLoader", pytest.param("ComputeWorker", marks=pytest.mark.slow)])
def test_who_is_killed_costs_no_token(actor: str, llm: LLM, long: Question) -> None:
    """Nor, of a loader, any page: nothing is computed again."""
    victim, done = llm.pids()[actor], threading.Event()
    computed = details(llm, "Scheduler")["tokens_computed"]
    saved = int(details(llm, "NvmeLoader")["kv_saved_bytes"])

    def kill_when_pages_move() -> None:
        while not done.wait(0.05):
            if int(details(llm, "NvmeLoader")["kv_saved_bytes"]) > saved:
                os.kill(victim, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill_when_pages_move)
    killer.start()
    try:
        answer = ask(llm, long.prompt)
    finally:
        done.set()
        killer.join()
    assert llm.pids()[actor] != victim
    assert answer[0] == long.answer[0]
    if actor == "NvmeLoader":
        assert answer == long.answer
        assert details(llm, "Scheduler")["tokens_computed"] - computed == len(LONG) + NEW - 1


@pytest.mark.parametrize("kind", ["kv-read-flip", pytest.param("kv-write-enospc", marks=pytest.mark.slow)])
def test_pages_that_fail_once_are_computed_again_and_others_go_on(
    kind: Any, llm: LLM, failing: FailingDrive, long: Question, expected: dict[str, Any]
) -> None:
    pids = llm.pids()
    # What was read is read once more, and has to be wrong again; two threads read.
    failing.fail(kind, after=3, times=2 if "read" in kind else 1, offset=-2)
    computed = details(llm, "Scheduler")["tokens_computed"]
    one, short = llm.generate([{"prompt_token_ids": prompt} for prompt in (long.prompt, SHORT)], PARAMS)
    assert one.outputs[0].token_ids == long.answer[0]
    assert short.outputs[0].token_ids == expected["short"][0]
    again = details(llm, "Scheduler")["tokens_computed"] - computed - (len(LONG) + len(SHORT) + 2 * (NEW - 1))
    assert 0 < again <= len(LONG)
    assert llm.pids() == pids


def test_a_drive_that_keeps_failing_ends_the_request_that_needs_it(
    llm: LLM, failing: FailingDrive, long: Question, expected: dict[str, Any]
) -> None:
    failing.fail("kv-read-eio")
    other: list[list[int]] = []
    beside = threading.Thread(target=lambda: other.append(ask(llm, SHORT)[0]))
    beside.start()
    with pytest.raises(DriveError, match=re.escape("reading failed: Input/output error; check that the drive is")):
        ask(llm, long.prompt)
    beside.join()
    assert other == [expected["short"][0]]
    failing.mend()
    assert ask(llm, long.prompt) == long.answer
