"""From what a run asks for, and what was measured of this machine, to its plan: the one place where that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipo_ray.compiled.support import instruction_set
from pipo_ray.device import Device
from pipo_ray.errors import BudgetError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.budget import RunPlan
from pipo_ray.plan.drive_probe import describe_drive, drive_profiles
from pipo_ray.plan.kv_place import MachineRates, attends_on_cpu
from pipo_ray.plan.low_bit_pages import LowBitKV
from pipo_ray.plan.transfer import Mode, ReadRate, Transfer, choose_transfer, slowest

_UNMEASURED_DRIVE = 2e9
"""Bytes per second of a drive where there was nothing to measure, because the caller knows its transfer."""


class PlanRun(Protocol):
    """`plan_run`, with what does not depend on the machine's rates."""

    def __call__(self, *, transfer: Transfer, kv_on_cpu: bool) -> RunPlan:
        """Raises BudgetError."""


@dataclass(frozen=True)
class OpenKVPlace:
    """Nobody says where a GPU's KV cache of `tokens` tokens, `token_bytes` each, is to be."""

    tokens: int
    token_bytes: int


def asks_for_rates(*, tokens: int | None, elsewhere: bool) -> bool:
    """Whether `open_kv_place` may find a place open, as far as that is known before the model is: then the rates of a
    GPU's link and of RAM matter.
    """
    return tokens is not None and not elsewhere and instruction_set() is not None


def open_kv_place(
    device: Device,
    facts: ModelFacts,
    low_bit_kv: LowBitKV | None,
    *,
    tokens: int | None,
    precision: str,
    elsewhere: bool,
) -> OpenKVPlace | None:
    """Whether the KV cache may as well be in RAM: on a machine with a GPU, for a known number of tokens, where the
    processor's attention is compiled, and which nobody wants `elsewhere`. None: it may not.
    """
    measured = device.link_bytes_per_s > 0 and device.ram_bytes_per_s > 0
    if device.kind != "cuda" or not measured or tokens is None:
        return None
    if not asks_for_rates(tokens=tokens, elsewhere=elsewhere) or precision != "bfloat16":
        return None
    if not facts.ragged or not facts.kv_bytes_per_token:
        return None
    return OpenKVPlace(tokens, facts.kv_bytes_per_token if low_bit_kv is None else low_bit_kv.token_bytes)


def choose_plan(
    plan: PlanRun,
    folders: Sequence[Path],
    cache: Path,
    device: Device,
    mode: Mode,
    *,
    transfer: Transfer | None = None,
    kv_on_cpu: bool = False,
    kv_place: OpenKVPlace | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[RunPlan, list[str]]:
    """The plan of a run whose store is in `folders`, and lines for the user about what it is chosen by. Drives are
    measured if weights stream from them and no `transfer` is given. Raises BudgetError.
    """
    on_gpu = device.kind == "cuda"
    unmeasured = transfer or choose_transfer((), mode, num_drives=len(folders), on_gpu=on_gpu)
    try:
        found = plan(transfer=unmeasured, kv_on_cpu=kv_on_cpu)
    except BudgetError as error:
        if kv_place is None:
            raise
        # The least KV cache may be what the GPU has no room for.
        try:
            found, kv_on_cpu, kv_place = plan(transfer=unmeasured, kv_on_cpu=True), True, None
        except BudgetError:
            raise error from None
    profiles: list[tuple[ReadRate, ...]] = []
    if transfer is None and found.streamed_bytes_per_sweep:
        profiles = drive_profiles(folders, cache, on_progress)
    chosen, lines = unmeasured, []
    if profile := slowest(profiles):
        sizes = {"model_bytes": found.model_bytes, "weight_bytes": found.weight_bytes}
        chosen = choose_transfer(profile, mode, num_drives=len(folders), on_gpu=on_gpu, **sizes)
        found = plan(transfer=chosen, kv_on_cpu=kv_on_cpu)
        lines.append(describe_drive(profiles[0], chosen, *profiles[1:]))
    if kv_place is not None:
        drive = len(folders) * max((point.bytes_per_s for point in profile), default=_UNMEASURED_DRIVE)
        rates = MachineRates(device.link_bytes_per_s, device.ram_bytes_per_s, drive)
        beside = _with_kv_in_ram(plan, chosen, found, kv_place, rates)
        if beside is not None:
            lines.append(
                f"KV cache in RAM: {beside.copied_bytes_per_sweep / 1e9:.1f} GB instead of "
                f"{found.copied_bytes_per_sweep / 1e9:.1f} cross to the GPU in a sweep, at "
                f"{rates.link / 1e9:.1f} GB/s; the processor reads {rates.ram / 1e9:.0f} GB/s (--no-kv-on-cpu keeps "
                "it on the GPU)"
            )
            found = beside
    return found, lines


def _with_kv_in_ram(
    plan: PlanRun, transfer: Transfer, on_gpu: RunPlan, kv: OpenKVPlace, rates: MachineRates
) -> RunPlan | None:
    """The plan with the KV cache in RAM, if that is faster."""
    try:
        on_cpu = plan(transfer=transfer, kv_on_cpu=True)
    except BudgetError:
        return None
    kv_bytes = kv.tokens * kv.token_bytes
    return on_cpu if attends_on_cpu(on_gpu, on_cpu, kv.tokens, kv_bytes, rates) else None
