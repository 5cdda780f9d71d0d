"""A drive that fails below `preadv` in the real loader while it runs: tried again where that helps, otherwise an error
that says what to do, and never another text. The LLM outlives it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline.failing_drive import FailingDrive, Kind

from pipo_ray import LLM
from pipo_ray.errors import DriveError
from pipo_ray.pipeline import drive_watch

from .drive_runs import start, tokens
from .footprint import Footprint, wait_until_gone


def retries(llm: LLM) -> int:
    return int(next(stage["retries"] for stage in llm.report()["stages"] if stage["stage"] == "NvmeLoader"))


@pytest.fixture(scope="module")
def llm(store: Path, failing: FailingDrive, expected: list[list[int]]) -> Iterator[LLM]:
    with start(store, failing) as llm:
        footprint = Footprint(llm._session.path, os.getpid())
        # The compute worker checks the embedding while it starts: a fault meant for the loader could hit that reading.
        assert tokens(llm) == expected
        yield llm
        footprint.note()
    wait_until_gone(footprint, 2.0)


@pytest.fixture(autouse=True)
def mended(failing: FailingDrive) -> Iterator[None]:
    """No fault outlives its test."""
    failing.mend()
    yield
    failing.mend()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("kind", "times"), [
    ("eio", 3), ("short", 40), *(pytest.param(*one, marks=SLOW) for one in (("eio", 1), ("eagain", 2), ("enodev", 1)))
])  # fmt: skip
def test_what_passes_is_not_noticed(
    kind: Kind, times: int, llm: LLM, failing: FailingDrive, expected: list[list[int]]
) -> None:
    before, pids = retries(llm), llm.pids()
    failing.fail(kind, after=7, times=times)
    assert tokens(llm) == expected
    assert retries(llm) == before + (0 if kind == "short" else times)
    assert llm.pids() == pids


@pytest.mark.parametrize(("kind", "cause"), [
    ("eio", "Input/output error"), pytest.param("enodev", "No such device", marks=SLOW)
])  # fmt: skip
def test_what_stays_ends_the_request_and_not_the_run(
    kind: Kind, cause: str, llm: LLM, store: Path, failing: FailingDrive, expected: list[list[int]]
) -> None:
    pids = llm.pids()
    for _ in range(2):
        failing.fail(kind, after=7)
        with pytest.raises(DriveError) as caught:
            tokens(llm)
        message = str(caught.value)
        assert re.fullmatch(
            rf"block \S+ cannot be read: {re.escape(str(store))}/\S+\.safetensors: reading \d+ bytes at offset \d+ "
            rf"failed: {cause} \(after 4 attempts\); check that the drive is connected and healthy, then run `pipo "
            rf"verify {re.escape(str(store))}`",
            message,
        ), message
        failing.mend()
        assert tokens(llm) == expected
    assert llm.pids() == pids


@pytest.mark.parametrize(("seconds", "patience_s"), [(2.5, 1.0), pytest.param(30.0, None, marks=SLOW)])
def test_a_stall_ends_by_itself_and_is_told_once(
    seconds: float,
    patience_s: float | None,
    llm: LLM,
    failing: FailingDrive,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if patience_s is not None:
        monkeypatch.setattr(drive_watch, "SILENT_S", patience_s)
    failing.fail("stall", after=20, times=1, seconds=seconds)
    with caplog.at_level(logging.WARNING, "pipo_ray"):
        assert tokens(llm) == expected
    told = [record.getMessage() for record in caplog.records if "has not answered" in record.getMessage()]
    assert len(told) == 1, told
    wanted = 10 if patience_s is None else round(patience_s)
    assert f"the drive has not answered for {wanted} s; the run goes on as soon as it does" in told[0]
