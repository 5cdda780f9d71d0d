"""Bytes that are there at a time, by operations that allocate them and by names that keep them."""

from __future__ import annotations

import pytest
import torch

from pipo_ray.model.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_nothing_refers_to_any_more_is_not_counted(device: str) -> None:
    weight = torch.empty(400, 100, device=device)
    with torch.inference_mode(), LiveBytes() as live:
        inputs = torch.empty(10, 100, device=device)
        assert live.now == 4000
        output = torch.nn.functional.linear(inputs, weight)
        assert live.now == live.peak == 4000 + 16000
        output = torch.relu(output)
        assert (live.now, live.peak) == (4000 + 16000, 4000 + 2 * 16000)
        view = output.view(-1)[3:]
        del output
        assert live.now == 4000 + 16000
        del view
        assert live.now == 4000
    assert live.peak == 4000 + 2 * 16000


def test_what_was_there_before_and_views_of_it_count_nothing() -> None:
    before = torch.zeros(5)
    with LiveBytes() as live:
        rows = before.view(1, 5).expand(3, 5)
        before.add_(1)
        torch.mul(before, 2, out=before)
        assert live.peak == 0
        rows = rows.contiguous()
        assert live.now == rows.nbytes == 60
