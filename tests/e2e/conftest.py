"""A drive that fails on demand, a store to stream from it, and what comes out undisturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline.failing_drive import FailingDrive, build_failing_drive

from pipo_ray.plan.transfer import Mode

from .checkpoints import BYTES_LLAMA, make_checkpoint, packed, reference_greedy
from .drive_runs import NUM_TOKENS, PROMPTS


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest) -> Mode:
    """What asks for it is tested in both modes; in memory-saver it is slow, unless it is marked `both_modes`."""
    chosen: Mode = request.param
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mode" in metafunc.fixturenames:
        marked = any(mark.name == "both_modes" for mark in metafunc.definition.iter_markers())
        saver = pytest.param("memory-saver", marks=() if marked else pytest.mark.slow)
        metafunc.parametrize("mode", ["performance", saver], indirect=True, scope="module")


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
