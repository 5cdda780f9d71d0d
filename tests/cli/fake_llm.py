"""A stand-in for LLM, for what the command line itself does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipo_ray.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

REPORT = {
    "sweeps": 4,
    "bytes_streamed": 4 << 30,
    "peak_memory_bytes": 3 << 29,
    "memory_budget_bytes": 2 << 30,
    "weight_memory_bytes": 1 << 30,
    "huge_page_bytes": 0,
    "kv_ram_bytes": 0,
    "gpu_memory_bytes": None,
    "model_bytes": 5 << 30,
    "resident_bytes": 1 << 29,
    "streamed_bytes_per_sweep": 9 << 29,
    "kv_tokens": 16384,
    "elapsed_s": 12.5,
    "stages": [
        {"stage": "NvmeLoader", "busy": 0.75, "waiting": 0.25, "starved": 0.0},
        {"stage": "Scheduler", "busy": 0.0, "waiting": 1.0, "starved": 0.0, "tokens_reused": 96},
    ],
}


class FakeLLM:
    """Answers a prompt with its text in upper case, three characters at a time; token ids are character codes."""

    made: list[FakeLLM]
    fail_at: tuple[int, BaseException] | None = None
    max_model_len = 1 << 20

    def __init__(self, model: str, **arguments: Any) -> None:
        self.model, self.arguments = model, arguments
        self.closed = False
        self.conversations: list[list[dict[str, str]]] = []
        self.made.append(self)

    def stream(self, prompts: Sequence[Any], params: Any) -> Iterator[RequestOutput]:
        self.params = params
        texts = ["".join(map(chr, p)) if isinstance(p, list) else p for p in prompts]
        longest = max(map(len, texts))
        for end in range(3, longest + 3, 3):
            if self.fail_at is not None and end > self.fail_at[0]:
                raise self.fail_at[1]
            for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                if end - 3 < len(text):
                    yield self._output(str(number), prompt, text, min(end, len(text)), params)

    def generate(self, prompts: Sequence[Any], params: Any) -> list[RequestOutput]:
        last = {output.request_id: output for output in self.stream(prompts, params)}
        return [last[str(number)] for number in range(len(prompts))]

    def stream_chat(self, messages: list[dict[str, str]], params: Any) -> Iterator[RequestOutput]:
        self.conversations.append([dict(message) for message in messages])
        return self.stream([messages[-1]["content"]], params)

    def _output(self, name: str, prompt: Any, text: str, end: int, params: Any) -> RequestOutput:
        done = end == len(text)
        answer = text[:end].upper()
        logprobs = None
        if params.logprobs is not None:
            logprobs = [{ord(c): Logprob(-0.5, 1, c), 0: Logprob(float("-inf"), 2, None)} for c in answer]
        samples = [
            CompletionOutput(index, answer, [ord(c) for c in answer], None, logprobs, "length" if done else None)
            for index in range(params.n)
        ]
        ids = prompt if isinstance(prompt, list) else [ord(c) for c in prompt]
        metrics = RequestMetrics(len(ids), end * params.n, 0.5, 2.0, 4, 1 << 20)
        return RequestOutput(name, None if isinstance(prompt, list) else prompt, ids, samples, done, metrics)

    def describe(self) -> list[str]:
        return ["memory budget 2.0 GiB as asked for"]

    def report(self) -> dict[str, Any]:
        print("a library that prints to stdout")
        return REPORT

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
