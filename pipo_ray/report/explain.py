"""Which resource limits a run, and what would help most, in two sentences: from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipo_ray.session.memory import format_size

_SLOTS_AND_MARGIN = 0.02
_STARTING_SHARE = 0.5


@dataclass(frozen=True)
class Measured:
    """One run. Seconds and bytes are totals over its sweeps; `sweep_s` is the time from the first sweep to the end.

    `tokens_per_sweep` is what a sweep of decoding produced; `device` "cpu" or "cuda". Of several loaders `reading_s` is
    that of the busiest, `bytes_read` what all have read. `waiting_s` includes what was waited for KV pages on the
    drive, `waiting_for_pages_s`, of which `page_bytes` were read. `reading_s` has no part of `paused_s`, in which the
    loader that paused most gave way to other programs.
    """

    device: str
    sweeps: int
    elapsed_s: float
    computing_s: float
    waiting_s: float
    scheduling_s: float
    reading_s: float
    bytes_read: int
    streamed_per_sweep: int
    model_bytes: int
    resident_bytes: int
    memory_bytes: int
    tokens_per_sweep: float
    waiting_for_pages_s: float = 0.0
    page_bytes: int = 0
    paused_s: float = 0.0

    @property
    def sweeping_s(self) -> float:
        """What the sweeps took, calls between the actors included."""
        return self.computing_s + self.waiting_s + self.scheduling_s


def measured(report: Mapping[str, Any], generated_tokens: int) -> Measured:
    """The figures of `LLM.report()`."""
    stages = {stage["stage"]: stage for stage in report["stages"]}
    compute = stages.get("ComputeWorker", {})
    loaders = [times for name, times in stages.items() if name.startswith("NvmeLoader")]
    scheduler = stages.get("Scheduler", {})
    return Measured(
        device="cuda" if report.get("gpu_memory_bytes") else "cpu",
        sweeps=report["sweeps"],
        elapsed_s=report["elapsed_s"],
        computing_s=compute.get("busy_s", 0.0),
        waiting_s=compute.get("waiting_s", 0.0),
        scheduling_s=scheduler.get("busy_s", 0.0),
        reading_s=max((loader.get("busy_s", 0.0) for loader in loaders), default=0.0),
        bytes_read=sum(loader.get("bytes_read", 0) for loader in loaders),
        streamed_per_sweep=report["streamed_bytes_per_sweep"],
        model_bytes=report["model_bytes"],
        resident_bytes=report["resident_bytes"],
        memory_bytes=report["memory_budget_bytes"],
        tokens_per_sweep=generated_tokens / max(1, report["sweeps"]),
        waiting_for_pages_s=compute.get("kv_waited_s", 0.0),
        page_bytes=sum(loader.get("kv_loaded_bytes", 0) for loader in loaders),
        paused_s=max((loader.get("paused_s", 0.0) for loader in loaders), default=0.0),
    )


def explain(run: Measured) -> tuple[str, str]:
    """(what limits the run, what would help most). Both with the figures that they rest on."""
    if not run.sweeps or run.sweeping_s <= 0:
        return "Nothing was generated, so nothing limits this run.", "Give a prompt and ask for a token."
    if run.sweeping_s < (1 - _STARTING_SHARE) * run.elapsed_s:
        return (
            f"Starting up limits this run: {run.sweeping_s:.1f} s of {run.elapsed_s:.1f} s went into its "
            f"{_count(run.sweeps, 'sweep')}.",
            "More tokens or more prompts in one run, or `pipo chat`, share the one start.",
        )
    waiting_for_weights_s = run.waiting_s - run.waiting_for_pages_s
    paused_s = min(run.paused_s, waiting_for_weights_s)
    shares = {
        "weights": (waiting_for_weights_s - paused_s) / run.sweeping_s,
        "pauses": paused_s / run.sweeping_s,
        "pages": run.waiting_for_pages_s / run.sweeping_s,
        "compute": run.computing_s / run.sweeping_s,
        "scheduler": run.scheduling_s / run.sweeping_s,
    }
    limit = max(shares, key=lambda name: shares[name])
    if limit == "scheduler":
        return (
            f"Calls between the actors limit this run: they took {_percent(shares[limit])} of its "
            f"{_count(run.sweeps, 'sweep')}, {1000 * run.scheduling_s / run.sweeps:.1f} ms each.",
            _batch_helps(run, "a sweep has this cost once, however many prompts share it"),
        )
    if limit == "compute":
        where = "GPU" if run.device == "cuda" else "CPU"
        return (
            f"The {where} limits this run: the compute worker computed {_percent(shares[limit])} of the time and "
            f"waited for weights {_percent(waiting_for_weights_s / run.sweeping_s)}.",
            _compute_helps(run),
        )
    if limit == "pages":
        return (
            f"KV pages on the drive limit this run: the compute worker waited for them {_percent(shares[limit])} of "
            f"the time, {format_size(run.page_bytes // run.sweeps)} were read in a sweep.",
            "More --memory keeps more of them in RAM.",
        )
    if limit == "pauses":
        between, with_pauses = (_rate(run.bytes_read, s) for s in (run.reading_s, run.reading_s + run.paused_s))
        return (
            "Other programs limit this run: while they used the drive it gave way to them, for "
            f"{_percent(min(1.0, run.paused_s / run.sweeping_s))} of the time.",
            "It goes on at once without --background, or by itself when they are done: it read at "
            f"{between} between its pauses, at {with_pauses} with them.",
        )
    return _waiting(run, waiting_for_weights_s / run.sweeping_s)


def _waiting(run: Measured, share: float) -> tuple[str, str]:
    reading = run.reading_s / (run.sweeping_s or 1)
    waited = f"the compute worker waited for weights {_percent(share)} of the time"
    if run.device == "cuda" and (not run.streamed_per_sweep or reading < share / 2):
        return (
            f"The link to the GPU limits this run: {waited}, and the drive was busy only {_percent(min(1.0, reading))} "
            "of it.",
            _batch_helps(run, "what crosses the link then serves them all; more --gpu-memory keeps more on the GPU"),
        )
    if not run.streamed_per_sweep:
        return (
            f"The first loading of the weights limits this run: {waited}, and nothing streams after it.",
            f"More tokens in one run: it had {_count(run.sweeps, 'sweep')}, and only the first one loads.",
        )
    rate = run.bytes_read / run.reading_s if run.reading_s else 0.0
    first = f"The drive limits this run: {waited} while the loader read at {_rate(run.bytes_read, run.reading_s)}."
    missing = int(run.streamed_per_sweep * (1 + _SLOTS_AND_MARGIN))
    step = min(missing, max(1, run.memory_bytes // 4))
    saved_s = min(run.waiting_s / run.sweeps, min(step, run.streamed_per_sweep) / rate) if rate else 0.0
    sweep_s = run.sweeping_s / run.sweeps
    faster = sweep_s / max(sweep_s - saved_s, 1e-9) - 1
    kept = "all of the model" if step == missing else f"{format_size(run.resident_bytes + step)} of it"
    second = (
        f"{format_size(step)} more --memory would keep {kept} resident and make a sweep of {sweep_s:.2f} s "
        f"about {_percent(faster)} faster"
    )
    if 3 * run.computing_s < run.sweeping_s:
        second += "; twice as many prompts at once would nearly double tokens/s"
    return first, second + "."


def _compute_helps(run: Measured) -> str:
    weights = run.streamed_per_sweep or run.model_bytes
    if run.tokens_per_sweep < 4:
        return _batch_helps(run, f"a sweep reads {format_size(weights)} of weights, however many prompts share it")
    return (
        f"A faster processor, or a GPU: with {run.tokens_per_sweep:.1f} tokens in a sweep of "
        f"{run.sweeping_s / run.sweeps:.2f} s, neither memory nor a faster drive would change more than the "
        f"{_percent(run.waiting_s / run.sweeping_s)} of waiting."
    )


def _batch_helps(run: Measured, why: str) -> str:
    return f"More prompts at once help most ({run.tokens_per_sweep:.1f} tokens came out of a sweep): {why}."


def _rate(num_bytes: int, seconds: float) -> str:
    bytes_per_s = num_bytes / seconds if seconds else 0.0
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
