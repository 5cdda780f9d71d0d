"""Kernels watched on a CUDA device."""

from __future__ import annotations

import time

import pytest
import torch

from pipo_ray.model.kernel_times import KernelTimes

pytestmark = pytest.mark.gpu


def test_kernels_count_and_copies_and_pauses_do_not() -> None:
    one = torch.randn(8192, 8192, device="cuda").bfloat16()
    two, host = torch.empty_like(one), torch.empty(256 << 20, dtype=torch.uint8)
    with KernelTimes():  # what is done once
        torch.mm(one, one, out=two)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with KernelTimes() as times:
        begin.record()
        for _ in range(20):
            torch.mm(one, one, out=two)
        end.record()
        end.synchronize()
        host.to("cuda")
        time.sleep(0.05)
    assert times.busy_s == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.1)
    assert times.total_s >= times.busy_s + 0.05
