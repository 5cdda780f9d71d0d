"""What generation returns, in the names and conventions of vLLM. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability under the model, before penalties, temperature and truncation.

    `rank` counts from 1, the most probable token. `decoded_token` is None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt; while it streams, all of it so far.

    `token_ids` include the one that ended it. `logprobs` has one entry per token: the chosen token, then the most
    probable ones; None if not asked for, and so is `cumulative_logprob`, the sum over the chosen tokens.
    `finish_reason` is None while it goes on. `stop_reason` is the stop string or stop token id that ended the text,
    None for the model's own end-of-sequence id.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether this sample is complete."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """What a request took. `num_generated_tokens` counts all its samples.

    `ttft_s`: seconds from submission to the first token, None before it. `tokens_per_s`: generated tokens after the
    first, per second after the first; None before the second. `sweeps`: passes over the weights that served the
    request, and `bytes_streamed` what was read for them; both are shared with the other requests in the batch.
    """

    num_prompt_tokens: int
    num_generated_tokens: int = 0
    ttft_s: float | None = None
    tokens_per_s: float | None = None
    sweeps: int = 0
    bytes_streamed: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples. `prompt` is None where token ids were given; `outputs` are ordered by `index`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
