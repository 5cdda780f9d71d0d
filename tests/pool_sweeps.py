"""Sweeps without a model over a KV pool whose sequences share prefixes: compared with float64 over all of a sequence's
tokens in one piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from exact_kernel import exact_kernel
from harness import CPU
from torch import Tensor

from pipo_ray.model.cascade import Kernel, KeyRanges
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.fused_rows import attend_row
from pipo_ray.model.kv_cache import RaggedCache, Segment
from pipo_ray.model.kv_pool import KVPool, PooledCache
from pipo_ray.model.kv_spans import AttentionRule

HEADS, KV_HEADS, DIM = 4, 2, 8
_AT_ONCE, _ONE_BY_ONE = 0, 1  # layers that hold the same, and attend either way


@dataclass(eq=False)
class Written:
    """A sequence behind so many of others' own tokens; its own keys and values, as they came, each [kv_heads, n,
    head_dim].
    """

    cache: PooledCache
    prefix: tuple[tuple[Written, int], ...]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @classmethod
    def behind(cls, pool: KVPool, capacity: int, *prefix: tuple[Written, int]) -> Written:
        """A new one."""
        return cls(pool.open(capacity, tuple((one.cache, count) for one, count in prefix)), prefix)

    def whole(self, name: str) -> Tensor:
        """All its keys, or values, in one piece, in float64."""
        parts = [torch.cat(getattr(one, name), dim=1)[:, :count] for one, count in self.prefix]
        return torch.cat([*parts, *getattr(self, name)], dim=1).double()


@dataclass
class Sweeps:
    """Sweeps over a pool, each attended in both ways and compared. `shape` is heads, heads of keys, and their size.
    `calls` are those of `kernel` (its ranges, and whether causal), `at_once` the sweeps that it was asked for. Its
    results are compared to within `tolerance`, each sequence's alone to within `tolerance_alone`.
    """

    pool: KVPool
    window: int | None = None
    kernel: Kernel = exact_kernel
    shape: tuple[int, int, int] = (HEADS, KV_HEADS, DIM)
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    tolerance: float = 1e-5
    tolerance_alone: float = 1e-5
    calls: list[tuple[KeyRanges, bool]] = field(default_factory=list)
    at_once: int = 0

    def run(self, batch: list[tuple[Written, int]]) -> None:
        """So many random tokens to each of `batch`, in this order."""
        count = sum(new for _, new in batch)
        heads, kv_heads, dim = self.shape
        query, keys, values = (
            torch.randn(1, n, count, dim, device=self.device).to(self.dtype) for n in (heads, kv_heads, kv_heads)
        )
        segments, column = [], 0
        for one, new in batch:
            segments.append(Segment(one.cache, column, column + new))
            column += new
        row = RaggedCache(tuple(segments), self.pool)
        row.begin_sweep()
        layout = self.pool.row
        assert layout is not None
        row.update(keys, values, _AT_ONCE)
        pools = row.append_row(keys, values)
        rule = AttentionRule(dim**-0.5, self.window)
        at_once = None
        if layout.sees_whole_ranges(self.window):
            at_once = attend_row(query[0].transpose(0, 1), *pools, layout, rule.scale, self.window, self._kernel)
            self.at_once += 1
        else:
            assert self.window is not None
            assert any(new > 1 and one.cache.start + one.cache.length + new > self.window for one, new in batch)
        for (one, _), segment in zip(batch, segments, strict=True):
            own = slice(segment.start, segment.stop)
            one.keys.append(keys[0, :, own])
            one.values.append(values[0, :, own])
            wanted = attend(query[0, :, own].double(), one.whole("keys"), one.whole("values"), rule)
            alone = one.cache.attend(_ONE_BY_ONE, query[0, :, own], keys[0, :, own], values[0, :, own], rule)
            self._compare(alone, wanted, self.tolerance_alone)
            if at_once is not None:
                self._compare(at_once[own].transpose(0, 1), wanted, self.tolerance)
        row.advance()

    def _compare(self, got: Tensor, wanted: Tensor, tolerance: float) -> None:
        assert got.dtype == self.dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)

    def _kernel(self, *arguments: Any, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
        self.calls.append((arguments[3], causal))
        return self.kernel(*arguments, causal=causal, window=window)
