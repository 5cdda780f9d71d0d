"""Which disks a folder lies on, and what they have transferred."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

Device = tuple[int, int]
"""Major and minor number."""


@dataclass(frozen=True)
class _Mount:
    point: str
    kind: str
    source: str
    options: str


def disks_under(folder: str | Path, *, proc: str = "/proc/self/mountinfo", sys: str = "/sys") -> frozenset[Device]:
    """The whole disks that the folder's file system is on; empty where the kernel does not say: a network, memory, an
    overlay whose folders another container has.

    Whole disks, because who uses another partition, or another volume of an encrypted disk, waits for the same one. Of
    a file system that has several disks itself (btrfs) only the one that it was mounted by is known.
    """
    seen: set[str] = set()
    path = os.path.realpath(folder)
    while path not in seen:
        seen.add(path)
        device = _device(_stat(path).st_dev)
        if _block(device, sys).exists():
            return _whole_disks(device, sys)
        mount = _mount_of(path, proc)
        if mount is None:
            break
        if mount.kind == "overlay":
            upper = _option(mount, "upperdir") or _option(mount, "lowerdir").split(":")[0]
            if not os.path.isdir(upper):
                break
            path = os.path.realpath(upper)
        else:
            source = _source_device(mount)
            return frozenset() if source is None else _whole_disks(source, sys)
    return frozenset()


def file_system(folder: str | Path, *, proc: str = "/proc/self/mountinfo") -> str:
    """The kind of file system that the folder is on, as the kernel calls it."""
    mount = _mount_of(os.path.realpath(folder), proc)
    return "unknown" if mount is None else mount.kind


def disk_bytes(devices: Collection[Device], statistics: str = "/proc/diskstats") -> int | None:
    """Bytes that these disks have read and written together; None where the kernel says it of none.

    Format: Documentation/admin-guide/iostats.rst; sectors are 512 bytes.
    """
    try:
        lines = Path(statistics).read_text().splitlines()
    except OSError:
        return None
    sectors = [
        int(fields[5]) + int(fields[9])
        for fields in map(str.split, lines)
        if (int(fields[0]), int(fields[1])) in devices
    ]
    return 512 * sum(sectors) if sectors else None


_stat = os.stat


def _device(number: int) -> Device:
    return os.major(number), os.minor(number)


def _source_device(mount: _Mount) -> Device | None:
    with contextlib.suppress(OSError):
        found = os.stat(mount.source)
        if stat.S_ISBLK(found.st_mode):
            return _device(found.st_rdev)
    return None


def _block(device: Device, sys: str) -> Path:
    return Path(sys, "dev", "block", f"{device[0]}:{device[1]}")


def _whole_disks(device: Device, sys: str) -> frozenset[Device]:
    """The disks below a partition, an encrypted or a logical volume, or an array: those that lie on no others."""
    block = Path(os.path.realpath(_block(device, sys)))
    lower = [block.parent] if (block / "partition").exists() else list((block / "slaves").glob("*"))
    found: set[Device] = set()
    for one in lower:
        with contextlib.suppress(OSError, ValueError):
            major, minor = (one / "dev").read_text().split(":")
            found |= _whole_disks((int(major), int(minor)), sys)
    return frozenset(found or {device})


def _mount_of(path: str, proc: str) -> _Mount | None:
    """The mount that `path` is in: of those whose point is above it the longest, and of equal ones the last."""
    best: _Mount | None = None
    with contextlib.suppress(OSError):
        for line in Path(proc).read_text().splitlines():
            mount = _parse(line)
            inside = os.path.commonpath([path, mount.point]) == mount.point
            if inside and (best is None or len(mount.point) >= len(best.point)):
                best = mount
    return best


def _parse(line: str) -> _Mount:
    """A line of /proc/self/mountinfo, proc_pid_mountinfo(5)."""
    before, _, after = line.partition(" - ")
    kind, source, options = after.split(" ", 2)
    return _Mount(_unescaped(before.split(" ")[4]), kind, _unescaped(source), _unescaped(options))


def _option(mount: _Mount, name: str) -> str:
    values = (option.partition("=") for option in mount.options.split(","))
    return next((value for key, _, value in values if key == name), "")


def _unescaped(text: str) -> str:
    """Space, tab, newline and backslash come as \\ and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
