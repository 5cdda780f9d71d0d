from __future__ import annotations

import pytest
from architectures import BY_SLUG

from pipo_ray.model.linear_experts import experts_are_linear


@pytest.mark.parametrize(
    "slug, linear", [("mixtral", True), ("qwen3-moe", True), ("qwen3-next", True), ("gpt-oss", False), ("llama", False)]
)
def test_which_experts_are_multiplied_one_by_one(slug: str, linear: bool) -> None:
    assert experts_are_linear(BY_SLUG[slug].config()) is linear
