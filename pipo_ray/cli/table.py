"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipo_ray.outputs import RequestOutput
from pipo_ray.session.memory import format_size

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, str]


def print_table(console: Console, outputs: Sequence[RequestOutput], report: dict[str, Any]) -> None:
    """What the run took, for a person."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, show_header=False)
    for rows in (_token_rows(outputs, report), _memory_rows(report), _stage_rows(report)):
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        table.add_section()
    console.print(table)


def _token_rows(outputs: Sequence[RequestOutput], report: dict[str, Any]) -> list[Row]:
    metrics = [output.metrics for output in outputs]
    generated = sum(one.num_generated_tokens for one in metrics)
    prompt = sum(one.num_prompt_tokens for one in metrics)
    rows = [("tokens", f"{generated} generated, {prompt} in {_count(len(metrics), 'prompt')}")]
    if reused := sum(stage.get("tokens_reused", 0) for stage in report.get("stages", ())):
        rows.append(("shared prefixes", f"{_count(reused, 'token')} not computed again"))
    first = [one.ttft_s for one in metrics if one.ttft_s is not None]
    if first:
        rows.append(("time to first token", _span(first, "s")))
    rates = [one.tokens_per_s for one in metrics if one.tokens_per_s is not None]
    if rates:
        each = "" if len(metrics) == 1 else " each"
        rows.append(("tokens/s", _span(rates, "") + each))
    sweeps, streamed = report.get("sweeps", 0), report.get("bytes_streamed", 0)
    if streamed:
        streams = (
            f"{format_size(streamed)} in {_count(sweeps, 'sweep')}, {format_size(streamed // max(1, sweeps))} each"
        )
    else:
        streams = f"none in {_count(sweeps, 'sweep')}: the whole model stays in memory"
    rows.append(("bytes streamed", streams))
    return rows


def _memory_rows(report: dict[str, Any]) -> list[Row]:
    rows = []
    if budget := report.get("memory_budget_bytes"):
        peak = report.get("peak_memory_bytes", 0)
        rows.append(("memory budget", f"{format_size(budget)}, peak {format_size(peak)} ({100 * peak // budget} %)"))
    if weights := report.get("weight_memory_bytes"):
        resident, model = report.get("resident_bytes", 0), report.get("model_bytes", 0)
        share = "all of it" if resident >= model else f"{format_size(resident)} of {format_size(model)}"
        rows.append(("weight memory budget", f"{format_size(weights)}, {share} resident"))
    if gpu := report.get("gpu_memory_bytes"):
        rows.append(("GPU memory budget", format_size(gpu)))
    if unpinned := sum(stage.get("unpinned_bytes", 0) for stage in report.get("stages", ())):
        rows.append(("not pinned", f"{format_size(unpinned)}: CUDA refused to register it, copies of it are slower"))
    return rows


def _stage_rows(report: dict[str, Any]) -> list[Row]:
    idle = () if report.get("streamed_bytes_per_sweep", 1) else ("NvmeLoader", "StagingPool")
    return [
        (str(one["stage"]), "nothing to stream" if one["stage"].split("-")[0] in idle else _shares(one))
        for one in report.get("stages", ())
    ]


def _shares(stage: dict[str, Any]) -> str:
    shares = [f"{name} {100 * stage[name]:.0f} %" for name in ("busy", "waiting", "starved")]
    if paused := stage.get("paused"):
        shares.append(f"gave way {100 * paused:.0f} %")
    return ", ".join(shares)


def _span(values: Sequence[float], unit: str) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return (low if low == high else f"{low} to {high}") + (f" {unit}" if unit else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
