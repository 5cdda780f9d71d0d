"""Numbers that the host knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import CPU

from pipo_ray.model.host_values import flat, host_values, known, row_of


def test_values_come_back_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(known([3, 1, 2], CPU))
    assert row.shape == (1, 3)

    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the device was asked")

    monkeypatch.setattr(torch.Tensor, "cpu", refuse)
    assert host_values(row).tolist() == host_values(flat(row)).tolist() == [3, 1, 2]


def test_what_was_computed_is_asked_for() -> None:
    shifted = known([3, 1, 2], CPU) + 2
    assert host_values(shifted).tolist() == [5, 3, 4]
    assert host_values(torch.tensor([[7], [8]], dtype=torch.int32)).dtype == np.int64
