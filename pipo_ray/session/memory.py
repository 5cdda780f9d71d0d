"""Memory of the machine, of the control groups above us, and of our own processes. All sizes are bytes.

Functions that read the system take `root`, the folder that stands for `/`, so that tests can show them another machine.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipo_ray.errors import InputError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SYSTEM_ROOT = Path("/")

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2^63.
_UNLIMITED = 1 << 62

_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "ki": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mi": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gi": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "ti": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", re.ASCII)


def parse_size(value: "str | int", name: str = "size") -> int:
    """Bytes from what a user writes: `3GiB`, `512MB`, `1.5G`, or a plain number of bytes.

    KiB, MiB, GiB, TiB and the bare letters K, M, G, T are powers of 1024; KB, MB, GB, TB are powers of 1000. Case and
    a space before the unit do not matter.

    Args:
        value: the text, or bytes as an integer.
        name: what the size is for ("--memory"); the error names it.
    Raises:
        InputError: no such form, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        match = _SIZE.fullmatch(value.strip().lower()) if isinstance(value, str) else None
        if match is None or match[2] not in _UNITS:
            raise InputError(f"{name}: {value!r} is not a size; write it like 3GiB, 512MB, 1.5G or 1073741824")
        unit = _UNITS[match[2]]
        if "." in match[1]:
            whole, _, fraction = match[1].partition(".")
            # In integers, because 2^53 is only 8 PiB away and 1.1G should not depend on binary fractions.
            number = int(whole or "0") * unit + int(fraction or "0") * unit // 10 ** len(fraction)
        else:
            number = int(match[1]) * unit
    if number <= 0:
        raise InputError(f"{name}: {value!r} is not a size above zero; write it like 3GiB, 512MB, 1.5G or 1073741824")
    if number >= _UNLIMITED:
        raise InputError(f"{name}: {value!r} is more than any machine has; write it like 3GiB, 512MB or 1.5G")
    return number


def format_size(num_bytes: int) -> str:
    """Bytes as a person reads them, in powers of 1024: `5.1 GiB`, `640.0 MiB`, `17 B`."""
    sign, rest = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    for unit, suffix in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        # 1023.96 MiB would print as 1024.0 MiB: take the next unit from where rounding would say so.
        if rest >= unit - unit // 2048:
            return f"{sign}{rest / unit:.1f} {suffix}"
    return f"{sign}{rest} B"


def format_least(num_bytes: int) -> str:
    """Bytes as a person reads them and may type as they stand: rounded up, by less than 1 %, and never down."""
    for unit, suffix in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            digits = 1 if num_bytes >= 10 * unit else 2
            scale: int = 10**digits
            whole, rest = divmod(-(-num_bytes * scale // unit), scale)
            return f"{whole}.{rest:0{digits}d} {suffix}"
    return f"{num_bytes} B"


def machine_total(root: Path = SYSTEM_ROOT) -> int:
    """RAM of the machine, MemTotal."""
    return _meminfo(root)["MemTotal"]


def machine_available(root: Path = SYSTEM_ROOT) -> int:
    """RAM that programs can take without swapping, MemAvailable: the machine's view, whatever limit we run under."""
    info = _meminfo(root)
    # MemAvailable is missing before Linux 3.14 and on some container runtimes.
    if "MemAvailable" in info:
        return info["MemAvailable"]
    return info["MemFree"] + info.get("Cached", 0) - info.get("Shmem", 0)


def _meminfo(root: Path) -> dict[str, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines) if rest}


@dataclass(frozen=True)
class Cgroup:
    """Memory figures of one control group. All in bytes; None where the group states none.

    Attributes:
        path: its folder under the mount.
        limit: the least of its hard limit, its throttling limit (v2 `memory.high`) and, on v1, its hierarchical limit.
        usage: everything charged to it and its children, page cache and shared memory included.
        reclaimable: the clean page cache in `usage` that the kernel drops before it kills anyone.
        peak: highest `usage` since the group exists (v2: since Linux 5.19).
    """

    path: Path
    limit: int | None
    usage: int | None
    reclaimable: int
    peak: int | None


def own_cgroups(root: Path = SYSTEM_ROOT) -> list[Cgroup]:
    """The memory control groups we are in, ours first, then every ancestor up to the mount point; v1 and v2."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    groups: list[Cgroup] = []
    for fields in (line.split() for line in mounts):
        try:
            separator = fields.index("-")
        except ValueError:
            continue
        kind, options = fields[separator + 1], fields[separator + 3].split(",")
        if kind == "cgroup" and "memory" in options:
            own = [path for _, controllers, path in entries if "memory" in controllers.split(",")]
            read = _read_v1
        elif kind == "cgroup2":
            own = [path for number, controllers, path in entries if number == "0" and not controllers]
            read = _read_v2
        else:
            continue
        if own:
            mount = root / _unescape(fields[4]).lstrip("/")
            groups += [read(folder) for folder in _ancestors(mount, _unescape(fields[3]), own[0])]
    return groups


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _ancestors(mount: Path, mounted: str, own: str) -> list[Path]:
    """Folders from our group up to the mount point.

    Args:
        mount: mount point.
        mounted: the group that is mounted there; in a container not always the root.
        own: our group as /proc/self/cgroup names it. It may lie outside the mounted part (another cgroup namespace);
            then the mount point is the nearest group that we can see.
    """
    relative = os.path.relpath(own, mounted) if own.startswith("/") and mounted.startswith("/") else ".."
    folder = mount if relative.startswith("..") else mount / relative
    if not folder.is_dir():
        folder = mount
    folders = [folder]
    while folder != mount:
        folder = folder.parent
        folders.append(folder)
    return folders


def _read_v1(folder: Path) -> Cgroup:
    stat = _stat(folder)
    limits = [_number(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return Cgroup(
        path=folder,
        limit=_least(limits),
        usage=_number(folder / "memory.usage_in_bytes"),
        reclaimable=max(0, cache - stat.get("total_dirty", 0) - stat.get("total_writeback", 0)),
        peak=_number(folder / "memory.max_usage_in_bytes"),
    )


def _read_v2(folder: Path) -> Cgroup:
    stat = _stat(folder)
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return Cgroup(
        path=folder,
        # memory.high throttles instead of killing; a run beyond it crawls, so it counts as a limit.
        limit=_least([_number(folder / "memory.max"), _number(folder / "memory.high")]),
        usage=_number(folder / "memory.current"),
        reclaimable=max(0, cache - stat.get("file_dirty", 0) - stat.get("file_writeback", 0)),
        peak=_number(folder / "memory.peak"),
    )


def _least(limits: "list[int | None]") -> int | None:
    real = [limit for limit in limits if limit is not None and limit < _UNLIMITED]
    return min(real, default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines) if value.strip().isdigit()}


def memory_limit(root: Path = SYSTEM_ROOT) -> int | None:
    """The least limit of all control groups above us, or None when none limits us below the machine's RAM."""
    limits = [group.limit for group in own_cgroups(root) if group.limit is not None]
    limit = min(limits, default=None)
    return limit if limit is not None and limit < machine_total(root) else None


def available_memory(root: Path = SYSTEM_ROOT) -> int:
    """Bytes that we can still take: the machine's available RAM, or less where a control group leaves less."""
    available = machine_available(root)
    for group in own_cgroups(root):
        if group.limit is not None:
            available = min(available, group.limit - ((group.usage or 0) - group.reclaimable))
    return max(0, available)


def default_budget(available: int) -> int:
    """What `--memory` is when the user gives none: available RAM minus the larger of 2 GiB and a quarter of it.

    Never negative; 0 where less than 2 GiB are available.
    """
    return max(0, available - max(2 * GIB, available // 4))


def shm_free(folder: "str | Path" = "/dev/shm") -> int:
    """Bytes that this user can still write to the shared memory file system; 0 where there is none."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def proportional_size(pids: Iterable[int], root: Path = SYSTEM_ROOT) -> int:
    """PSS summed over processes: a page that n processes share counts 1/n in each, so the sum counts it once.

    Shared memory and mapped files are in it; page tables are not (see `page_tables`). The kernel walks every page
    table for it, about 18 ms per GiB and process. A process that is gone, or not ours to read, counts 0.
    """
    return sum(_field(root / f"proc/{pid}/smaps_rollup", ("Pss",)) for pid in pids)


def page_tables(pids: Iterable[int], root: Path = SYSTEM_ROOT) -> int:
    """Bytes that the page tables of these processes take (VmPTE)."""
    return sum(_field(root / f"proc/{pid}/status", ("VmPTE",)) for pid in pids)


def resident_sizes(pids: Iterable[int], root: Path = SYSTEM_ROOT) -> int:
    """Private memory and page tables summed over processes, plus the shared memory of the one that maps most of it.

    Counters that the kernel keeps anyway: cheap, and good for differences. Mapped files are left out.
    """
    private = shared = 0
    for pid in pids:
        path = root / f"proc/{pid}/status"
        private += _field(path, ("RssAnon", "VmPTE"))
        shared = max(shared, _field(path, ("RssShmem",)))
    return private + shared


def _field(path: Path, names: tuple[str, ...]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines) if name in names)
