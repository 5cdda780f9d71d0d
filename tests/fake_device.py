"""A device on the CPU that does copies as late, or as early, as their order allows, and detects races.

Streams and events are those of CUDA: a stream does its work in order, an event orders what waits for it behind what was
recorded. Every access to the device's memory, or to memory registered for copies, is kept with the vector clock of its
stream; two that touch the same bytes, one of them writing, must be ordered, or `RaceError` is raised. What torch
computes within `watching()` counts as work of the compute stream. (Happens-before with vector clocks: Mattern, 1988.)
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]


class RaceError(AssertionError):
    """Two accesses to the same bytes without an order."""


@dataclass
class FakeEvent:
    """A point in a stream, and the work that must be done before it."""

    device: FakeDevice
    stream: str
    clock: Clock
    work: Callable[[], object] | None = None
    after: FakeEvent | None = None

    def synchronize(self) -> None:
        self.device.host_waits_for(self)

    def query(self) -> bool:
        return self.device.host_sees(self)


@dataclass
class _Access:
    first: int
    stop: int
    writes: bool
    stream: str
    position: int


@dataclass
class _Memory:
    base: torch.Tensor
    accesses: list[_Access] = field(default_factory=list)


class FakeDevice:
    """`DeviceOps` on the CPU. With probability `eager` a copy is done when it is issued, else when it is needed."""

    def __init__(self, seed: int = 0, eager: float = 0.5) -> None:
        self.device = torch.device("cpu")
        self.copied: list[tuple[str, int]] = []
        self.pinned: list[torch.Tensor] = []
        self._random, self._eager = random.Random(seed), eager
        self._lock = threading.RLock()
        self._clocks: dict[str, Clock] = {}
        self._host: Clock = {}
        self._queues: dict[str, deque[FakeEvent]] = {}
        self._memories: list[_Memory] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self._memories.append(_Memory(memory))
        return memory

    def pin(self, memory: torch.Tensor) -> bool:
        self.pinned.append(memory)
        self._memories.append(_Memory(memory))
        return True

    def copy(
        self, source: torch.Tensor, target: torch.Tensor, after: FakeEvent | None, stream: str = "weight copy"
    ) -> FakeEvent:
        assert source.is_contiguous()
        assert target.is_contiguous()
        with self._lock:
            clock = self._step(stream, after)
            self._note(source, False, stream)
            self._note(target, True, stream)
            self.copied.append((stream, source.nbytes))
            event = FakeEvent(self, stream, dict(clock), lambda: target.copy_(source), after)
            self._queues.setdefault(stream, deque()).append(event)
            if self._random.random() < self._eager:
                self._do(event)
            return event

    def compute_waits_for(self, event: FakeEvent) -> None:
        with self._lock:
            self._do(event)
            _merge(self._clocks.setdefault("compute", {}), event.clock)

    def look_at_clocks(self) -> None:
        pass

    def stalled_s(self) -> float:
        return 0.0

    def record_on_compute(self) -> FakeEvent:
        with self._lock:
            return FakeEvent(self, "compute", dict(self._step("compute", None)))

    def synchronize(self) -> None:
        with self._lock:
            for stream, queue in self._queues.items():
                if queue:
                    self._do(queue[-1])
                _merge(self._host, self._clocks[stream])
            _merge(self._host, self._clocks.get("compute", {}))

    def host_waits_for(self, event: FakeEvent) -> None:
        with self._lock:
            self._do(event)
            _merge(self._host, event.clock)

    def host_sees(self, event: FakeEvent) -> bool:
        """Whether it has happened; what the host has seen it can rely on."""
        with self._lock:
            if event.work is not None:
                return False
            _merge(self._host, event.clock)
            return True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What is computed in this context is work of the compute stream."""
        with _Watch(self):
            yield

    def computes(self, tensor: torch.Tensor, writes: bool) -> None:
        with self._lock:
            self._step("compute", None)
            self._note(tensor, writes, "compute")

    def _step(self, stream: str, after: FakeEvent | None) -> Clock:
        clock = self._clocks.setdefault(stream, {})
        _merge(clock, self._host)
        if after is not None:
            _merge(clock, after.clock)
        clock[stream] = clock.get(stream, 0) + 1
        return clock

    def _note(self, tensor: torch.Tensor, writes: bool, stream: str) -> None:
        if not tensor.numel():
            return
        first = tensor.data_ptr()
        extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        stop = first + extent * tensor.element_size()
        clock = self._clocks[stream]
        for memory in self._memories:
            base = memory.base.data_ptr()
            if not base <= first < base + memory.base.nbytes:
                continue
            kept = []
            for access in memory.accesses:
                ordered = clock.get(access.stream, 0) >= access.position
                if access.first < stop and first < access.stop and (writes or access.writes) and not ordered:
                    raise RaceError(
                        f"{stream} {'writes' if writes else 'reads'} bytes {first - base}:{stop - base}, and "
                        f"{access.stream} {'writes' if access.writes else 'reads'} {access.first - base}:"
                        f"{access.stop - base} without an order"
                    )
                covered = first <= access.first and access.stop <= stop
                if not (covered and ordered and (writes or not access.writes)):
                    kept.append(access)
            memory.accesses = [*kept, _Access(first, stop, writes, stream, clock[stream])]

    def _do(self, event: FakeEvent) -> None:
        queue = self._queues.get(event.stream)
        while queue and event.work is not None:
            first = queue.popleft()
            if first.after is not None:
                self._do(first.after)
            assert first.work is not None
            with torch.utils._python_dispatch._disable_current_modes():
                first.work()
            first.work = None


class _Watch(TorchDispatchMode):
    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returns = func._schema.returns
        if not (returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write):  # not a view
            for index, argument in enumerate(func._schema.arguments):
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                        self._device.computes(tensor, writes)
        return func(*args, **kwargs)


def _merge(clock: Clock, other: Clock) -> None:
    for stream, position in other.items():
        clock[stream] = max(clock.get(stream, 0), position)
