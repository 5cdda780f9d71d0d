"""A peer's rows as a table of plain text: the peers' environments have no rich. Imports nothing but Python's own."""

from __future__ import annotations

from typing import Any

HEADER = f"{'peer':>20}{'row':>16}{'s/sweep':>10}{'spread':>18}{'GPU GB':>8}{'budget':>7}  what stays where"


def line(report: dict[str, Any], row: dict[str, Any]) -> str:
    """A line below `HEADER`, of a `row` as `measurement.py` writes it into the `report`: seconds are the median of the
    sweeps that count and its spread their least and most; GB are 1e9 bytes that torch reserved at most, plus the CUDA
    context, with a `!` behind more than the budget. A row that failed has its reason instead.
    """
    peer = report["peer"]
    start = f"{peer + ' ' + report['versions'][peer]:>20}{_name(row):>16}"
    if "failed" in row:
        return f"{start}  failed: {_first_line(row['failed'])}"
    spread = f"{min(row['all_seconds']):.3f} - {max(row['all_seconds']):.3f}"
    used, over = "", ""
    if "gpu_max_reserved_bytes" in row:
        used = f"{(row['gpu_max_reserved_bytes'] + row['gpu_context_bytes']) / 1e9:.2f}"
        over = "" if row["within_budget"] else "!"
    return (
        f"{start}{row['seconds']:10.3f}{spread:>18}{used:>8}{report['gpu_memory'] / 1e9:7.2f}{over or ' '}"
        f" {row['placement']}; KV {row['kv_cache']}"
    )


def table(report: dict[str, Any]) -> str:
    """All rows, below where they were measured and from where the weights came."""
    title = f"{report['device']}, the other weights from {report['from']}, {report['checkpoint']}"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([title, versions, HEADER, *(line(report, row) for row in report["rows"])])


def _name(row: dict[str, Any]) -> str:
    return f"batch {row['batch']}" if row["kind"] == "decode" else f"prompt {row['batch']}x{row['length']}"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
