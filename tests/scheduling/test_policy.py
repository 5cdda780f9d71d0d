"""Who takes part in the next sweep."""

from __future__ import annotations

from collections import deque

import pytest

from pipo_ray.params import SamplingParams
from pipo_ray.scheduling.policy import Limits, admit
from pipo_ray.scheduling.sequences import Sequence


def sequence(name: str, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(name, name, "client", 0, tuple(range(prompt)), SamplingParams(), 0, max_tokens)


@pytest.mark.parametrize(("page_tokens", "admitted"), [(1, ["a", "b", "c"]), (64, ["a", "b"])])
def test_a_sequence_takes_whole_pages(page_tokens: int, admitted: list[str]) -> None:
    """65 + 1 + 62 tokens fit 128 exactly; in pages of 64 they are 2 + 1 + 1, and 192 is too little."""
    waiting = deque([sequence("a", 60, 5), sequence("b", 0, 1), sequence("c", 50, 12)])
    running: list[Sequence] = []
    admit(
        waiting,
        running,
        Limits(kv_tokens=192 if page_tokens == 64 else 128, max_batch_tokens=8, page_tokens=page_tokens),
    )
    assert [one.name for one in running] == admitted
