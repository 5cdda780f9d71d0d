"""Putting a request's output together from token events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo_ray.errors import PipoError
from pipo_ray.messages import RequestSpec, TokenEvent
from pipo_ray.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput


@dataclass
class _Sample:
    token_ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestAssembly:
    """A submitted request as the driver sees it: what was streamed out is the truth that survives any actor."""

    def __init__(
        self, spec: RequestSpec, prompt: str | None, submitted_s: float, sweeps: int, bytes_streamed: int
    ) -> None:
        self.spec, self._prompt, self._submitted_s = spec, prompt, submitted_s
        self._samples = [_Sample() for _ in range(spec.params.n)]
        self._first_sweep, self._first_bytes = sweeps, bytes_streamed
        self._sweeps = self._bytes = 0
        self._first_s: float | None = None
        self._last_s = submitted_s
        self.logits: list[npt.NDArray[np.float32]] = []
        self.num_events = 0
        self.error: PipoError | None = None

    def take(self, event: TokenEvent, sweeps_before: int, bytes_before: int) -> None:
        """Add a token. The scheduler's counters start anew with it; `*_before` are the totals of its predecessors."""
        sample = self._samples[event.index]
        result = event.result
        self.num_events += 1
        self.error = self.error or event.error
        if result.token_id is not None:
            sample.token_ids.append(result.token_id)
            sample.parts.append(result.text)
            sample.cumulative += result.logprob
            if result.logprobs is not None:
                sample.logprobs.append(result.logprobs)
            if self._first_s is None:
                self._first_s = event.time_s
        if result.logits is not None:
            self.logits.append(result.logits)
        if result.finish_reason is not None:
            sample.finish_reason, sample.stop_reason = result.finish_reason, result.stop_reason
        self._last_s = event.time_s
        self._sweeps = sweeps_before + event.sweeps - self._first_sweep
        self._bytes = bytes_before + event.bytes_streamed - self._first_bytes

    @property
    def finished(self) -> bool:
        """Whether all samples are complete."""
        return all(sample.finish_reason is not None for sample in self._samples)

    def resubmission(self) -> RequestSpec:
        """The request as a new scheduler needs it: with what was generated."""
        raw: dict[str, Any] = dict(vars(self.spec))
        raw["generated"] = {i: tuple(sample.token_ids) for i, sample in enumerate(self._samples)}
        raw["finished"] = tuple(i for i, sample in enumerate(self._samples) if sample.finish_reason is not None)
        self.logits.clear()
        return RequestSpec(**raw)

    def output(self) -> RequestOutput:
        """All of it so far."""
        wants = self.spec.params.logprobs is not None
        outputs = [
            CompletionOutput(
                index, "".join(sample.parts), list(sample.token_ids), sample.cumulative if wants else None,
                list(sample.logprobs) if wants else None, sample.finish_reason, sample.stop_reason,
            )
            for index, sample in enumerate(self._samples)
        ]  # fmt: skip
        generated = sum(len(sample.token_ids) for sample in self._samples)
        first = self._first_s
        # Tokens after the first of each sample: the first ones belong to the prompt's sweep.
        later = generated - len(self._samples)
        rate = later / (self._last_s - first) if first is not None and later > 0 and self._last_s > first else None
        metrics = RequestMetrics(
            num_prompt_tokens=len(self.spec.prompt_token_ids),
            num_generated_tokens=generated,
            ttft_s=None if first is None else first - self._submitted_s,
            tokens_per_s=rate,
            sweeps=self._sweeps,
            bytes_streamed=self._bytes,
        )
        return RequestOutput(
            self.spec.request_id, self._prompt, list(self.spec.prompt_token_ids), outputs, self.finished, metrics
        )
