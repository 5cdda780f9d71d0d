"""The instruction sets that kernels over rows in bf16 are compiled for, as parameters of tests."""

from __future__ import annotations

import pytest

from pipo_ray.compiled.support import floats_obstacle, obstacle

INSTRUCTIONS = [
    pytest.param("avx512", marks=pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))),
    pytest.param("avx2", marks=pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))),
]
"""A processor with AVX512 has the other one, too."""
