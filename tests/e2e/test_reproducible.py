"""Below float32: the same text for the same composition of sweeps, in one session and in the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.plan.transfer import Mode

from .checkpoints import BYTES_LLAMA, VOCAB_SIZE, make_checkpoint, packed, prompts_of

COMMON = {"max_tokens": 16, "ignore_eos": True, "logprobs": 2}


def test_bf16_repeats_itself_where_the_sweeps_are_the_same(mode: Mode, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", BYTES_LLAMA)
    packed(folder, dtype="bfloat16")
    prompts = prompts_of((3, 41, 11, 1), VOCAB_SIZE)
    params = [
        SamplingParams(temperature=0.0, **COMMON),
        SamplingParams(temperature=1.0, seed=7, n=2, **COMMON),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, **COMMON),
        SamplingParams(temperature=0.8, top_p=0.9, seed=8, **COMMON),
    ]
    with LLM(
        folder, dtype="bfloat16", memory="3GiB", weight_memory="250KiB", ray_address="local", max_batch_tokens=16,
        mode=mode,
        prefix_cache=False,  # the second time there would be less to compute, in other sweeps
    ) as llm:  # fmt: skip
        first, second = llm.generate(prompts, params), llm.generate(prompts, sampling_params=params)
        report = llm.report()
    assert report["streamed_bytes_per_sweep"] > 0
    # Logprobs to the last bit: a difference that turns no token today turns one tomorrow.
    assert [output.outputs for output in first] == [output.outputs for output in second]
    assert [output.metrics.sweeps for output in first] == [output.metrics.sweeps for output in second]
    assert len({tuple(output.outputs[0].token_ids) for output in first}) == len(prompts)


@pytest.mark.parametrize(
    ("precision", "profiles"),
    [
        pytest.param("16bit", ["kernels.json"], marks=pytest.mark.slow),
        ("int4", ["kernels.json", "low-bit-kernels.json"]),
    ],
)
def test_the_next_session_repeats_it(
    precision: str, profiles: list[str], bytes_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same kernels: it does not measure them anew, which would never give the same seconds twice."""
    monkeypatch.setenv("PIPO_CACHE", str(tmp_path / "cache"))
    prompts = prompts_of((3, 41, 11, 1), VOCAB_SIZE)
    packed(bytes_llama, dtype="bfloat16", precision=precision)
    found = []
    for _ in range(2):
        with LLM(
            bytes_llama, dtype="bfloat16", precision=precision, memory="3GiB", ray_address="local", max_batch_tokens=16
        ) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, **COMMON))
            kept = {path.name: path.read_text() for path in Path(llm._session.path).glob("*kernels.json")}
        found.append(([output.outputs for output in outputs], kept))
    assert found[0] == found[1]
    assert sorted(found[0][1]) == profiles
