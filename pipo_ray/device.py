"""Which device to compute on, found out without loading torch into the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipo_ray.errors import InputError, ResourceError
from pipo_ray.gpu_probe import GpuAnswer

_ASK_S = 120.0
_CONTEXT_GUESS = 850 << 20
# Not `-m`, which would put the current folder in front of the path.
_CHILD = (
    "import os, sys; sys.path[:] = os.environ.pop('PIPO_PYTHONPATH').split(os.pathsep); "
    "from pipo_ray.gpu_probe import main; main()"
)


@dataclass(frozen=True)
class Device:
    """`kind` is "cpu" or "cuda"; on a GPU `free_bytes` are free beside our own context, which takes `context_bytes`.
    What crosses to it from pinned memory, and what all of the processor's threads read from RAM, in bytes per second;
    0 where that is not known, or nobody asked.
    """

    kind: str
    free_bytes: int = 0
    context_bytes: int = 0
    link_bytes_per_s: float = 0.0
    ram_bytes_per_s: float = 0.0


def choose_device(wanted: str, rates_folder: Path | None = None) -> Device:
    """The device for "auto", "cpu" or "cuda"; with `rates_folder`, where they are kept, a GPU's rates as well. Raises
    ResourceError for CUDA where there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {wanted!r} is not known; one of auto, cpu, cuda")
    if wanted == "cpu":
        return Device("cpu")
    present = Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()
    gpu = _ask_gpu(rates_folder) if present else None
    if gpu is None and wanted == "cuda":
        why = "torch cannot use the GPU (is it a CUDA build?)" if present else "this machine has no NVIDIA device"
        raise ResourceError(f"device cuda was asked for, but {why}; use --device cpu")
    return gpu or Device("cpu")


def _ask_gpu(rates_folder: Path | None) -> Device | None:
    command = [sys.executable, "-c", _CHILD, *([] if rates_folder is None else [str(rates_folder)])]
    environment = os.environ | {"PIPO_PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        said = subprocess.run(
            command, capture_output=True, timeout=_ASK_S, check=False, text=True, env=environment
        ).stdout
        raw = json.loads(said.strip().splitlines()[-1])
        answer = None if raw is None else GpuAnswer.from_json(raw)
    except (OSError, ValueError, IndexError, TypeError, KeyError, subprocess.TimeoutExpired):
        return None
    if answer is None:
        return None
    # Kernels are loaded as they are first used: a real run's context ends up a little larger than the child's.
    context = _CONTEXT_GUESS if answer.context_bytes is None else int(answer.context_bytes * 1.1) + (32 << 20)
    return Device("cuda", answer.free_bytes, context, answer.rates.link, answer.rates.ram)
