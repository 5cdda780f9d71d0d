"""A drive that fails on demand, a store to stream from it, and what comes out undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline.failing_drive import FailingDrive, build_failing_drive

from pipo_ray import planner
from pipo_ray.plan.pieces import PAGE
from pipo_ray.plan.transfer import Mode, Transfer, choose_transfer

from .checkpoints import BYTES_LLAMA, make_checkpoint, packed, reference_greedy
from .drive_runs import NUM_TOKENS, PROMPTS


@pytest.fixture(scope="module")
def times_smaller() -> int:
    """How many times smaller than on a PC staging is, for models that are so much smaller; a file may have its own."""
    return 1024


@pytest.fixture(scope="module")
def mode(request: pytest.FixtureRequest, times_smaller: int) -> Iterator[Mode]:
    """What asks for it is tested in both modes; in memory-saver it is slow, unless it is marked `both_modes`.

    With a PC's staging both modes would cut a small model's weights into the same pieces, for the same slots.
    """

    def choose(*arguments: Any, **options: Any) -> Transfer:
        found = choose_transfer(*arguments, **options)
        transfer_bytes = max(PAGE, found.transfer_bytes // times_smaller // PAGE * PAGE)
        return replace(found, transfer_bytes=transfer_bytes, slot_bytes=found.slot_bytes // times_smaller)

    chosen: Mode = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "choose_transfer", choose)
        yield chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = list(metafunc.definition.iter_markers())
    if "mode" in metafunc.fixturenames and not any(mark.args[:1] == ("mode",) for mark in marks):
        marked = any(mark.name == "both_modes" for mark in marks)
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
