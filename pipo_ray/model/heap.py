"""The C library's heap under the activations of a sweep on the CPU: what it keeps of freed tensors has a bound.

A layer's large tensors leave holes, small objects that stay get into them, and then the next layer's large ones find no
place and extend the heap: with 37 layers and 512 tokens, of which 40 MiB are in use at a time, it grew by 115 to 235
MiB, by more where the thread that computes had got an arena of its own, which consists of pieces of 64 MiB
(`benchmarks/cgroup_budget.py`, glibc 2.36). What is free in it is therefore given back between layers, once it is much.
Tensors in mappings of their own (`MALLOC_MMAP_THRESHOLD_`) would leave nothing behind, but each of them would be
cleared by the system again.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from pipo_ray.session.c_heap import trim_heap

LEAST_BYTES = 16 << 20
"""Activations of a sweep below which it is left alone: it cannot make many holes."""


class Heap:
    """Watches the heap of this process during sweeps of `model`, a token of which takes `token_bytes` of activations.

    Between two layers there are hardly any activations. If there the process has grown by more than those of the whole
    sweep, the heap's free pages are given back. `anonymous` tells the process's private memory in bytes, `trim` gives
    back what is free.
    """

    def __init__(
        self, model: nn.Module, token_bytes: float,
        anonymous: Callable[[], int] | None = None, trim: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self._layers, self._token_bytes = outermost_layers(model), token_bytes
        self._anonymous, self._trim = anonymous or anonymous_bytes, trim or trim_heap
        self._least = self._anonymous()

    @contextlib.contextmanager
    def watched(self, num_tokens: int) -> Iterator[None]:
        """Within this context a sweep of so many tokens is computed."""
        bound = num_tokens * self._token_bytes
        if bound < LEAST_BYTES:
            yield
            return

        def look(*_: object) -> None:
            now = self._anonymous()
            if now - self._least > bound:
                self._trim()
                self._least = self._anonymous()
            else:
                self._least = min(self._least, now)

        handles = [layer.register_forward_pre_hook(look) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def outermost_layers(model: nn.Module) -> list[nn.Module]:
    """The modules in `model`'s lists, without those in a list (of experts) within one of them."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [layer for child in model.children() for layer in outermost_layers(child)]


def anonymous_bytes() -> int:
    """Private memory of this process that is no file's, as the kernel counts it anyway."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
