"""Whether a GPU's KV cache is better off in RAM, where the processor attends. A choice between two plans of one run.

What the KV cache takes of a GPU's budget, weights do not have, and cross the link once more in every sweep. In RAM it
takes nothing from them there, but the processor has to read it in every sweep, as fast as RAM gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipo_ray.plan.budget import RunPlan

# Of a sweep: what an estimate may be wrong by before a run is worth another way than the usual one.
_LEAST_GAIN = 0.05
# Beside the link's copies, which read the same RAM, and with calls and waits in every layer.
_ATTENTION_COST = 1.5


@dataclass(frozen=True)
class MachineRates:
    """Bytes per second, as measured: pinned copies to the GPU (`link`), the processor reading (`ram`), the drive."""

    link: float
    ram: float
    drive: float


def attends_on_cpu(on_gpu: RunPlan, on_cpu: RunPlan, kv_tokens: int, kv_bytes: int, rates: MachineRates) -> bool:
    """Whether `on_cpu`, which has the KV cache in RAM, is the faster plan for `kv_tokens` tokens of all requests, which
    take `kv_bytes`. False where it has to read more from the drive.
    """
    if on_cpu.streamed_bytes_per_sweep > on_gpu.streamed_bytes_per_sweep or on_cpu.kv_tokens < kv_tokens:
        return False
    # Requests that there is no room for wait until others have ended: so much more often all weights move.
    turns = max(1.0, kv_tokens / on_gpu.kv_tokens)
    attending = _ATTENTION_COST * kv_bytes / rates.ram
    beside = max(_moving_s(on_cpu, rates), attending)
    return beside <= (1 - _LEAST_GAIN) * turns * _moving_s(on_gpu, rates)


def _moving_s(plan: RunPlan, rates: MachineRates) -> float:
    """Seconds in which a sweep's weights have moved."""
    from_drive = plan.streamed_bytes_per_sweep / rates.drive if plan.streamed_bytes_per_sweep else 0.0
    return max(plan.copied_bytes_per_sweep / rates.link, from_drive)
