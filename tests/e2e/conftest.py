"""A drive that fails on demand, a store to stream from it, and what comes out undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_saver.small_staging import TIMES_SMALLER, smaller, switched
from pipeline.failing_drive import FailingDrive, build_failing_drive

from pipo_ray import planner
from pipo_ray.plan.transfer import Mode

from .checkpoints import BYTES_LLAMA, make_checkpoint, packed, reference_greedy
from .drive_runs import NUM_TOKENS, PROMPTS


@pytest.fixture(scope="module")
def times_smaller() -> int:
    """How many times smaller than on a PC staging is, for models that are so much smaller; a file may have its own."""
    return TIMES_SMALLER


@pytest.fixture(scope="module", autouse=True)
def as_small_as_the_models(times_smaller: int) -> Iterator[None]:
    """Where all tests run in memory-saver, a file's own `times_smaller` is for those that chose no mode, too."""
    with pytest.MonkeyPatch.context() as patch:
        if switched():
            patch.setattr(planner, "choose_transfer", smaller(times_smaller, "memory-saver"))
        yield


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest, times_smaller: int) -> Iterator[Mode]:
    """What asks for it is tested in both modes; in memory-saver it is slow, unless it is marked `both_modes`. Where all
    tests run in memory-saver (`memory_saver/small_staging.py`), in that alone.
    """
    chosen: Mode = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose_transfer", smaller(times_smaller))
        yield chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = list(metafunc.definition.iter_markers())
    if "mode" in metafunc.fixturenames and not any(mark.args[:1] == ("mode",) for mark in marks):
        marked = switched() or any(mark.name == "both_modes" for mark in marks)
        saver = pytest.param("memory-saver", marks=() if marked else pytest.mark.slow)
        modes = [saver] if switched() else ["performance", saver]
        metafunc.parametrize("mode", modes, indirect=True, scope="module")


@pytest.fixture(scope="session")
def failing(tmp_path_factory: pytest.TempPathFactory) -> FailingDrive:
    """Sound at first; a test that makes it fail mends it."""
    return build_failing_drive(tmp_path_factory.mktemp("failing"))


@pytest.fixture(scope="session")
def bytes_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer, packed into the cache once for all. To be read only."""
    folder = make_checkpoint(tmp_path_factory.mktemp("plain") / "bytes-llama", BYTES_LLAMA)
    packed(folder)
    return folder


@pytest.fixture(scope="session")
def text_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("text") / "bytes-llama", BYTES_LLAMA, tokenizer=True)
    packed(folder)
    return folder


@pytest.fixture(scope="session")
def store(bytes_llama: Path) -> Path:
    """More than `drive_runs.BUDGET` holds."""
    return packed(bytes_llama)


@pytest.fixture(scope="session")
def expected(bytes_llama: Path) -> list[list[int]]:
    """The tokens of `drive_runs.PROMPTS` from a sound drive: transformers' (test_generate.py)."""
    return [reference_greedy(bytes_llama, prompt, NUM_TOKENS) for prompt in PROMPTS]
