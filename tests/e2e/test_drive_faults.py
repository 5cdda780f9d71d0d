"""A drive that fails below `preadv` in the real loader: tried again where that helps, otherwise an error that says what
to do, and never another text. The LLM outlives it.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline.failing_drive import FailingDrive, Kind, build_failing_drive

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import DriveError
from pipo_ray.pipeline import drive_watch
from pipo_ray.prepare import prepare_store
from pipo_ray.store.manifest import Manifest

from .checkpoints import BYTES_LLAMA, VOCAB_SIZE, make_checkpoint, prompts_of
from .footprint import Footprint, wait_until_gone
from .test_bad_input import session_processes

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = prompts_of((3, 29, 11), VOCAB_SIZE)
BUDGET = {"memory": "3GiB", "weight_memory": "450KiB", "ray_address": "local", "device": "cpu"}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> FailingDrive:
    return build_failing_drive(tmp_path_factory.mktemp("failing"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_store(make_checkpoint(tmp_path_factory.mktemp("drive") / "bytes-llama", BYTES_LLAMA)).folder


def start(store: Path, failing: FailingDrive, **more: Any) -> LLM:
    """An LLM whose processes see the failing drive; this one does not."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in failing.environment.items():
            patch.setenv(name, value)
        return LLM(store, **BUDGET | more)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def retries(llm: LLM) -> int:
    return int(next(stage["retries"] for stage in llm.report()["stages"] if stage["stage"] == "NvmeLoader"))


@pytest.fixture(scope="module")
def expected(store: Path) -> list[list[int]]:
    """Undisturbed."""
    with LLM(store, **BUDGET) as llm:
        return tokens(llm)


@pytest.fixture(scope="module")
def llm(store: Path, failing: FailingDrive) -> Iterator[LLM]:
    with start(store, failing) as llm:
        footprint = Footprint(llm._session.path, os.getpid())
        yield llm
        footprint.note()
    wait_until_gone(footprint, 2.0)


@pytest.fixture(autouse=True)
def mended(failing: FailingDrive) -> Iterator[None]:
    """No fault outlives its test."""
    failing.mend()
    yield
    failing.mend()


@pytest.mark.parametrize(("kind", "times"), [("eio", 1), ("eio", 3), ("eagain", 2), ("enodev", 1), ("short", 40)])
def test_what_passes_is_not_noticed(
    kind: Kind, times: int, llm: LLM, failing: FailingDrive, expected: list[list[int]]
) -> None:
    before, pids = retries(llm), llm.pids()
    failing.fail(kind, after=7, times=times)
    assert tokens(llm) == expected
    assert retries(llm) == before + (0 if kind == "short" else times)
    assert llm.pids() == pids


@pytest.mark.parametrize(("kind", "cause"), [("eio", "Input/output error"), ("enodev", "No such device")])
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


@pytest.mark.parametrize(("seconds", "patience_s"), [(2.5, 1.0), pytest.param(30.0, None, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("block", [0, -1])
def test_bytes_that_come_out_wrong_once_are_read_again(
    block: int, store: Path, failing: FailingDrive, expected: list[list[int]]
) -> None:
    """On the first load of a block, which is when checksums are looked at; the sweep is done again."""
    stored = [one for one in Manifest.load(store).blocks if one.kind not in ("embedding", "head")][block]
    failing.fail("flip", times=1, offset=stored.offset + stored.nbytes // 2)
    with start(store, failing) as llm:
        assert tokens(llm) == expected


def pipo(store: Path, failing: FailingDrive, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pipo_ray.cli", "run", str(store), "--prompt-ids", "5,6,7", "--max-tokens", "3"),
            *("--memory", "2GiB", "--weight-memory", "450KiB", "--device", "cpu", "--ray-address", "local", *more),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, env=os.environ | failing.environment,
    )  # fmt: skip


def test_the_command_line_says_it_in_one_line(store: Path, failing: FailingDrive) -> None:
    """Here what is read is never what is on the drive."""
    stored = next(one for one in Manifest.load(store).blocks if one.kind not in ("embedding", "head"))
    failing.fail("flip", offset=stored.offset + 1)
    done = pipo(store, failing)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"pipo: error: block {stored.name} in {store}"), line
    assert "damaged" not in line or "pack the checkpoint again" in line
    assert not session_processes()
