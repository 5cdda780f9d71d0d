"""A KV cache in few bits through the real actors: the text is that of one process, also when the compute worker dies
and its successor rebuilds the cache, and a conversation goes on where it ended.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from harness import Pipeline, pack_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.cli.main import main
from pipo_ray.errors import InputError

from .checkpoints import VOCAB_SIZE, make_checkpoint, prompts_of

NUM_TOKENS = 12
PROMPTS = prompts_of((250, 20, 290), VOCAB_SIZE)
POLICY = '{"layers": [["1", 16], ["*", 4]]}'
BITS = (4, 16, 4)


@pytest.fixture(scope="module")
def checkpoint(bytes_llama: Path) -> Path:
    return bytes_llama


@pytest.mark.parametrize("dies", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lives", "dies"])
def test_text_is_that_of_one_process(dies: bool, checkpoint: Path, tmp_path: Path) -> None:
    packed = pack_checkpoint(checkpoint, tmp_path / "store", torch.float32)
    with Pipeline(packed, kv_bits=BITS, chunk=64, resident_pieces=1 << 20) as pipeline:
        expected = pipeline.greedy(PROMPTS, NUM_TOKENS)
        next_turn = PROMPTS[0] + expected[0] + prompts_of((9,), VOCAB_SIZE, 3)[0]
        expected_then = pipeline.greedy([next_turn], NUM_TOKENS)
    with Pipeline(packed, chunk=64, resident_pieces=1 << 20) as pipeline:
        assert pipeline.greedy(PROMPTS, NUM_TOKENS) != expected, "4 bits change nothing here: the test shows nothing"
    file = tmp_path / "kv.json"
    file.write_text(POLICY)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(checkpoint, memory="3GiB", ray_address="local", kv_precision=str(file)) as llm:
        assert any("tokens at 16 and 4 bits, " in line for line in llm.describe())
        assert any("the KV cache is unpacked for every token" in line for line in llm.describe())  # in float32
        newest: dict[str, list[int]] = {}
        worker = llm.pids()["ComputeWorker"]
        killed = not dies
        for output in llm.stream(PROMPTS, params):
            newest[output.request_id] = output.outputs[0].token_ids
            if not killed and sum(map(len, newest.values())) > 12:
                os.kill(worker, signal.SIGKILL)
                killed = True
        assert [newest[request] for request in sorted(newest, key=int)] == expected
        assert killed
        assert (llm.pids()["ComputeWorker"] != worker) == dies
        (output,) = llm.generate([next_turn], params)
        assert [output.outputs[0].token_ids] == expected_then
        (scheduler,) = (one for one in llm.report()["stages"] if one["stage"] == "Scheduler")
        assert scheduler["tokens_reused"] == len(PROMPTS[0]) + NUM_TOKENS - 1


def test_what_cannot_be_is_refused_before_anything_starts(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    falcon = make_checkpoint(tmp_path / "falcon", "falcon")
    with pytest.raises(InputError, match="architecture 'falcon' keeps its model's own KV cache, which has 16 bits"):
        LLM(falcon, memory="3GiB", kv_precision=8)
    for elsewhere in ({"kv_in_ram": True}, {"kv_on_disk": "1GiB"}):
        with pytest.raises(InputError, match="and --kv-on-cpu are two places for the same KV cache"):
            LLM(checkpoint, memory="3GiB", kv_precision=8, kv_on_cpu=True, **elsewhere)
    assert main(["run", str(checkpoint), "--prompt-ids", "5,6", "--kv-precision", "5"]) == 2
    assert "--kv-precision 5: a KV cache has 16, 8 or 4 bits" in capfd.readouterr().err
