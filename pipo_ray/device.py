"""Which device to compute on, found out without loading torch into the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipo_ray.errors import InputError, ResourceError

_ASK_S = 120.0
_CONTEXT_GUESS = 850 << 20

# Run in a child process: a CUDA context would cost the driver hundreds of megabytes, of RAM as well as of the GPU.
_QUESTION = """
import json, subprocess, time, torch
if not torch.cuda.is_available():
    print(json.dumps(None))
    raise SystemExit
try:
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    before = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
    before = None
torch.backends.cuda.enable_cudnn_sdp(False)  # as in the compute worker
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(1, 4, 64, 64, device="cuda", dtype=dtype)
    torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True) @ x
    torch.softmax(x.float(), -1).cumsum(-1).sort()
torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
free += torch.cuda.memory_reserved()
try:
    here = torch.ones(32 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device="cuda")
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        for _ in range(4):
            there.copy_(here, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    link = 4 * here.nbytes / min(seconds)
except RuntimeError:
    link = 0.0
large = torch.ones(64 << 20, dtype=torch.float32)  # beyond what the processor's caches hold
seconds = []
for _ in range(5):
    begin = time.perf_counter()
    large.sum()
    seconds.append(time.perf_counter() - begin)
print(json.dumps([free, None if before is None else max(0, before - free), link, large.nbytes / min(seconds)]))
"""


@dataclass(frozen=True)
class Device:
    """`kind` is "cpu" or "cuda"; on a GPU `free_bytes` are free beside our own context, which takes `context_bytes`.
    What crosses to it from pinned memory, and what all of the processor's threads read from RAM, in bytes per second;
    0 where that is not known.
    """

    kind: str
    free_bytes: int = 0
    context_bytes: int = 0
    link_bytes_per_s: float = 0.0
    ram_bytes_per_s: float = 0.0


def choose_device(wanted: str) -> Device:
    """The device for "auto", "cpu" or "cuda". Raises ResourceError for CUDA where there is none."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {wanted!r} is not known; one of auto, cpu, cuda")
    if wanted == "cpu":
        return Device("cpu")
    present = Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()
    gpu = _ask_gpu() if present else None
    if gpu is None and wanted == "cuda":
        why = "torch cannot use the GPU (is it a CUDA build?)" if present else "this machine has no NVIDIA device"
        raise ResourceError(f"device cuda was asked for, but {why}; use --device cpu")
    return gpu or Device("cpu")


def _ask_gpu() -> Device | None:
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _QUESTION], capture_output=True, timeout=_ASK_S, check=False, text=True
        )
        figures = json.loads(answer.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
    if figures is None:
        return None
    free, context, link, ram = figures
    # Kernels are loaded as they are first used: a real run's context ends up a little larger than the child's.
    measured = _CONTEXT_GUESS if context is None else int(context * 1.1) + (32 << 20)
    return Device("cuda", free, measured, link, ram)
