"""The link from RAM to the GPU by itself: copies from pinned memory, in a process of its own that answers on a pipe.

`gpu_stream.py` starts it; by hand it prints the bytes per second of 10 GiB in pieces of 16 MiB:

    python benchmarks/pinned_link.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

HOST_BYTES = 2 << 30
TARGETS = 4


def serve() -> None:
    """A line of piece sizes in, a line of seconds out, until the input ends."""
    import torch

    host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    targets: list[torch.Tensor] = []
    print("ready", flush=True)
    for line in sys.stdin:
        sizes: list[int] = json.loads(line)
        if not targets or targets[0].nbytes < max(sizes):
            targets = [torch.empty(max(sizes), dtype=torch.uint8, device="cuda") for _ in range(TARGETS)]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        at = 0
        for number, size in enumerate(sizes):
            if at + size > HOST_BYTES:
                at = 0
            targets[number % TARGETS][:size].copy_(host[at : at + size], non_blocking=True)
            at += size
        torch.cuda.synchronize()
        print(time.perf_counter() - begin, flush=True)


class PinnedLink:
    """The other process. A context manager."""

    def __enter__(self) -> PinnedLink:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise RuntimeError("the process that measures the link did not start")
        return self

    def rate(self, sizes: Sequence[int]) -> float:
        """Bytes per second of copies of these `sizes`, one behind the other."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(list(sizes)), file=self._process.stdin, flush=True)
        return sum(sizes) / float(self._process.stdout.readline())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        with PinnedLink() as link:
            link.rate([16 << 20] * 64)
            print(f"{link.rate([16 << 20] * 640) / 1e9:.1f} GB/s")
