"""The claim of benchmarks/cgroup_budget.py: in a memory group of --memory, a model three times that size generates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cgroup_budget.py"
LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
MEMORY = 1500 << 20
FACTOR = 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0 or not LIMIT.exists(), reason="needs root and the memory controller of cgroup v1")
@pytest.mark.skipif(shutil.disk_usage(tempfile.gettempdir()).free < 15 << 30, reason="needs 15 GiB of disk")
def test_a_model_three_times_the_memory_generates_to_the_end(tmp_path: Path) -> None:
    result_file = tmp_path / "result.json"
    options = ["--memory", str(MEMORY), "--factor", str(FACTOR), "--tokens", "4", "--json", str(result_file)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    result = json.loads(result_file.read_text())
    assert result["oom_kill"] == 0
    assert result["max_usage_in_bytes"] <= MEMORY
    assert result["checkpoint"] >= FACTOR * MEMORY
    assert len(result["token_ids"]) == 4
    assert result["bytes_streamed"] > 4 * MEMORY
    # What cannot be dropped, mapped code in full, and the plan for it: there is room to spare.
    running = [result["peaks"][phase]["kept and files"] for phase in ("starting", "short prompt", "long prompt")]
    assert max(running) < 0.95 * MEMORY
    assert result["measured"]["activations"] <= result["activations"]
