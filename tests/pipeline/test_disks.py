"""Which whole disks are under a folder, from a kernel that is made up here, and from the one that runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipo_ray.pipeline import disks
from pipo_ray.pipeline.disks import disk_bytes, disks_under, file_system

# An NVMe drive with two partitions; on the second one an encrypted volume, and on that two logical ones.
NVME, SMALL, LARGE, CRYPT, HOME, ROOT, SDB = (259, 0), (259, 1), (259, 2), (252, 0), (252, 1), (252, 2), (8, 16)
ANONYMOUS = (0, 45)


class FakeKernel:
    """/sys and /proc/self/mountinfo under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.sys, self.mountinfo = folder / "sys", folder / "mountinfo"
        self._lines = [
            "22 1 0:21 / /proc rw,relatime - proc proc rw",
            "27 1 259:1 / / rw - ext4 /dev/p1 rw",
        ]
        (self.sys / "dev" / "block").mkdir(parents=True)
        for device, where in {NVME: "nvme0n1", SDB: "sdb"}.items():
            self._add(device, where)
        for device, where in {SMALL: "nvme0n1/p1", LARGE: "nvme0n1/p2"}.items():
            (self._add(device, where) / "partition").touch()
        for device, where, lower in ((CRYPT, "dm-0", "nvme0n1/p2"), (HOME, "dm-1", "dm-0"), (ROOT, "dm-2", "dm-0")):
            slaves = self._add(device, where) / "slaves"
            slaves.mkdir()
            (slaves / Path(lower).name).symlink_to(self.sys / "devices" / lower)

    def _add(self, device: tuple[int, int], where: str) -> Path:
        block = self.sys / "devices" / where
        block.mkdir(parents=True)
        (block / "dev").write_text("{}:{}\n".format(*device))
        (self.sys / "dev" / "block" / "{}:{}".format(*device)).symlink_to(block)
        return block

    def mount(self, point: Path | str, kind: str, source: str, options: str = "rw") -> None:
        escaped = str(point).replace(" ", "\\040")
        self._lines.append(f"50 27 0:45 / {escaped} rw,relatime shared:7 master:2 - {kind} {source} {options}")

    def under(self, folder: Path) -> frozenset[tuple[int, int]]:
        self.mountinfo.write_text("\n".join(self._lines) + "\n")
        return disks_under(folder, proc=str(self.mountinfo), sys=str(self.sys))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """Every file is on an anonymous device, except what lies in a folder that is called like a device."""
    monkeypatch.setattr(disks, "_device", lambda number: number)
    stat = os.stat

    class Status:
        def __init__(self, path: str | os.PathLike[str] | int) -> None:
            kinds = {"home": HOME, "sdb": SDB, "small": SMALL, "gone": (7, 7)}
            self.st_dev = kinds.get(Path(str(path)).name, ANONYMOUS)
            self.st_mode = stat(path).st_mode

    monkeypatch.setattr(disks, "_stat", Status)
    monkeypatch.setattr(disks, "_source_device", lambda mount: {"/dev/sdb": SDB}.get(mount.source))
    (tmp_path / "kernel").mkdir()
    return FakeKernel(tmp_path / "kernel")


def _folder(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_a_partition_is_on_its_whole_disk(kernel: FakeKernel, tmp_path: Path) -> None:
    assert kernel.under(_folder(tmp_path, "small")) == {NVME}
    assert kernel.under(_folder(tmp_path, "sdb")) == {SDB}


def test_a_logical_volume_on_an_encrypted_partition_is_on_the_disk_below(kernel: FakeKernel, tmp_path: Path) -> None:
    assert kernel.under(_folder(tmp_path, "home")) == {NVME}


def test_an_overlay_is_on_the_disk_of_its_upper_folder(kernel: FakeKernel, tmp_path: Path) -> None:
    merged = _folder(tmp_path, "with a space")
    kernel.mount(merged, "overlay", "overlay", f"rw,lowerdir=/lower,upperdir={_folder(tmp_path, 'sdb')},workdir=/work")
    assert kernel.under(merged) == {SDB}
    store = _folder(merged, "store")
    assert kernel.under(store) == {SDB}
    assert file_system(store, proc=str(kernel.mountinfo)) == "overlay"


def test_an_overlay_without_an_upper_folder_is_on_the_disk_of_the_first_lower_one(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    merged = _folder(tmp_path, "merged")
    kernel.mount(merged, "overlay", "overlay", f"ro,lowerdir={_folder(tmp_path, 'home')}:/other")
    assert kernel.under(merged) == {NVME}


def test_an_overlay_of_another_container_is_not_known(kernel: FakeKernel, tmp_path: Path) -> None:
    merged = _folder(tmp_path, "merged")
    kernel.mount(merged, "overlay", "overlay", f"rw,lowerdir=/l,upperdir={tmp_path / 'not here'},workdir=/w")
    assert kernel.under(merged) == frozenset()


def test_an_overlay_of_itself_ends(kernel: FakeKernel, tmp_path: Path) -> None:
    merged = _folder(tmp_path, "merged")
    kernel.mount(merged, "overlay", "overlay", f"rw,upperdir={merged}")
    assert kernel.under(merged) == frozenset()


def test_btrfs_is_on_the_device_that_it_was_mounted_by(kernel: FakeKernel, tmp_path: Path) -> None:
    volume = _folder(tmp_path, "volume")
    kernel.mount(volume, "btrfs", "/dev/sdb", "rw,subvol=/@home")
    assert kernel.under(volume) == {SDB}


@pytest.mark.parametrize(("kind", "source"), [("nfs4", "server:/export"), ("tmpfs", "tmpfs"), ("zfs", "pool/data")])
def test_a_network_and_memory_are_on_no_disk(kernel: FakeKernel, tmp_path: Path, kind: str, source: str) -> None:
    folder = _folder(tmp_path, "volume")
    kernel.mount(folder, kind, source)
    assert kernel.under(folder) == frozenset()


def test_the_last_of_two_mounts_at_one_point_is_what_is_seen(kernel: FakeKernel, tmp_path: Path) -> None:
    folder = _folder(tmp_path, "volume")
    kernel.mount(folder, "tmpfs", "tmpfs")
    kernel.mount(folder, "btrfs", "/dev/sdb")
    kernel.mount(tmp_path, "nfs4", "server:/export")
    assert kernel.under(folder) == {SDB}


def test_disk_bytes_counts_sectors_read_and_written_of_all_disks(tmp_path: Path) -> None:
    statistics = tmp_path / "diskstats"
    statistics.write_text(" 254 0 vda 9 1 100 5 3 1 20 7 0 1 2\n 254 1 vda1 9 1 8 5 3 1 2 7 0 1 2\n")
    assert disk_bytes({(254, 0)}, str(statistics)) == 512 * 120
    assert disk_bytes({(254, 0), (254, 1), (8, 0)}, str(statistics)) == 512 * 130
    assert disk_bytes({(8, 0)}, str(statistics)) is None
    assert disk_bytes((), str(statistics)) is None
    assert disk_bytes({(254, 0)}, str(tmp_path / "none")) is None


def test_memory_of_this_machine_is_on_no_disk() -> None:
    assert disks_under("/dev/shm") == frozenset()
    assert file_system("/dev/shm") == "tmpfs"
