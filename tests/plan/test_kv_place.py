"""Whether a GPU's KV cache is in RAM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan.budget_models import GIB, model, plan

from pipo_ray import planner
from pipo_ray.device import Device
from pipo_ray.errors import BudgetError
from pipo_ray.plan.budget import RunPlan
from pipo_ray.plan.kv_place import MachineRates, attends_on_cpu
from pipo_ray.plan.low_bit_pages import LowBitKV
from pipo_ray.plan.transfer import Transfer
from pipo_ray.planner import OpenKVPlace, choose_plan, open_kv_place

TOKEN_BYTES = 8 * 32768
GPU = {"gpu_memory_bytes": 1 * GIB, "gpu_context_bytes": 500 << 20, "memory_bytes": 16 * GIB}
RATES = MachineRates(link=50e9, ram=100e9, drive=2e9)
DEVICE = Device("cuda", 8 * GIB, 500 << 20, RATES.link, RATES.ram)


def plans(kv_tokens: int, **options: int) -> tuple[RunPlan, RunPlan]:
    """With the KV cache on the GPU, and in RAM: 1.6 GB of weights, of which the GPU has room for a seventh."""
    manifest, facts = model(24, 2048, 1000)
    facts = replace(facts, kv_bytes_per_token=TOKEN_BYTES, num_layers=24)
    both = [
        plan((manifest, facts), **{**GPU, **options}, max_kv_tokens=kv_tokens, kv_on_cpu=on) for on in (False, True)
    ]
    return both[0], both[1]


def chosen(kv_tokens: int, rates: MachineRates = RATES, **options: int) -> bool:
    return attends_on_cpu(*plans(kv_tokens, **options), kv_tokens, kv_tokens * TOKEN_BYTES, rates)


def test_what_the_kv_takes_from_the_weights_decides() -> None:
    on_gpu, on_cpu = plans(800)
    assert on_cpu.copied_bytes_per_sweep < 0.94 * on_gpu.copied_bytes_per_sweep
    assert chosen(800)
    assert not chosen(100)  # 3 % of what moves


def test_a_slow_processor_or_memory_leaves_it_on_the_gpu() -> None:
    assert not chosen(800, replace(RATES, ram=5e9))
    assert chosen(800, replace(RATES, ram=50e9))


def test_requests_that_would_wait_for_each_other_count() -> None:
    on_gpu, on_cpu = plans(6000)
    assert on_gpu.kv_tokens < 6000 <= on_cpu.kv_tokens
    assert chosen(6000)
    # Reading 1.5 GB of KV in every sweep takes longer than the weights do, but less than several times the weights.
    slow = replace(RATES, ram=1.5 * 6000 * TOKEN_BYTES / (1.2 * on_gpu.copied_bytes_per_sweep / RATES.link))
    assert chosen(6000, slow)


def test_not_if_weights_would_come_from_the_drive_instead() -> None:
    on_gpu, on_cpu = plans(4000, memory_bytes=4 * GIB)
    assert on_cpu.streamed_bytes_per_sweep > on_gpu.streamed_bytes_per_sweep
    assert not attends_on_cpu(on_gpu, on_cpu, 4000, 4000 * TOKEN_BYTES, RATES)


@pytest.fixture(params=["avx512", "avx2"])
def compiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "instruction_set", lambda: request.param)


@pytest.mark.usefixtures("compiles")
def test_it_is_open_where_nobody_chose_and_everything_is_known() -> None:
    facts = replace(model(24, 2048, 1000)[1], kv_bytes_per_token=TOKEN_BYTES)
    known = {"tokens": 800, "precision": "bfloat16", "elsewhere": False}
    assert open_kv_place(DEVICE, facts, None, **known) == OpenKVPlace(800, TOKEN_BYTES)  # type: ignore[arg-type]
    few = LowBitKV((4,) * 24, 1000, 0, TOKEN_BYTES)
    assert open_kv_place(DEVICE, facts, few, **known) == OpenKVPlace(800, 1000)  # type: ignore[arg-type]
    for change in ({"tokens": None}, {"precision": "float16"}, {"elsewhere": True}):
        assert open_kv_place(DEVICE, facts, None, **{**known, **change}) is None  # type: ignore[arg-type]
    others = [
        (replace(DEVICE, link_bytes_per_s=0.0), facts),
        (Device("cpu"), facts),
        (DEVICE, replace(facts, ragged=False)),
    ]
    for device, of in others:
        assert open_kv_place(device, of, None, **known) is None  # type: ignore[arg-type]


def test_it_is_not_open_where_attention_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "instruction_set", lambda: None)
    facts = replace(model(24, 2048, 1000)[1], kv_bytes_per_token=TOKEN_BYTES)
    assert open_kv_place(DEVICE, facts, None, tokens=8, precision="bfloat16", elsewhere=False) is None


def choose(kv_tokens: int, place: OpenKVPlace | None, **options: int) -> tuple[RunPlan, list[str]]:
    manifest, facts = model(24, 2048, 1000)
    facts = replace(facts, kv_bytes_per_token=TOKEN_BYTES, num_layers=24)

    def one(*, transfer: Transfer, kv_on_cpu: bool) -> RunPlan:
        return plan(
            (manifest, facts), **{**GPU, **options}, max_kv_tokens=kv_tokens, kv_on_cpu=kv_on_cpu, transfer=transfer
        )

    return choose_plan(one, [Path("/store")], Path("/cache"), DEVICE, "performance", kv_place=place)


def test_the_faster_plan_is_taken_and_said() -> None:
    found, lines = choose(800, OpenKVPlace(800, TOKEN_BYTES))
    assert found.kv_on_cpu
    assert "KV cache in RAM: " in lines[0]
    assert "--no-kv-on-cpu" in lines[0]
    found, lines = choose(800, None)
    assert not found.kv_on_cpu
    assert not lines
    found, lines = choose(100, OpenKVPlace(100, TOKEN_BYTES))
    assert not found.kv_on_cpu
    assert not lines


def test_a_gpu_without_room_for_the_least_kv_leaves_it_to_ram() -> None:
    small = {"gpu_memory_bytes": 710 << 20}
    with pytest.raises(BudgetError, match="--gpu-memory"):
        choose(400, None, **small)
    found, _ = choose(400, OpenKVPlace(400, TOKEN_BYTES), **small)
    assert found.kv_on_cpu
    with pytest.raises(BudgetError, match="--gpu-memory"):  # the first reason, not that of the second try
        choose(400, OpenKVPlace(400, TOKEN_BYTES), gpu_memory_bytes=510 << 20)
