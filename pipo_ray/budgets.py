"""The budgets that a user gives, in bytes, checked against the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from pipo_ray.device import Device
from pipo_ray.errors import InputError
from pipo_ray.plan.kv_disk import KVOnDisk
from pipo_ray.session.kv_file import check_folder, check_room
from pipo_ray.session.memory import (
    available_memory,
    default_budget,
    format_size,
    machine_total,
    memory_limit,
    parse_size,
)

Size: TypeAlias = "int | str | None"
"""Bytes, or a size like "3GiB"; None: what the machine allows."""

_GPU_SHARE = 0.9


def memory_budget(memory: Size) -> tuple[int, str]:
    """What `--memory` says, or what is available without spoiling the PC for others; and a line about it. Raises
    InputError for more than there is.
    """
    available = available_memory()
    if memory is None:
        budget = default_budget(available)
        return budget, (
            f"memory budget {format_size(budget)}: {format_size(available)} available, minus the larger of 2 GiB and "
            "25 % for the "
            "rest of the PC (change with --memory)"
        )
    budget = parse_size(memory, "--memory")
    if budget > machine_total():
        raise InputError(
            f"--memory {format_size(budget)} is more than the {format_size(machine_total())} of RAM that this machine "
            "has; lower it"
        )
    limit = memory_limit()
    if limit is not None and budget > limit:
        raise InputError(
            f"--memory {format_size(budget)} is above the limit of the memory group we run in, "
            f"{format_size(limit)}; lower it"
        )
    return budget, f"memory budget {format_size(budget)} as asked for ({format_size(available)} available)"


def gpu_budget(gpu_memory: Size, device: Device) -> int | None:
    """What `--gpu-memory` says, or most of what is free; None without a GPU. Raises InputError for more than is free,
    and for a budget without a GPU.
    """
    if device.kind != "cuda":
        if gpu_memory is not None:
            raise InputError(
                "--gpu-memory was given, but the run computes on the CPU; leave it out or use --device cuda"
            )
        return None
    if gpu_memory is None:
        return int((device.free_bytes + device.context_bytes) * _GPU_SHARE)
    budget = parse_size(gpu_memory, "--gpu-memory")
    free = device.free_bytes + device.context_bytes
    if budget > free:
        raise InputError(
            f"--gpu-memory {format_size(budget)} is more than the {format_size(free)} that are free on the GPU; "
            "lower it"
        )
    return budget


def require_one_place(*, kv_in_ram: bool, kv_on_disk: bool, kv_on_cpu: bool) -> None:
    """Raise InputError for a KV cache that the processor attends to, and that is to be elsewhere, too."""
    for name, wanted in (("--kv-in-ram", kv_in_ram), ("--kv-on-disk", kv_on_disk)):
        if kv_on_cpu and wanted:
            raise InputError(f"{name} and --kv-on-cpu are two places for the same KV cache; leave one of them out")


def kv_on_disk_wish(wish: Size | KVOnDisk, default_folder: Callable[[], Path]) -> KVOnDisk | None:
    """What `--kv-on-disk` says: None, "auto", a size, or all of it. The default folder is made. Raises InputError for a
    folder that is not on a drive, ResourceError for one with less room.
    """
    if wish is None:
        return None
    if not isinstance(wish, KVOnDisk):
        wish = KVOnDisk(None if wish == "auto" else parse_size(wish, "--kv-on-disk"))
    if wish.folder is None:
        folder = default_folder()
        os.makedirs(folder, exist_ok=True)
        wish = replace(wish, folder=str(folder))
    check_folder(str(wish.folder))
    check_room(str(wish.folder), wish.size_bytes or 0)
    return wish
