"""What CUDA's first device has free, and how fast the way to it is. `main` is for a child process (`device.py`),
because a CUDA context costs hundreds of megabytes, of RAM as well as of the GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipo_ray.json_file import keep_first, key_of

if TYPE_CHECKING:
    import torch

_LINK_BYTES = 32 << 20
_RAM_BYTES = 256 << 20  # beyond what a processor's caches hold
_TIMES = 5
_COPIES = 4


@dataclass(frozen=True)
class Rates:
    """Bytes per second: what crosses to the GPU from pinned memory, what all of the processor's threads read from RAM.
    0 where it cannot be measured.
    """

    link: float = 0.0
    ram: float = 0.0


@dataclass(frozen=True)
class GpuAnswer:
    """Bytes that are free beside our own context, and what that takes, None if nobody knows; rates, if they were asked
    for.
    """

    free_bytes: int
    context_bytes: int | None
    rates: Rates

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> GpuAnswer:
        """What `asdict` gave."""
        return cls(raw["free_bytes"], raw["context_bytes"], Rates(**raw["rates"]))


def kept_rates(folder: Path, facts: Mapping[str, Any], measure: Callable[[], Rates]) -> Rates:
    """The rates of a machine of which `facts` are known, as kept in `folder`, so that what is planned by them is the
    same in the next run; measured and kept if there are none.
    """
    file = folder / f"rates-{key_of(facts)}.json"

    def read() -> Rates | None:
        try:
            rates = Rates(**json.loads(file.read_text(encoding="utf-8"))["rates"])
            usable = all(0 < rate < math.inf for rate in (rates.link, rates.ram))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return rates if usable else None

    if (kept := read()) is not None:
        return kept
    measured = measure()
    if not (measured.link and measured.ram):
        return measured
    return keep_first(file, {"facts": facts, "rates": asdict(measured)}, read) or measured


def _answer(folder: Path | None) -> GpuAnswer | None:
    import torch

    if not torch.cuda.is_available():
        return None
    before = _free_by_driver()
    _load_kernels(torch.device("cuda", 0))
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    rates = Rates() if folder is None else kept_rates(folder, _facts(), lambda: Rates(_link_rate(), _ram_rate()))
    return GpuAnswer(free, None if before is None else max(0, before - free), rates)


def _load_kernels(device: torch.device) -> None:
    """Compute something, so that the context takes what it takes."""
    import torch

    from pipo_ray.model.gpu import choose_attention_kernels

    choose_attention_kernels()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 4, 64, 64, device=device, dtype=dtype)
        _ = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True) @ x
        torch.softmax(x.float(), -1).cumsum(-1).sort()
    torch.cuda.synchronize(device)


def _free_by_driver() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None


def _facts() -> dict[str, Any]:
    import torch

    from pipo_ray.model.kept_profiles import device_facts, processor_name

    device = device_facts(torch.device("cuda", 0))
    return {"processor": processor_name(), "threads": len(os.sched_getaffinity(0)), **device}


def _link_rate() -> float:
    import torch

    with suppress(RuntimeError):
        here = torch.ones(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(here, device="cuda")

        def copy() -> None:
            for _ in range(_COPIES):
                there.copy_(here, non_blocking=True)
            torch.cuda.synchronize()

        return _COPIES * here.nbytes / _least_seconds(copy)
    return 0.0


def _ram_rate() -> float:
    import torch

    large = torch.ones(_RAM_BYTES // 4, dtype=torch.float32)
    return large.nbytes / _least_seconds(large.sum)


def _least_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> None:
    """Print a `GpuAnswer` as JSON, or null where torch cannot use a GPU. Rates are asked for if a folder is named on
    the command line, where they are kept as `rates-<key>.json`.
    """
    answer = _answer(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(json.dumps(None if answer is None else asdict(answer)))
