"""Rows gathered in pinned memory and copied meanwhile, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from pipo_ray.model.row_staging import RowStaging

pytestmark = pytest.mark.gpu


def test_no_part_is_overwritten_before_it_is_copied() -> None:
    table = torch.randint(0, 256, (5000, 8192), dtype=torch.uint8)
    staging = RowStaging(torch.device("cuda", 0))
    busy = torch.randn(8192, 8192, device="cuda")
    for seed in range(4):
        rows = torch.randint(0, 5000, (9000,), generator=torch.Generator().manual_seed(seed))
        for _ in range(10):
            busy = busy @ busy / 100  # copies have to wait for it
        assert torch.equal(staging.gather(table, rows).cpu(), table[rows])
