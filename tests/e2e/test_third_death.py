"""Three deaths of one actor within a minute end the run, with an error that says what is needed, and nothing stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import ActorFailedError

from .checkpoints import VOCAB_SIZE, prompts_of
from .footprint import Footprint, wait_until_gone

GREEDY = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
PROMPTS = prompts_of((3, 29, 11), VOCAB_SIZE)
SLOW = pytest.mark.slow


@pytest.mark.parametrize("victim", [
    "NvmeLoader", *(pytest.param(name, marks=SLOW) for name in ("StagingPool", "ComputeWorker", "Scheduler"))
])  # fmt: skip
def test_the_third_death_within_a_minute_ends_the_run(victim: str, bytes_llama: Path) -> None:
    killed: list[int] = []
    with LLM(bytes_llama, memory="3GiB", weight_memory="450KiB", ray_address="local") as llm:
        footprint = Footprint(llm._session.path, os.getpid())
        last_death = 0.0

        def generate() -> None:
            nonlocal last_death
            # The text may be done before the third death: it needs no staging pool, whose deaths cost it nothing.
            while last_death == 0.0 or time.monotonic() - last_death < 30:
                for _ in llm.stream(PROMPTS, GREEDY):
                    pid = llm.pids()[victim]
                    if pid not in killed and len(killed) < 3:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        last_death = time.monotonic()

        with pytest.raises(ActorFailedError) as caught:
            generate()
        took = time.monotonic() - last_death
        assert len(killed) == 3
        message = str(caught.value)
        assert f"actor {victim} died for the third time within 60 s" in message
        assert "killed from outside or crashed" in message
        assert "memory budget 3.0 GiB, in use now" in message
        assert "raise --memory" in message
        # And so does whatever is asked next, at once.
        with pytest.raises(ActorFailedError, match=victim):
            llm.generate(PROMPTS, GREEDY)
        footprint.note()
    print(f"{took:.1f} s from the third death to the error")
    assert took < 30
    wait_until_gone(footprint, 2.0)
    # The process can go on, with another LLM.
    with LLM(bytes_llama, memory="3GiB", weight_memory="450KiB", ray_address="local") as llm:
        (output,) = llm.generate([PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 3
