"""Runner of pipo itself, so that it is measured exactly as its peers are."""

from __future__ import annotations

import atexit
from typing import Any

from protocol import Generate, OnToken, serve

from pipo_ray import LLM, SamplingParams


def start(options: dict[str, Any]) -> tuple[Generate, list[str]]:
    """`options`: model (checkpoint or store), memory (bytes)."""
    llm = LLM(
        options["model"],
        memory=options["memory"],
        device="cpu",
        ray_address="local",
        max_model_len=1024,
        max_kv_tokens=1024,
        max_kv_sequences=16,
    )
    atexit.register(llm.close)

    def generate(prompts: list[list[int]], tokens: int, on_token: OnToken) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        numbers = {tuple(prompt): number for number, prompt in enumerate(prompts)}
        told = [0] * len(prompts)
        for output in llm.stream(prompts, params):
            number = numbers[tuple(output.prompt_token_ids)]
            for token in output.outputs[0].token_ids[told[number] :]:
                on_token(number, token)
                told[number] += 1

    return generate, llm.describe()


if __name__ == "__main__":
    serve(start, ("pipo-ray", "ray", "torch", "transformers"))
