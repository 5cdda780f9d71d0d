"""A mixture of experts whose KV pages are on the drive, through the real actors: one loader for experts and pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from architectures import BY_SLUG, Architecture

from pipo_ray import LLM, SamplingParams
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.plan.kv_disk import disk_page_bytes, least_ram_bytes
from pipo_ray.plan.transfer import Mode
from pipo_ray.prepare import prepare_store

from .checkpoints import VOCAB_SIZE, make_checkpoint, packed, prompts_of, reference_greedy, reference_logits
from .test_kv_on_disk import CHUNK, details, memory

LONG, SHORT = prompts_of((9 * PAGE_TOKENS, 40), VOCAB_SIZE)
NEW = 8
WEIGHTS = 800 << 10


@pytest.mark.parametrize(
    "mode", [pytest.param("performance", marks=pytest.mark.slow), "memory-saver"], indirect=True, scope="module"
)
def test_text_is_transformers(mode: Mode, tmp_path: Path) -> None:
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096}
    mixtral = Architecture("long-mixtral", "Mixtral", "mixtral", {**BY_SLUG["mixtral"].options, **config})
    folder = make_checkpoint(tmp_path / "long-mixtral", mixtral)
    store = packed(folder)
    facts = prepare_store(str(store)).facts
    kv_bytes = least_ram_bytes(facts) + facts.num_layers * disk_page_bytes(facts)
    with LLM(
        store, memory=memory(store, kv_bytes, WEIGHTS), weight_memory=WEIGHTS, ray_address="local", device="cpu",
        max_batch_tokens=CHUNK, max_kv_tokens=len(LONG) + len(SHORT) + 2 * PAGE_TOKENS, kv_on_disk="8MiB", mode=mode,
    ) as llm:  # fmt: skip
        assert llm._plan.placement.num_slots == (6 if mode == "performance" else 2)
        outputs = llm.generate([LONG, SHORT], SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True))
        loader = details(llm, "NvmeLoader")
        report = llm.report()
        (logits,) = llm.score([SHORT])
    expected = [reference_greedy(folder, prompt, NEW) for prompt in (LONG, SHORT)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    wanted = reference_logits(folder, SHORT)
    assert (np.abs(logits - wanted).max(-1) / np.abs(wanted).max(-1)).max() <= 1e-4
    assert report["streamed_bytes_per_sweep"] > report["model_bytes"] / 3
    assert loader["kv_loaded_bytes"] > loader["kv_saved_bytes"] > 0
