"""The dangers of writing in place into the object store, each with what makes it safe."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from pipo_ray.errors import BudgetError, ResourceError
from pipo_ray.session import slots
from pipo_ray.session.memory import shm_free
from pipo_ray.session.session import Session

from .conftest import wait_until

MIB = 1 << 20
STORE_BYTES = 120 * MIB


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(object_store_bytes=STORE_BYTES, address="local") as session:
        yield session


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class Peer:
    """An actor that reads and writes slots."""

    def attach(self, refs: list[ray.ObjectRef]) -> tuple[int, int, bool]:
        self.views = [slots.attach(ref) for ref in refs]
        slots.assert_in_shm(self.views[0])
        view = self.views[0]
        return view.ctypes.data % slots.ALIGNMENT, len(view), view.flags.writeable

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self.views[0][start:stop])

    def write(self, start: int, data: bytes) -> None:
        self.views[0][start : start + len(data)] = np.frombuffer(data, np.uint8)

    def die_writing(self) -> None:
        self.views[0][:MIB] = 7
        os.kill(os.getpid(), signal.SIGKILL)

    def pid(self) -> int:
        return os.getpid()


def restarted(peer: Any) -> None:
    """Wait until a killed actor is back."""

    def is_back() -> bool:
        try:
            return bool(ray.get(peer.pid.remote()))
        except ray.exceptions.RayActorError:
            return False

    wait_until(is_back, 20)


def pattern(num_bytes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def test_writes_in_place_are_seen_both_ways_and_survive_the_death_of_an_actor(
    session: Session, capfd: pytest.CaptureFixture[str]
) -> None:
    buffer = session.allocate(8 * MIB + 123)
    peer = Peer.remote()
    assert ray.get(peer.attach.remote([buffer.ref])) == (0, buffer.nbytes, True)
    assert buffer.view.ctypes.data % slots.ALIGNMENT == 0
    assert not buffer.view.any()
    # Both ends of the area, to be sure that both sides mean the same bytes.
    buffer.view[:4], buffer.view[-4:] = 1, 2
    assert ray.get(peer.read.remote(0, 4)) == bytes([1] * 4)
    assert ray.get(peer.read.remote(buffer.nbytes - 4, buffer.nbytes)) == bytes([2] * 4)
    ray.get(peer.write.remote(buffer.nbytes - 5, b"hello"))
    assert bytes(buffer.view[-5:]) == b"hello"
    # Killed while it wrote: the driver's view and a successor see what was there, and can go on.
    expected = pattern(buffer.nbytes - 2 * MIB)
    buffer.view[2 * MIB :] = expected
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(peer.die_writing.remote())
    assert (buffer.view[:MIB] == 7).all()
    restarted(peer)
    ray.get(peer.attach.remote([buffer.ref]))
    assert ray.get(peer.read.remote(2 * MIB, buffer.nbytes)) == expected.tobytes()
    ray.get(peer.write.remote(0, b"again"))
    assert bytes(buffer.view[:5]) == b"again"
    ray.kill(peer)
    buffer.release()
    # Not a word of Ray about the death on the user's terminal.
    assert capfd.readouterr() == ("", "")


def test_a_nearly_full_store_keeps_every_byte_and_refuses_what_does_not_fit(session: Session) -> None:
    # 112 of 120 MiB: Ray would spill from 80 % on. Nothing may be spilled, zeroed or placed in a file.
    buffers = [session.allocate(8 * MIB) for _ in range(14)]
    contents = [pattern(8 * MIB, seed) for seed in range(14)]
    for buffer, content in zip(buffers, contents, strict=True):
        buffer.view[:] = content
    with pytest.raises(ResourceError, match=r"no room for a buffer of 16\.0 MiB.*--weight-memory"):
        session.allocate(16 * MIB)
    with pytest.raises((ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)):
        ray.put(np.ones(16 * MIB, np.uint8))
    peer = Peer.remote()
    for buffer, content in zip(buffers, contents, strict=True):
        slots.assert_in_shm(buffer.view)
        assert (buffer.view == content).all()
        ray.get(peer.attach.remote([buffer.ref]))
        assert ray.get(peer.read.remote(0, 64)) == content[:64].tobytes()
    ray.kill(peer)
    assert session.node.logs
    assert not [name for name in os.listdir(os.path.dirname(session.node.logs)) if "spill" in name or "plasma" in name]
    for buffer in buffers:
        buffer.release()


def test_the_room_of_a_released_buffer_is_used_again(session: Session) -> None:
    for _ in range(8):
        buffer = session.allocate(48 * MIB)
        assert not buffer.view.any()
        buffer.view[:] = 255
        buffer.release()
        buffer.release()
    assert buffer.nbytes == 0


def test_a_buffer_larger_than_dev_shm_is_refused_before_a_page_is_touched() -> None:
    with pytest.raises(BudgetError, match=r"does not fit into /dev/shm .* free\): lower --weight-memory"):
        slots.allocate(shm_free() + MIB)


def test_assert_in_shm_names_the_file_that_ray_fell_back_to(tmp_path: Any) -> None:
    with pytest.raises(ResourceError, match="not in /dev/shm"):
        slots.assert_in_shm(np.zeros(MIB, np.uint8))
    array = np.memmap(tmp_path / "plasma", np.uint8, "w+", shape=(MIB,))
    with pytest.raises(ResourceError, match=str(tmp_path / "plasma")):
        slots.assert_in_shm(array)


def test_object_store_bytes_holds_what_it_promises() -> None:
    sizes = [20 * MIB + 1] * 3 + [4097] * 50
    # The promise itself is tested with a store of that size: see test_ray_node.
    assert sum(sizes) < slots.object_store_bytes(sizes) < sum(sizes) + 40 * MIB


def test_writable_view_wants_contiguous_memory_and_keeps_it_alive() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        slots.writable_view(np.zeros((4, 4), np.uint8)[:, 1])
    array = np.full(MIB, 3, np.uint8)
    array.flags.writeable = False
    view = slots.writable_view(array)
    view[0] = 4
    assert array[0] == 4
    del array
    assert view[-1] == 3
