"""Rows that pass through two small parts are the rows that were asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.model import row_staging
from pipo_ray.model.row_staging import RowStaging


@settings(max_examples=40)
@given(st.lists(st.integers(0, 49), max_size=60), st.sampled_from([1, 24, 100, 4000]))
def test_gathered_rows_are_the_tables(rows: list[int], part_bytes: int) -> None:
    table = torch.randint(0, 256, (50, 24), dtype=torch.uint8)
    chosen = torch.tensor(rows, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_staging, "_PART_BYTES", part_bytes)
        staging = RowStaging(torch.device("cpu"))
        for _ in range(2):
            with torch.inference_mode():
                gathered = staging.gather(table, chosen)
            assert torch.equal(gathered, table[chosen])
