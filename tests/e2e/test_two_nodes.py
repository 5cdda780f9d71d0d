"""On a cluster of several nodes all four actors stay on the driver's node, where the slots are."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipo_ray import LLM, SamplingParams

from .checkpoints import BYTES_LLAMA, VOCAB_SIZE, make_checkpoint, prompts_of

CLUSTER = Path(__file__).parents[1] / "session" / "two_node_cluster.py"


@pytest.fixture
def address() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    child = subprocess.Popen(
        [sys.executable, str(CLUSTER), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    line = child.stdout.readline().strip()
    assert line, "the cluster did not start"
    yield line
    child.communicate("", timeout=30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(120)  # without the affinity it waits for ever
def test_the_actors_are_where_the_slots_are(address: str, tmp_path: Path) -> None:
    import ray

    folder = make_checkpoint(tmp_path / "model", BYTES_LLAMA)
    (prompt,) = prompts_of((5,), VOCAB_SIZE)
    with LLM(folder, memory="3GiB", weight_memory="450KiB", ray_address=address) as llm:
        (output,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 3
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        here = ray.get_runtime_context().get_node_id()
        stage = llm._stage
        for actor in (stage.staging_pool, stage.nvme_loader, stage.compute_worker, stage.scheduler):
            info = ray._private.state.actors(actor._actor_id.hex())
            assert info["Address"]["NodeID"] == here
