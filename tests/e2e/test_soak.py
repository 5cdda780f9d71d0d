"""A short soak; the long one is benchmarks/soak.py."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from pipo_ray import LLM

from .checkpoints import BYTES_LLAMA, make_checkpoint


def script() -> ModuleType:
    return load_script("soak.py")


def test_a_slope_is_that_of_the_line() -> None:
    found, error = script().slope(range(10), [3.0 + 2.0 * x for x in range(10)])
    assert found == pytest.approx(2.0)
    assert error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.slow
def test_descriptors_and_threads_do_not_grow(tmp_path: Path) -> None:
    """While requests join, leave and are aborted."""
    folder = make_checkpoint(tmp_path / "checkpoint", BYTES_LLAMA, tokenizer=True)
    with LLM(folder, memory="3GiB", weight_memory="450KiB", ray_address="local") as llm:
        rows = script().soak(llm, 150, join=True)
    assert {"driver", "NvmeLoader", "StagingPool", "ComputeWorker", "Scheduler"} <= {row["process"] for row in rows}
    for row in rows:
        for what in ("descriptors", "threads"):
            before, after = row[what]
            assert after <= before, f"{row['process']}: {before} {what} have become {after}"
