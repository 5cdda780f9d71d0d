"""What the machine allows: threads that call preadv, libaio and io_uring, alone and beside products.

How to run (a file of 1 GB or more on the drive in question, a minute; --quick: a third of it):

    python benchmarks/read_methods.py FILE [--rounds 5] [--seconds 0.4] [--quick] [--json FILE]

O_DIRECT reads into 64 MiB of shared memory: in huge pages, as the slots lie, and in ordinary ones. Threads each call
preadv; libaio and io_uring are one thread that asks for the next read when one has ended, io_uring with its memory
registered once (fixed buffers). In turns, in every round first alone, then beside a process that multiplies bf16
matrices of 112 MiB by a vector as fast as it can, on as many threads as there are cores.
Printed: medians of GB/s with their spread, the processor time of the reading process for a GB, and what the products
made of the memory's bandwidth meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import random
import resource
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipo_ray.session.huge_pages import scratch_memory

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
POINTS = ((1 * MIB, 8), (2 * MIB, 8), (4 * MIB, 4))
METHODS = ("preadv", "libaio", "io_uring")
_IO_SETUP, _IO_DESTROY, _IO_GETEVENTS, _IO_SUBMIT = 206, 207, 208, 209
_URING_SETUP, _URING_ENTER, _URING_REGISTER = 425, 426, 427
"""Numbers of system calls on x86-64."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(*arguments: Any) -> int:
    while True:
        result = int(_libc.syscall(*arguments))
        if result >= 0:
            return result
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Ring(Protocol):
    """Reads that the kernel does while the caller goes on; each is known by its number, below the depth."""

    def submit(self, number: int, descriptor: int, address: int, length: int, offset: int) -> None:
        """Begin a read."""

    def wait(self) -> list[tuple[int, int]]:
        """Numbers of the reads that have ended, at least one, and the bytes of each or minus an error's number."""

    def close(self) -> None:
        """Give everything back."""


class Libaio:
    """io_submit(2) and io_getevents(2)."""

    def __init__(self, depth: int) -> None:
        self._context, self._depth = ctypes.c_ulong(0), depth
        _call(_IO_SETUP, depth, ctypes.byref(self._context))
        self._blocks = [ctypes.create_string_buffer(64) for _ in range(depth)]
        self._events = ctypes.create_string_buffer(32 * depth)

    def submit(self, number: int, descriptor: int, address: int, length: int, offset: int) -> None:
        """See Ring. Layout: struct iocb of linux/aio_abi.h."""
        block = self._blocks[number]
        struct.pack_into("<QIIHhIQQq", block, 0, number, 0, 0, 0, 0, descriptor, address, length, offset)
        pointer = ctypes.c_void_p(ctypes.addressof(block))
        _call(_IO_SUBMIT, self._context, ctypes.c_long(1), ctypes.byref(pointer))

    def wait(self) -> list[tuple[int, int]]:
        """See Ring."""
        count = _call(_IO_GETEVENTS, self._context, ctypes.c_long(1), ctypes.c_long(self._depth), self._events, None)
        events = (struct.unpack_from("<QQq", self._events, 32 * at) for at in range(count))
        return [(number, result) for number, _, result in events]

    def close(self) -> None:
        """See Ring."""
        _call(_IO_DESTROY, self._context)


class IoUring:
    """io_uring(7) with `memory` registered as a fixed buffer. Layout: struct io_uring_params of linux/io_uring.h."""

    def __init__(self, depth: int, memory: npt.NDArray[np.uint8]) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._ring = _call(_URING_SETUP, depth, parameters)
        entries, completions = struct.unpack_from("<2I", parameters)
        self._sq = struct.unpack_from(
            "<8I", parameters, 40
        )  # offsets: head, tail, mask, entries, flags, dropped, array
        self._cq = struct.unpack_from("<8I", parameters, 80)  # offsets: head, tail, mask, entries, overflow, cqes
        self._entries, self._completions = entries, completions
        size = max(self._sq[6] + 4 * entries, self._cq[5] + 16 * completions)
        self._shared = mmap.mmap(self._ring, size)
        self._requests = mmap.mmap(self._ring, 64 * entries, offset=0x10000000)
        self._words = np.frombuffer(self._shared, np.uint32, size // 4)
        vector = ctypes.create_string_buffer(struct.pack("<QQ", memory.ctypes.data, memory.nbytes))
        _call(_URING_REGISTER, self._ring, 0, vector, 1)

    def submit(self, number: int, descriptor: int, address: int, length: int, offset: int) -> None:
        """See Ring. READ_FIXED (4)."""
        tail = int(self._words[self._sq[1] // 4])
        at = tail % self._entries
        struct.pack_into(
            "<BBHiQQIIQ24x", self._requests, 64 * at, 4, 0, 0, descriptor, offset, address, length, 0, number
        )
        self._words[self._sq[6] // 4 + at] = at
        self._words[self._sq[1] // 4] = (tail + 1) & 0xFFFFFFFF
        _call(_URING_ENTER, self._ring, 1, 0, 0, None, 0)

    def wait(self) -> list[tuple[int, int]]:
        """See Ring."""
        head = int(self._words[self._cq[0] // 4])
        if int(self._words[self._cq[1] // 4]) == head:
            _call(_URING_ENTER, self._ring, 0, 1, 1, None, 0)
        ended = []
        while head != int(self._words[self._cq[1] // 4]):
            place = self._cq[5] + 16 * (head % self._completions)
            ended.append(struct.unpack_from("<Qi", self._shared, place))
            head = (head + 1) & 0xFFFFFFFF
        self._words[self._cq[0] // 4] = head
        return ended

    def close(self) -> None:
        """See Ring."""
        os.close(self._ring)


def read(
    method: str, descriptor: int, memory: npt.NDArray[np.uint8], transfer: int, depth: int, seconds: float
) -> tuple[float, float]:
    """Read for so many seconds, from a random place on: bytes per second, and processor seconds for a byte."""
    places = os.fstat(descriptor).st_size // transfer
    first = random.randrange(places)
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()

    def offset(number: int) -> int:
        return (first + number) % places * transfer

    def place(number: int) -> int:
        return number * transfer % MEMORY_BYTES

    def going_on() -> bool:
        return time.perf_counter() - begin < seconds

    if method == "preadv":
        done = _with_threads(descriptor, memory, transfer, depth, offset, place, going_on)
    else:
        ring: Ring = Libaio(depth) if method == "libaio" else IoUring(depth, memory)
        started = done = 0
        waiting = list(range(depth))
        while len(waiting) < depth or going_on():
            while waiting and going_on():
                ring.submit(waiting.pop(), descriptor, memory.ctypes.data + place(started), transfer, offset(started))
                started += 1
            for number, result in ring.wait() if len(waiting) < depth else ():
                if result != transfer:
                    raise OSError(-result, f"{method}: {os.strerror(-result)}")
                waiting.append(number)
                done += transfer
        ring.close()
    took, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done / took, processor / done


def _with_threads(
    descriptor: int, memory: npt.NDArray[np.uint8], transfer: int, depth: int,
    offset: Callable[[int], int], place: Callable[[int], int], going_on: Callable[[], bool],
) -> int:  # fmt: skip
    lock = threading.Lock()
    started = done = 0

    def work() -> None:
        nonlocal started, done
        while going_on():
            with lock:
                number, started = started, started + 1
            at = place(number)
            got = os.preadv(descriptor, [memory[at : at + transfer].data], offset(number))
            with lock:
                done += got

    threads = [threading.Thread(target=work) for _ in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def multiply(pipe: Connection) -> None:
    """Products until it is told to stop; sends the bytes of weights per second that they read."""
    import torch

    weights = [torch.ones(14336, 4096, dtype=torch.bfloat16) for _ in range(4)]
    row = torch.ones(1, 4096, dtype=torch.bfloat16)
    pipe.send(None)
    count, begin = 0, time.perf_counter()
    while not pipe.poll():
        torch.nn.functional.linear(row, weights[count % len(weights)])
        count += 1
    pipe.send(count * weights[0].nbytes / (time.perf_counter() - begin))


def measure(file: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Rates of every method, point, memory and company; bytes per second."""
    ordinary = np.frombuffer(mmap.mmap(-1, MEMORY_BYTES), np.uint8)
    ordinary[:: mmap.PAGESIZE] = 1
    memories = {"huge": scratch_memory(MEMORY_BYTES), "ordinary": ordinary}
    cases = [(method, pages, *point) for method in METHODS for pages in memories for point in POINTS]
    rows: dict[Any, list[tuple[float, float]]] = {(case, busy): [] for case in cases for busy in (False, True)}
    products = []
    context = multiprocessing.get_context("spawn")
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        for _ in range(rounds):
            for busy in (False, True):
                ours, theirs = context.Pipe()
                process = context.Process(target=multiply, args=(theirs,), daemon=True)
                if busy:
                    process.start()
                    ours.recv()
                for case in random.sample(cases, len(cases)):
                    method, pages, transfer, depth = case
                    rows[case, busy].append(read(method, descriptor, memories[pages], transfer, depth, seconds))
                if busy:
                    ours.send(None)
                    products.append(ours.recv())
                    process.join()
    finally:
        os.close(descriptor)
    return {
        "products_bytes_per_s": products,
        "rows": [
            {
                "method": case[0], "pages": case[1], "transfer_bytes": case[2], "in_flight": case[3],
                "beside_products": busy, "bytes_per_s": [rate for rate, _ in found],
                "processor_s_per_gb": statistics.median(cost for _, cost in found) * 1e9,
            }
            for (case, busy), found in rows.items()
        ],
    }  # fmt: skip


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="read, never written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each read")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.file, 2 if arguments.quick else arguments.rounds, arguments.seconds)
    print(
        f"{'':10}{'pages':>10}{'reads':>12}{'GB/s alone':>12}{'spread':>13}{'beside':>8}{'spread':>13}{'CPU s/GB':>10}"
    )
    for alone, beside in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        row = f"{alone['method']:10}{alone['pages']:>10}"
        row += f"{alone['transfer_bytes'] // MIB:>4} MiB x {alone['in_flight']}"
        for one in (alone, beside):
            rates = [rate / 1e9 for rate in one["bytes_per_s"]]
            row += f"{statistics.median(rates):>{12 if one is alone else 8}.2f}{min(rates):>7.2f} -{max(rates):5.2f}"
        print(row + f"{alone['processor_s_per_gb']:>10.3f}")
    rates = [rate / 1e9 for rate in result["products_bytes_per_s"]]
    print(f"products beside all of them: {statistics.median(rates):.1f} GB/s ({min(rates):.1f} - {max(rates):.1f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
