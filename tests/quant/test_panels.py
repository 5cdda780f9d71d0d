from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, PANEL_BYTES, SMALL_PANEL_BYTES, divide, machine_layout

NAMES = ("int4-g32", "int4", "int4-g128-sym", "int8")


@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from(NAMES), st.integers(1, 1 << 20))
def test_panels_cover_the_rows(rows: int, groups: int, name: str, panel_bytes: int) -> None:
    low_bit = LowBitFormat.parse(name)
    panels = divide(rows, groups * low_bit.columns_multiple, low_bit, "avx512", panel_bytes)
    ranges = [panels.rows_of(panel, panel + 1) for panel in range(panels.num_panels)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    assert panels.panel_rows % BLOCK_ROWS == 0
    assert panels.panel_bytes % 64 == 0
    assert panels.code_bytes % 64 == 0
    assert panels.panel_bytes <= panel_bytes or panels.panel_rows == BLOCK_ROWS
    assert panels.num_panels * panels.panel_rows < 2 * (rows + BLOCK_ROWS)


SHAPES = [
    (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192),
    (8192, 28672), (5120, 5120), (13824, 5120), (5120, 13824), (27648, 5120), (7168, 7168), (28672, 7168),
    (7168, 28672), (18944, 3584), (3584, 18944), (152064, 3584), (151936, 2048), (128256, 4096), (50272, 7168),
]  # fmt: skip
"""Of Llama, Qwen, OPT and Gemma."""


@pytest.mark.parametrize("panel_bytes", [SMALL_PANEL_BYTES, PANEL_BYTES])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_bits_per_weight_of_real_shapes(rows: int, columns: int, panel_bytes: int) -> None:
    panels = divide(rows, columns, LowBitFormat.parse("int4"), "avx512", panel_bytes)
    assert 4.5 <= panels.bits_per_weight <= 4.6
    assert panels.panel_bytes <= panel_bytes
    # Not many more than needed: each costs a call.
    assert panels.num_panels <= 2 * (rows * columns * 4.5 / 8 / panel_bytes) + 1
    assert divide(rows, columns, LowBitFormat.parse("int8"), "avx512", panel_bytes).bits_per_weight <= 8.2


def test_machine_layout_is_the_one_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    names = {"avx512": "AVX512", "avx2": "AVX2", "plain": "DEFAULT"}
    assert torch.backends.cpu.get_cpu_capability().startswith(names[machine_layout()])


@pytest.mark.parametrize(
    "flags, layout",
    [
        ("fpu avx2 fma avx512f avx512dq avx512bw avx512vl", "avx512"),
        ("fpu avx2 fma avx512f", "avx2"),
        ("fpu avx2", "plain"),
        ("", "plain"),
    ],
)
def test_layout_of_other_processors(flags: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert machine_layout(tmp_path / "cpuinfo") == layout
    assert layout in INT4_LAYOUTS
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # torch obeys it, too
    assert machine_layout(tmp_path / "cpuinfo") == "avx2"
