"""`pipo run --json`: one JSON document on stdout, and what its keys mean."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from pipo_ray.outputs import CompletionOutput, Logprob, RequestOutput

JSON_KEYS = """\
keys of the --json document
  model                   MODEL, as given
  results                 one entry per prompt, in the order given:
    prompt                the text; null where token ids were given
    prompt_token_ids      its token ids
    num_prompt_tokens     their number
    num_generated_tokens  tokens generated, of all samples together
    ttft_s                seconds from submission to the first token
    tokens_per_s          tokens after the first, per second after the first; null for a single token
    sweeps                passes over the weights that served this prompt (shared with the others in the batch)
    bytes_streamed        bytes of weights read from disk for them
    text, token_ids       the answer, as text and as token ids (with the one that ended it)
    finish_reason         "stop", "length" or "abort"
    stop_reason           the stop text that ended it; null for the model's own end of sequence
    cumulative_logprob    sum of the chosen tokens' log probabilities (with --logprobs)
    logprobs              with --logprobs, per token: a list of {token_id, logprob, rank, decoded_token}, the chosen
                          token first
    samples               with --n above 1: every sample, each with index, text, token_ids, finish_reason, stop_reason,
                          cumulative_logprob, logprobs; the keys above are those of the first
  sweeps, bytes_streamed  of the whole run
  elapsed_s               seconds from start to end, starting up included
  peak_memory_bytes       the most RAM that all processes of the run took together
  memory_budget_bytes     --memory
  weight_memory_bytes     --weight-memory, or what was derived from --memory
  huge_page_bytes         of the slots, what lies in huge pages; 0 where the system has none
  kv_ram_bytes            with --kv-in-ram, KV cache in RAM
  kv_disk_bytes           with --kv-on-disk, KV cache on the drive
  gpu_memory_bytes        --gpu-memory; null without one
  model_bytes             all weights of the model
  resident_bytes          those that stayed in memory and were not streamed
  streamed_bytes_per_sweep  those that did not stay: read from disk in each sweep
  kv_tokens               tokens that the KV cache holds
  stages                  per actor {stage, busy, waiting, paused, starved}: shares of its time, from 0 to 1 (paused:
                          gave way to other programs, with --background); and busy_s, waiting_s, paused_s in seconds
  explanation             with --explain: what limits this run, and what would help most
With one prompt, the keys of its entry are at the top level, too (sweeps and bytes_streamed are the run's)."""


def to_json(model: str, outputs: Sequence[RequestOutput], report: dict[str, Any]) -> str:
    """The document; see JSON_KEYS."""
    results = [_result(output) for output in outputs]
    document: dict[str, Any] = {"model": model, "results": results}
    if len(results) == 1:
        document |= results[0]
    # ASCII, so that no locale can spoil it.
    return json.dumps(_finite(document | report), indent=2, allow_nan=False)


def _result(output: RequestOutput) -> dict[str, Any]:
    result: dict[str, Any] = {"prompt": output.prompt, "prompt_token_ids": list(output.prompt_token_ids)}
    result |= dataclasses.asdict(output.metrics)
    samples = [_sample(sample) for sample in output.outputs]
    result |= {key: value for key, value in samples[0].items() if key != "index"}
    if len(samples) > 1:
        result["samples"] = samples
    return result


def _sample(sample: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if sample.logprobs is not None:
        logprobs = [[_logprob(token_id, one) for token_id, one in entry.items()] for entry in sample.logprobs]
    return {
        "index": sample.index,
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "cumulative_logprob": sample.cumulative_logprob,
        "logprobs": logprobs,
    }


def _logprob(token_id: int, one: Logprob) -> dict[str, Any]:
    return {"token_id": token_id, "logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}


def _finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
