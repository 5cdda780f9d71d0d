"""Sizes, control groups of both versions, and what is available to us."""

import contextlib
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import InputError
from pipo_ray.session import memory
from pipo_ray.session.memory import GIB, KIB, MIB, available_memory, format_least, format_size, memory_limit, parse_size
from pipo_ray.session.peak import PeakSampler


@pytest.mark.parametrize(
    "text, num_bytes",
    [
        *[("3GiB", 3 << 30), ("3 gib", 3 << 30), ("512MB", 512 * 10**6), ("512M", 512 << 20), ("1.5G", 3 << 29)],
        *[("1073741824", 1 << 30), ("17b", 17), (".5k", 512), ("2.TiB", 2 << 40), (" 1GiB\n", 1 << 30), (4096, 4096)],
    ],
)
def test_parse_size_takes_what_users_write(text: "str | int", num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "GiB", "3 GiBB", "-1G", "1e9", "1,5G", "0", "0.1B", "3G 2M", "nan", "\u0661G", "0x10", "99999999TiB"),
        0,
        -5,
        True,
    ],
)
def test_parse_size_refuses_anything_else_and_says_how(text: "str | int") -> None:
    with pytest.raises(InputError, match=r"--memory.*write it like 3GiB") as failure:
        parse_size(text, "--memory")
    assert repr(text) in str(failure.value)
    assert "\n" not in str(failure.value)


@given(st.integers(1, 1 << 50))
def test_parse_size_round_trips_plain_bytes(num_bytes: int) -> None:
    assert parse_size(str(num_bytes)) == parse_size(num_bytes) == num_bytes


@given(st.integers(1, 1 << 50))
def test_parse_size_reads_what_format_size_writes_within_its_rounding(num_bytes: int) -> None:
    # One decimal: 0.05 of at least 1 unit.
    assert abs(parse_size(format_size(num_bytes)) - num_bytes) <= 0.0501 * num_bytes
    assert len(format_size(num_bytes)) <= 10


@given(st.text(max_size=12))
def test_parse_size_never_fails_otherwise(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_size(text) > 0


@pytest.mark.parametrize(
    "num_bytes, text",
    [
        (17, "17 B"),
        (1 << 20, "1.0 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (5_476_083_302, "5.1 GiB"),
        (-(1 << 30), "-1.0 GiB"),
    ],
)
def test_format_size(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(0, 1 << 58))
def test_format_least_never_rounds_down_and_can_be_typed(num_bytes: int) -> None:
    text = format_least(num_bytes)
    if num_bytes:
        assert num_bytes <= parse_size(text) <= num_bytes + max(num_bytes // 100, 1)
    assert len(text) <= 12


def test_default_budget_leaves_the_larger_of_2_gib_and_a_quarter() -> None:
    assert memory.default_budget(6 * GIB) == 4 * GIB
    assert memory.default_budget(16 * GIB) == 12 * GIB
    assert memory.default_budget(1 * GIB) == 0


class FakeMachine:
    """A `/` with /proc/meminfo and control groups."""

    def __init__(self, root: Path, available_gib: float = 12) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        lines = [
            f"MemTotal: {16 * GIB // KIB} kB",
            f"MemAvailable: {int(available_gib * GIB) // KIB} kB",
            "HugePages_Total: 0",
        ]
        (root / "proc/meminfo").write_text("\n".join(lines))

    def join(self, cgroup: str, mountinfo: str) -> None:
        (self.root / "proc/self/cgroup").write_text(cgroup)
        (self.root / "proc/self/mountinfo").write_text(mountinfo)

    def v1(
        self, folder: str, limit: int = memory._UNLIMITED * 2 - 4096, usage: int = 0, peak: int = 0, **stat: int
    ) -> None:
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (path / "memory.usage_in_bytes").write_text(f"{usage}\n")
        (path / "memory.max_usage_in_bytes").write_text(f"{peak}\n")
        (path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))

    def v2(self, folder: str, limit: str = "max", high: str = "max", usage: int = 0, **stat: int) -> None:
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.high").write_text(f"{high}\n")
        (path / "memory.current").write_text(f"{usage}\n")
        (path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


V1_MOUNT = "35 25 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "25 1 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    FakeMachine(tmp_path)
    assert memory_limit(tmp_path) is None
    assert available_memory(tmp_path) == 12 * GIB


def test_cgroup_v1_takes_the_least_limit_of_all_ancestors(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.join("9:cpu,cpuacct:/x\n4:memory:/user/job\n0::/\n", V1_MOUNT)
    machine.v1("sys/fs/cgroup/memory")
    machine.v1("sys/fs/cgroup/memory/user", limit=4 * GIB, usage=3 * GIB, total_inactive_file=GIB, total_dirty=MIB)
    machine.v1("sys/fs/cgroup/memory/user/job", limit=6 * GIB, usage=GIB, peak=2 * GIB)
    assert memory_limit(tmp_path) == 4 * GIB
    # 4 GiB less what is used and cannot be dropped: 2 GiB and the dirty pages.
    assert available_memory(tmp_path) == 2 * GIB - MIB
    assert memory.own_cgroups(tmp_path)[0].peak == 2 * GIB


def test_cgroup_v1_hierarchical_limit_of_a_hidden_ancestor_counts(tmp_path: Path) -> None:
    # A container sees only its own group; the limit above it shows in memory.stat alone.
    machine = FakeMachine(tmp_path)
    machine.join("4:memory:/docker/abc\n", V1_MOUNT.replace(" / ", " /docker/abc ", 1))
    machine.v1("sys/fs/cgroup/memory", usage=GIB, hierarchical_memory_limit=3 * GIB)
    assert memory_limit(tmp_path) == 3 * GIB
    assert available_memory(tmp_path) == 2 * GIB


@pytest.mark.parametrize("own", ["/elsewhere/job", "/../job", "/gone"])
def test_a_group_outside_the_mount_falls_back_to_the_mount_point(tmp_path: Path, own: str) -> None:
    machine = FakeMachine(tmp_path)
    machine.join(f"4:memory:{own}\n", V1_MOUNT.replace(" / ", " /docker ", 1))
    machine.v1("sys/fs/cgroup/memory", limit=GIB)
    assert memory_limit(tmp_path) == GIB


def test_cgroup_v2_takes_max_and_high_of_all_ancestors(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.join("0::/user.slice/run.scope\n", V2_MOUNT)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)  # the root group has no memory files
    machine.v2("sys/fs/cgroup/user.slice", limit=str(8 * GIB), high=str(5 * GIB), usage=2 * GIB, active_file=GIB)
    machine.v2("sys/fs/cgroup/user.slice/run.scope", usage=GIB)
    assert memory_limit(tmp_path) == 5 * GIB
    assert available_memory(tmp_path) == 4 * GIB


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, available_gib=1)
    machine.join("0::/a\n", V2_MOUNT)
    machine.v2("sys/fs/cgroup/a", limit=str(64 * GIB))
    assert memory_limit(tmp_path) is None
    assert available_memory(tmp_path) == GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.join("0::/a\n", V2_MOUNT)
    machine.v2("sys/fs/cgroup/a", limit=str(GIB), usage=2 * GIB)
    assert available_memory(tmp_path) == 0


CHILD = """
import sys, time
from pipo_ray.session import memory
from pipo_ray.session.peak import PeakSampler
import os
print(memory.memory_limit(), memory.available_memory())
with PeakSampler(lambda: [os.getpid()], 0.02) as sampler:
    block = bytearray(64 << 20)
    time.sleep(0.1)
    del block
print(sampler.peak_bytes, sampler.source)
"""


def test_a_real_cgroup_limit_is_seen_and_the_kernel_names_the_peak() -> None:
    parent = next(
        (group.path for group in memory.own_cgroups() if (group.path / "memory.limit_in_bytes").exists()), None
    )
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("no writable cgroup v1 memory controller")
    group = parent / f"pipo-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(512 * MIB))
        child = subprocess.run(
            ["/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", sys.executable, "-c", CHILD],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        limit, available, peak, source = child.stdout.split()
        assert int(limit) == 512 * MIB
        assert 300 * MIB < int(available) < 512 * MIB
        assert source == "cgroup"
        assert 64 * MIB < int(peak) < 256 * MIB
    finally:
        deadline = time.monotonic() + 5
        while True:
            try:
                group.rmdir()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_shm_free_is_zero_where_there_is_none(tmp_path: Path) -> None:
    assert memory.shm_free(tmp_path / "missing") == 0
    assert memory.shm_free() > 0


def test_pss_counts_a_shared_page_once() -> None:
    size = 32 * MIB
    shared = mmap.mmap(-1, size)
    shared.write(b"x" * size)
    pids = [os.getpid()]
    alone = memory.proportional_size(pids)
    code = "import sys; sys.stdin.read(1)"
    before = memory.resident_sizes(pids)
    child = os.fork()
    if child == 0:
        sum(shared[::4096])
        time.sleep(30)
        os._exit(0)
    other = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
    try:
        time.sleep(0.5)
        both = memory.proportional_size([os.getpid(), child])
        assert both < alone + size // 2
        # The cheap counters take the shared memory of one process only, too.
        assert memory.resident_sizes([os.getpid(), child]) < 2 * before
        assert memory.page_tables([other.pid]) > 0
        assert memory.proportional_size([child, 2**22 + 1]) > 0  # a pid that does not exist counts nothing
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        other.communicate(b"x")


def test_peak_sampler_sees_a_short_peak_of_a_child() -> None:
    code = "import time; x = bytearray(96 << 20); print(flush=True); time.sleep(0.6); del x; print(flush=True)"
    code += "; time.sleep(30)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    try:
        with PeakSampler(lambda: [child.pid], 0.05) as sampler:
            assert child.stdout
            child.stdout.readline()
            child.stdout.readline()
        assert sampler.source == "pss"
        assert 96 * MIB < sampler.peak_bytes < 128 * MIB
        assert sampler.stop() == sampler.peak_bytes
        assert memory.proportional_size([child.pid]) < 32 * MIB
    finally:
        child.kill()
        child.communicate()
