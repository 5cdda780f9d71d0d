"""How often the kernel's out-of-memory killer has struck in the memory groups we are in."""

from pathlib import Path

from pipo_ray.session.memory import SYSTEM_ROOT, own_cgroups


def oom_kills(root: Path = SYSTEM_ROOT) -> int:
    """Processes killed in our control group and its ancestors since these exist (v1 `memory.oom_control`, v2
    `memory.events`).
    """
    most = 0
    for group in own_cgroups(root):
        for name in ("memory.oom_control", "memory.events"):
            try:
                lines = (group.path / name).read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                field, _, count = line.partition(" ")
                if field == "oom_kill":
                    most = max(most, int(count))
    return most
