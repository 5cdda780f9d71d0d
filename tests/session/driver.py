"""A driver for the tests that kill one: `driver.py MODE`, see `main` for its modes."""

import mmap
import os
import sys
import time

import ray

from pipo_ray.session import slots
from pipo_ray.session.session import Session

MIB = 1 << 20


@ray.remote(num_cpus=0)
class Writer:
    """Writes to a slot for ever, maps a named semaphore as compiled graphs do, and starts a process of its own."""

    def work(self, refs: list[ray.ObjectRef], semaphore: str) -> None:
        descriptor = os.open(semaphore, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(semaphore, 32)
        self.semaphore = mmap.mmap(descriptor, 32)
        if os.fork() == 0:
            os.execv("/bin/sleep", ["sleep", "300"])
        view = slots.attach(refs[0])
        while True:
            view[:] = 1
            view[:] = 2


def main() -> None:
    mode = sys.argv[1]
    with Session(object_store_bytes=100 * MIB, address="local") as session:
        print("started", flush=True)
        if mode == "allocate":
            while True:
                buffers = [session.allocate(8 * MIB) for _ in range(4)]
                print("allocated", flush=True)
                for buffer in buffers:
                    buffer.release()
        if mode == "work":
            semaphore = f"/dev/shm/sem.pipo-test-{session.id}"
            # Ray ends the writer as soon as the driver is gone, perhaps before anybody can see what it had mapped.
            session.own_file(semaphore)
            buffer = session.allocate(16 * MIB)
            writer = Writer.remote()
            done = writer.work.remote([buffer.ref], semaphore)
            while not buffer.view.any():
                time.sleep(0.01)
            print("working", flush=True)
            ray.get(done)
        if mode == "raise":
            raise ValueError("on purpose")
        if mode != "exit":
            time.sleep(300)


if __name__ == "__main__":
    main()
