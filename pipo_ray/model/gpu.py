"""The GPU's side of a stage: memory limit, resident pieces, pinned slots."""

from __future__ import annotations

import threading
from typing import Any

import torch

from pipo_ray.errors import BudgetError, ResourceError
from pipo_ray.messages import ComputeSetup, StageSetup
from pipo_ray.pipeline.device_ops import CudaOps
from pipo_ray.pipeline.device_stream import DeviceStream
from pipo_ray.pipeline.stage_memory import StageMemory
from pipo_ray.pipeline.tracing import TraceWriter
from pipo_ray.session.memory import format_size


def check_device(device: str) -> None:
    """Raise ResourceError for CUDA where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "device cuda was asked for, but torch sees no CUDA device; use --device cpu or install a "
            "CUDA build of torch"
        )


def choose_attention_kernels() -> None:
    """Keep cuDNN out of torch's attention. It makes a plan for every length of keys, 35 - 60 ms each time (torch 2.11,
    H100): with one request every token has a new length.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def limit_gpu_memory(compute: ComputeSetup, device: torch.device) -> None:
    """Hold torch's allocator to the GPU budget minus what the CUDA context takes. Raises BudgetError if the context
    leaves nothing.
    """
    if compute.gpu_memory_bytes is None:
        return
    total = torch.cuda.get_device_properties(device).total_memory
    left = compute.gpu_memory_bytes - compute.gpu_context_bytes
    if left <= 0:
        raise BudgetError(
            f"--gpu-memory {format_size(compute.gpu_memory_bytes)} is less than the CUDA context itself takes "
            f"({format_size(compute.gpu_context_bytes)}); raise it"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, left / total), device)


def gpu_memory_in_use(device: torch.device) -> dict[str, Any]:
    """Most bytes that torch's allocator reserved, and the device's use as the driver sees it (all processes); how often
    the allocator had to give memory back for want of a place, for which the device must be idle. {} on the CPU.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    reserved = torch.cuda.max_memory_reserved(device)
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return {
        "gpu_reserved_bytes": reserved, "gpu_context_bytes": context, "gpu_device_bytes": reserved + context,
        "gpu_alloc_retries": retries,
    }  # fmt: skip


def open_device_stream(setup: StageSetup, memory: StageMemory, ops: CudaOps, trace: TraceWriter) -> DeviceStream:
    """Slots pinned, resident pieces loaded onto the GPU, and the stream that feeds from both."""
    slots = [torch.from_numpy(slot) for slot in memory.slots]
    residents = [torch.from_numpy(piece) for piece in memory.residents]
    for slot in slots:
        ops.pin(slot)
    # Registering takes 0.4 s per GB; a copy from a piece that is not yet registered is only slower.
    threading.Thread(target=lambda: [ops.pin(piece) for piece in residents], name="pin", daemon=True).start()
    gpu_residents = {
        index: ops.allocate(setup.plan.pieces[index].read_bytes) for index in setup.placement.gpu_residents
    }
    return DeviceStream(
        setup.plan,
        lambda: memory.load_order(setup),
        lambda: memory.copy_order(setup),
        memory.preload_order(setup),
        memory.table,
        slots,
        residents,
        setup.placement.slot_bytes,
        setup.placement.num_gpu_slots,
        gpu_residents,
        ops,
        trace,
    )
