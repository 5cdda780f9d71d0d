"""Two sentences for every kind of limit, with the figures that they rest on."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipo_ray.report.explain import Measured, explain, measured

GIB = 1 << 30
# Ten sweeps of 4 s, 3 GiB streamed in each at 1 GiB/s: 1 s of 4 computing.
DRIVE = Measured(
    device="cpu", sweeps=10, elapsed_s=45.0, computing_s=10.0, waiting_s=29.9, scheduling_s=0.1, reading_s=30.0,
    bytes_read=30 * GIB, streamed_per_sweep=3 * GIB, model_bytes=7 * GIB, resident_bytes=4 * GIB,
    memory_bytes=6 * GIB, tokens_per_sweep=1.0,
)  # fmt: skip


def test_the_drive_and_what_more_memory_would_save() -> None:
    limit, help_ = explain(DRIVE)
    assert limit == (
        "The drive limits this run: the compute worker waited for weights 75 % of the time while the loader read at "
        "1.1 GB/s."
    )
    # A quarter of --memory more is 1.5 GiB less to read in each sweep: 1.5 s of 4.
    assert help_ == (
        "1.5 GiB more --memory would keep 5.5 GiB of it resident and make a sweep of 4.00 s about 60 % faster; twice "
        "as many prompts at once would nearly double tokens/s."
    )


def test_kv_pages_on_the_drive() -> None:
    limit, help_ = explain(replace(DRIVE, waiting_for_pages_s=25.0, page_bytes=20 * GIB))
    assert limit == (
        "KV pages on the drive limit this run: the compute worker waited for them 62 % of the time, 2.0 GiB were read "
        "in a sweep."
    )
    assert "More --memory" in help_
    limit, _ = explain(replace(DRIVE, waiting_for_pages_s=5.0, page_bytes=GIB))
    assert "waited for weights 62 % of the time" in limit


def test_giving_way_to_other_programs() -> None:
    """Of 29.9 s of waiting 28 were pauses: it is not the drive that is slow."""
    limit, help_ = explain(replace(DRIVE, reading_s=2.0, bytes_read=2 * GIB, paused_s=28.0))
    assert limit == (
        "Other programs limit this run: while they used the drive it gave way to them, for 70 % of the time."
    )
    assert help_ == (
        "It goes on at once without --background, or by itself when they are done: it read at 1.1 GB/s between its "
        "pauses, at 71.6 MB/s with them."
    )
    limit, _ = explain(replace(DRIVE, paused_s=5.0))
    assert limit.startswith("The drive limits this run: the compute worker waited for weights 75 % of the time")
    # Pauses while slots were full cost nothing.
    assert explain(replace(DRIVE, computing_s=35.0, waiting_s=4.0, paused_s=30.0))[0].startswith("The CPU")


def test_no_more_memory_is_asked_for_than_is_missing() -> None:
    _, help_ = explain(replace(DRIVE, memory_bytes=60 * GIB))
    assert help_.startswith("3.1 GiB more --memory would keep all of the model resident")


def test_more_prompts_do_not_help_where_computing_takes_as_long() -> None:
    _, help_ = explain(replace(DRIVE, computing_s=15.0, waiting_s=25.0))
    assert "prompts" not in help_


@pytest.mark.parametrize("device, name", [("cpu", "CPU"), ("cuda", "GPU")])
def test_computing(device: str, name: str) -> None:
    limit, help_ = explain(replace(DRIVE, device=device, computing_s=35.0, waiting_s=4.9))
    assert limit.startswith(f"The {name} limits this run: the compute worker computed 88 % of the time")
    assert "waited for weights 12 %" in limit
    assert help_.startswith("More prompts at once help most (1.0 tokens")
    _, help_ = explain(replace(DRIVE, device=device, computing_s=35.0, waiting_s=4.9, tokens_per_sweep=64.0))
    assert "faster processor" in help_


@pytest.mark.parametrize("streamed, reading_s", [(3 * GIB, 4.0), (0, 0.0)])
def test_the_link(streamed: int, reading_s: float) -> None:
    limit, help_ = explain(replace(DRIVE, device="cuda", reading_s=reading_s, streamed_per_sweep=streamed))
    assert limit.startswith("The link to the GPU limits this run: the compute worker waited for weights 75 %")
    assert "--gpu-memory" in help_


def test_a_drive_that_is_always_busy_limits_a_gpu_too() -> None:
    assert explain(replace(DRIVE, device="cuda"))[0].startswith("The drive limits")


def test_calls_between_the_actors() -> None:
    limit, help_ = explain(replace(DRIVE, computing_s=1.0, waiting_s=1.0, scheduling_s=38.0))
    assert limit == "Calls between the actors limit this run: they took 95 % of its 10 sweeps, 3800.0 ms each."
    assert "prompts" in help_


def test_starting_up() -> None:
    limit, help_ = explain(replace(DRIVE, elapsed_s=100.0))
    assert limit == "Starting up limits this run: 40.0 s of 100.0 s went into its 10 sweeps."
    assert "chat" in help_


def test_nothing_streams() -> None:
    limit, help_ = explain(replace(DRIVE, streamed_per_sweep=0, resident_bytes=7 * GIB))
    assert limit.startswith("The first loading of the weights limits this run")
    assert "only the first one loads" in help_
    assert explain(replace(DRIVE, streamed_per_sweep=0, computing_s=30.0, waiting_s=1.0))[0].startswith("The CPU")


def test_nothing_was_generated() -> None:
    limit, _ = explain(replace(DRIVE, sweeps=0, computing_s=0.0, waiting_s=0.0, scheduling_s=0.0))
    assert limit.startswith("Nothing was generated")


# One run for each sentence that `explain` can answer with.
EVERY_KIND = (
    DRIVE,
    replace(DRIVE, computing_s=15.0, waiting_s=25.0),
    replace(DRIVE, waiting_for_pages_s=25.0, page_bytes=20 * GIB),
    replace(DRIVE, paused_s=28.0),
    replace(DRIVE, computing_s=35.0, waiting_s=4.0),
    replace(DRIVE, computing_s=35.0, waiting_s=4.0, tokens_per_sweep=64.0),
    replace(DRIVE, device="cuda", reading_s=4.0),
    replace(DRIVE, computing_s=1.0, waiting_s=1.0, scheduling_s=38.0),
    replace(DRIVE, streamed_per_sweep=0, resident_bytes=7 * GIB),
    replace(DRIVE, elapsed_s=100.0),
    replace(DRIVE, sweeps=0),
)


def test_every_kind_is_two_sentences() -> None:
    pairs = [explain(run) for run in EVERY_KIND]
    assert len({pair[0].split(" limit")[0] for pair in pairs}) == 9
    for pair in pairs:
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(pair))
        assert sentences == list(pair)
        assert all(sentence.endswith(".") for sentence in sentences)


def test_the_figures_come_from_a_report() -> None:
    stages = [
        {"stage": "NvmeLoader", "busy_s": 30.0, "waiting_s": 1.0, "paused_s": 2.0, "bytes_read": 30 * GIB},
        {"stage": "ComputeWorker", "busy_s": 10.0, "waiting_s": 29.9},
        {"stage": "Scheduler", "busy_s": 0.1, "waiting_s": 39.9},
    ]
    report = {
        "stages": stages, "sweeps": 10, "elapsed_s": 45.0, "streamed_bytes_per_sweep": 3 * GIB,
        "model_bytes": 7 * GIB, "resident_bytes": 4 * GIB, "memory_budget_bytes": 6 * GIB, "gpu_memory_bytes": None,
    }  # fmt: skip
    assert measured(report, 10) == replace(DRIVE, paused_s=2.0)


def test_several_loaders_read_at_the_same_time() -> None:
    stages = [
        {"stage": "NvmeLoader", "busy_s": 30.0, "waiting_s": 1.0, "bytes_read": 30 * GIB},
        {"stage": "NvmeLoader-2", "busy_s": 20.0, "waiting_s": 11.0, "bytes_read": 28 * GIB},
    ]
    sizes = dict.fromkeys(("streamed_bytes_per_sweep", "model_bytes", "resident_bytes", "memory_budget_bytes"), GIB)
    found = measured({"stages": stages, "sweeps": 3, "elapsed_s": 40.0, **sizes}, 3)
    assert (found.reading_s, found.bytes_read) == (30.0, 58 * GIB)
