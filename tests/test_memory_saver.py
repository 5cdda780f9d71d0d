"""The switch of `make test-memory-saver`: who chose no mode has another's staging."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.checkpoints import packed
from memory_saver import small_staging

from pipo_ray.plan.transfer import choose_transfer

FOLDER = str(Path(small_staging.__file__).parent)
PLAN = """
import sys
from pipo_ray import LLM

def say(llm):
    placement = llm._plan.placement
    print(placement.num_slots * placement.slot_bytes, len(llm._plan.sweep.pieces))
    sys.exit()

LLM(sys.argv[1], memory="3GiB", weight_memory="400KiB", device="cpu", ray_address="local", before_start=say)
"""


def staging(store: Path, **environment: str) -> tuple[int, ...]:
    """Bytes of slots, and the number of pieces, of a run that another process plans."""
    own = {name: value for name, value in os.environ.items() if name not in (small_staging.SWITCH, "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(store)], env=own | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


def test_a_process_that_is_started_plans_in_memory_saver(tiny_checkpoint: Callable[..., Path]) -> None:
    store = packed(tiny_checkpoint("LlamaConfig"))
    usual, pieces = staging(store, PYTHONPATH=FOLDER)
    saving, more_pieces = staging(store, PYTHONPATH=FOLDER, PIPO_TEST_MODE="memory-saver")
    assert saving <= usual // 2
    assert more_pieces > pieces


def test_this_process_is_as_it_was_asked_for() -> None:
    from pipo_ray import planner

    found, usual = planner.choose_transfer(()), choose_transfer(())
    if small_staging.switched():
        assert found.staging_bytes * small_staging.TIMES_SMALLER <= usual.staging_bytes // 4
        assert FOLDER in os.environ["PYTHONPATH"].split(os.pathsep)
    else:
        assert found == usual


def test_another_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(small_staging.SWITCH, "fast")
    with pytest.raises(ValueError, match="PIPO_TEST_MODE=fast is not known"):
        small_staging.install()
