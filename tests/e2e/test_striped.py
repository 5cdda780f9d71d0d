"""The bundled model over two folders, one loader each, through the real actors: transformers' text."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import StoreError
from pipo_ray.packing import pack_checkpoint
from pipo_ray.plan.transfer import Mode
from pipo_ray.store.manifest import Manifest

from .checkpoints import reference_greedy
from .deaths import let_a_minute_pass
from .traces import live_events

# In float32, in which the text does not depend on which kernel was faster when the run began.
BUNDLED = Path(__file__).resolve().parents[2] / "pipo_ray" / "bundled"
PROMPTS = ["Once upon a time", "The ship"]
NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
LOADERS = ["NvmeLoader", "NvmeLoader-2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("striped")
    manifest = pack_checkpoint(BUNDLED, folder / "store", dtype="float32", stripes=[str(folder / "stripe")])
    assert {block.folder for block in manifest.blocks} == {0, 1}
    return folder / "store"


@pytest.fixture(scope="module")
def times_smaller() -> int:
    """Slots for 128 rows of its matrices in performance."""
    return 32


@pytest.fixture(scope="module")
def budget(store: Path) -> dict[str, Any]:
    """Half of the model streams."""
    total = Manifest.load(store).total_bytes
    return {"memory": "3GiB", "weight_memory": total // 2, "ray_address": "local", "device": "cpu"}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """The tokens that transformers goes on with; from one folder it is the same text (test_generate.py)."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    return [reference_greedy(BUNDLED, tokenizer(prompt).input_ids, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def llm(store: Path, mode: Mode, budget: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(store, **budget, mode=mode, trace=tmp_path_factory.mktemp("trace") / "trace.json") as llm:
        yield llm


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.slow
def test_the_drive_that_fails_is_named(store: Path, budget: dict[str, Any], expected: list[list[int]]) -> None:
    """And the next request reads again what failed."""
    with LLM(store, **budget) as llm:
        for folder in (store.parent / "stripe", store):
            assert tokens(llm) == expected
            (victim,) = folder.glob("*.safetensors")
            data = victim.read_bytes()
            os.truncate(victim, 4096)
            with pytest.raises(StoreError, match=rf"^{victim}: ends at byte .* it was truncated"):
                tokens(llm)
            victim.write_bytes(data)
            with suppress(StoreError):  # what was tried before the drive was back
                tokens(llm)
            assert tokens(llm) == expected


def test_a_stripe_that_is_not_mounted(store: Path, budget: dict[str, Any], tmp_path: Path) -> None:
    stripe = store.parent / "stripe"
    away = Path(shutil.move(stripe, tmp_path / "away"))
    try:
        with pytest.raises(StoreError, match=rf"its stripe {stripe} is missing; mount its drive there"):
            LLM(store, **budget)
        with pytest.raises(StoreError, match="is a stripe of the block store"):
            LLM(away, **budget)
    finally:
        shutil.move(away, stripe)


def test_the_same_text_from_two_drives(llm: LLM, expected: list[list[int]]) -> None:
    begin = time.perf_counter()
    assert tokens(llm) == expected
    report = llm.report()
    assert report["streamed_bytes_per_sweep"] > 0
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == [*LOADERS, "StagingPool", "ComputeWorker", "Scheduler"]
    own: dict[str, set[str]] = {name: set() for name in LOADERS}
    for event in live_events(llm, begin):
        if event.kind == "weight load":
            own[event.actor].add(event.labels["piece"])
    blocks = {block.name: block.folder for block in Manifest.load(llm._stage._setup.store).blocks}
    for number, name in enumerate(LOADERS):
        assert own[name]
        assert {blocks[block] for block in own[name]} == {number}
    read = [stages[name]["bytes_read"] for name in LOADERS]
    assert max(read) < 1.6 * min(read)


@pytest.mark.parametrize("victims", [pytest.param(["NvmeLoader"], marks=pytest.mark.slow), ["NvmeLoader-2"], LOADERS])
def test_a_killed_loader_comes_back(victims: list[str], llm: LLM, expected: list[list[int]]) -> None:
    let_a_minute_pass(llm)
    before = llm.pids()
    found: list[int] = []
    killed = False
    for output in llm.stream(PROMPTS[0], GREEDY):
        found = output.outputs[0].token_ids
        # An output has all tokens since the one before, so a slow reader may see any number of them, but never none.
        if not killed and len(found) >= 5:
            for victim in victims:
                os.kill(before[victim], signal.SIGKILL)
            killed = True
    assert killed
    assert found == expected[0]
    deadline = time.monotonic() + 30
    while any(llm.pids()[victim] == before[victim] for victim in victims):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    after = llm.pids()
    assert {name for name in before if after[name] != before[name]} == set(victims)
    assert tokens(llm) == expected
