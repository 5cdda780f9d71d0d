"""A KV cache in few bits whose pages are on the drive, through the real actors: the text is that of one process with
all of it in memory; a loader that is killed loses no page, and a compute worker's successor computes them again; and
who asks again begins on them.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Architecture
from harness import Pipeline, pack_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.plan.budget import PROCESS_BYTES, plan_run
from pipo_ray.plan.disk_pages import DiskPages
from pipo_ray.plan.kv_disk import least_ram_bytes
from pipo_ray.plan.low_bit_pages import low_bit_kv
from pipo_ray.plan.transfer import Mode
from pipo_ray.prepare import prepare_store
from pipo_ray.quant.kv_policy import KVPrecision

from .checkpoints import VOCAB_SIZE, make_checkpoint, packed, prompts_of

LONG, SHORT = prompts_of((2700, 40), VOCAB_SIZE)
# So many new tokens that whoever looks for pages that come back, on a busy machine, finds them before the text ends.
NEW, CHUNK, WEIGHTS = 40, 500, 450 << 10


def details(llm: LLM, stage: str) -> dict[str, Any]:
    return next(one for one in llm.report()["stages"] if one["stage"] == stage)


@pytest.mark.parametrize("actor", ["NvmeLoader", pytest.param("ComputeWorker", marks=pytest.mark.slow)])
def test_text_is_that_of_one_process_whoever_is_killed(actor: str, mode: Mode, tmp_path: Path) -> None:
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 8192}
    checkpoint = make_checkpoint(tmp_path / "long-llama", Architecture("long-llama", "Llama", "llama", config))
    one_process = pack_checkpoint(checkpoint, tmp_path / "store", torch.float32)
    with Pipeline(one_process, kv_bits=(8, 4, 8), chunk=CHUNK, slot_bytes=1 << 20, resident_pieces=None) as pipeline:
        expected = pipeline.greedy([LONG, SHORT], NEW)
    policy = tmp_path / "kv.json"
    policy.write_text('{"layers": [["1", 4], ["*", 8]]}')
    prepared = prepare_store(packed(checkpoint))
    low = low_bit_kv(KVPrecision.parse(str(policy)), prepared.facts)
    without = plan_run(prepared.manifest, prepared.facts, memory_bytes=4 << 30, weight_memory_bytes=WEIGHTS,
                       max_batch_tokens=CHUNK, max_kv_sequences=2)  # fmt: skip
    sizes = DiskPages.of(prepared.facts, low)
    two = 2 * sizes.window_bytes + sizes.num_layers * sizes.page_bytes
    kv_bytes = least_ram_bytes(prepared.facts, low, num_windows=0) + two
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    with LLM(
        checkpoint, memory=PROCESS_BYTES + without.activation_bytes + WEIGHTS + kv_bytes, weight_memory=WEIGHTS,
        ray_address="local", device="cpu", max_batch_tokens=CHUNK, max_kv_tokens=2 * 3072, max_kv_sequences=2,
        kv_on_disk="8MiB", kv_precision=str(policy), mode=mode,
    ) as llm:  # fmt: skip
        assert any("tokens at 8 and 4 bits: " in line and "windows at 16 bits: 2" in line for line in llm.describe())
        computed, victim = details(llm, "Scheduler")["tokens_computed"], llm.pids()[actor]
        done = threading.Event()

        def kill_when_pages_come_back() -> None:
            while not done.wait(0.05):
                if int(details(llm, "NvmeLoader")["kv_loaded_bytes"]) > 0:
                    os.kill(victim, signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill_when_pages_come_back)
        killer.start()
        try:
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in (LONG, SHORT)], params)
        finally:
            done.set()
            killer.join()
        assert llm.pids()[actor] != victim
        assert [output.outputs[0].token_ids for output in outputs] == expected
        again = details(llm, "Scheduler")["tokens_computed"] - computed - len(LONG) - len(SHORT) - 2 * (NEW - 1)
        assert again == 0 or actor == "ComputeWorker"
        before = details(llm, "Scheduler")
        (output,) = llm.generate([{"prompt_token_ids": LONG}], params)
        assert output.outputs[0].token_ids == expected[0]
        after = details(llm, "Scheduler")
        assert after["tokens_reused"] - before["tokens_reused"] == len(LONG) - 1
        assert after["tokens_computed"] - before["tokens_computed"] == NEW
