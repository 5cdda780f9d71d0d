"""A drive that fails on demand, below `preadv`: failing_drive.c, compiled, preloaded, and told what to do."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

SOURCE = Path(__file__).with_name("failing_drive.c")

Kind = Literal[
    "none", "eio", "eagain", "enodev", "short", "stall", "flip", "einval-open", "kv-read-eio", "kv-read-flip",
    "kv-write-enospc",
]  # fmt: skip


@dataclass
class FailingDrive:
    """Processes started with `environment` see it; what it does can be changed while they run."""

    library: Path
    control: Path
    _serials: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def environment(self) -> dict[str, str]:
        """What a process, or its children, need in their environment."""
        # Ray takes LD_PRELOAD away from its workers unless it is told not to.
        return {
            "LD_PRELOAD": str(self.library),
            "PIPO_FAILING_DRIVE": str(self.control),
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
        }

    def fail(self, kind: Kind, *, after: int = 0, times: int = -1, seconds: float = 0.0, offset: int = -1) -> None:
        """See failing_drive.c."""
        new = self.control.with_suffix(".new")
        new.write_text(f"{next(self._serials)} {kind} {after} {times} {seconds} {offset}\n")
        new.rename(self.control)

    def mend(self) -> None:
        """Everything is sound again."""
        self.fail("none")


def build_failing_drive(folder: Path) -> FailingDrive:
    """Compile it into `folder`. Skips the test where there is no C compiler, or no O_DIRECT to look at."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc or cc) to build the preloaded library that makes reads fail")
    probe = folder / "probe"
    probe.write_bytes(bytes(4096))
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"the file system of {folder} has no O_DIRECT, by which the reads to fail are known")
    library = folder / "failing_drive.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    drive = FailingDrive(library, folder / "control")
    drive.mend()
    return drive
