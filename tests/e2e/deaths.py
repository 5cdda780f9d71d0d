"""Deaths of actors that tests bring about."""

from __future__ import annotations

from pipo_ray import LLM
from pipo_ray.pipeline.roll import WINDOW_S


def let_a_minute_pass(llm: LLM) -> None:
    """All deaths so far lie further back than the minute in which three are too many."""
    llm._stage.roll._rows[:, 2:] -= WINDOW_S + 1
