"""May requests share a ragged row in this architecture, and may a prompt be computed in chunks? Asked of a tiny random
model of it.

A leak between requests, or a state that is lost between chunks, shows as logits that differ from those of each request
run alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.attention import ragged_row
from pipo_ray.model.facts import RAGGED_ATTENTION
from pipo_ray.model.graph import meta_model
from pipo_ray.model.kv_cache import RaggedCache, Segment, SequenceCache
from pipo_ray.model.registry import special_case
from pipo_ray.model.tiny_config import TINY_CONTEXT, tiny_config

TOLERANCE = 1e-5
_SHORT, _LONG, _DECODE, _CHUNK = 7, 29, 3, 11
_SEEDS = 3
_MAX_PARAMETERS = 1 << 28


@dataclass(frozen=True)
class ProbeResult:
    """`ragged`: requests may share a row. `chunked`: a prompt may be split over sweeps. `reason`: why not, where one is
    False. `attention`: the implementation to run with.
    """

    ragged: bool
    chunked: bool
    reason: str
    attention: str


def probe(config: PretrainedConfig) -> ProbeResult:
    """Probe the architecture of `config` on the CPU in float32 (a second or two).

    Raises UnsupportedModelError if the architecture cannot run even one request alone with a cache.
    """
    try:
        tiny = tiny_config(config)
        _require_tiny(config, tiny)
        alone = _model(tiny, "eager")
        prompts = _prompts(tiny)
        wanted = [_whole(alone, prompt) for prompt in prompts]
    except UnsupportedModelError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {_line(error)}"
        raise UnsupportedModelError(
            f"architecture {config.model_type!r}: a tiny model of it does not run: {what}"
        ) from error
    own = _own_cache_works(alone, prompts, wanted, chunk=None)
    if own is not None:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r}: decoding with its cache gives other logits: {own}"
        )
    leak = _ragged_fails(config, tiny, alone, prompts, wanted)
    if leak is None:
        return ProbeResult(ragged=True, chunked=True, reason="", attention=RAGGED_ATTENTION)
    attention = _lane_attention(tiny, alone, prompts, wanted)
    chunk = _chunks_fail(tiny, attention)
    reason = f"requests run one by one within a sweep: {leak}"
    if chunk is not None:
        reason += f"; prompts are not split: {chunk}"
    return ProbeResult(ragged=False, chunked=chunk is None, reason=reason, attention=attention)


def tiny_model(config: PretrainedConfig) -> Any:
    """A tiny random model of `config`'s architecture, in float32 on the CPU, in evaluation mode.

    Raises UnsupportedModelError, or whatever transformers does.
    """
    tiny = tiny_config(config)
    _require_tiny(config, tiny)
    return _model(tiny, "eager")


def _chunks_fail(tiny: PretrainedConfig, attention: str) -> str | None:
    """Why prompts may not be split. Asked of several random models: some architectures (the delta rule of Qwen3-Next)
    amplify rounding beyond the tolerance in one of them, while a state that is lost shows in all.
    """
    reasons = []
    for seed in range(_SEEDS):
        model = _model(tiny, attention, seed)
        prompts = _prompts(tiny)
        wanted = [_whole(model, prompt) for prompt in prompts]
        reasons.append(_own_cache_works(model, prompts, wanted, chunk=_CHUNK))
        if reasons[-1] is None:
            return None
    return reasons[0]


def _require_tiny(config: PretrainedConfig, tiny: PretrainedConfig) -> None:
    """Refuse a configuration with sizes under names that `tiny_config` does not know, before it takes all memory."""
    model = meta_model(copy.deepcopy(tiny), torch.float32, "eager")
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MAX_PARAMETERS:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r}: it cannot be probed: the smallest model of it that could be made has "
            f"{count} parameters, more than {_MAX_PARAMETERS}"
        )


def _model(tiny: PretrainedConfig, attention: str, seed: int = 0) -> Any:
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(tiny), dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for parameter in model.parameters():
                # What begins at a neutral value (norms, biases, gates) would hide what it does.
                if parameter.dim() <= 1 or bool((parameter == parameter.flatten()[0]).all()):
                    parameter += 0.1 * torch.randn_like(parameter)
    finally:
        torch.random.set_rng_state(generator_state)
    model.eval()
    return model


def _copy(tiny: PretrainedConfig, attention: str, original: Any) -> Any:
    model = _model(tiny, attention)
    model.load_state_dict(original.state_dict())
    return model


def _lane_attention(tiny: PretrainedConfig, alone: Any, prompts: list[torch.Tensor], wanted: list[torch.Tensor]) -> str:
    """For requests that run one by one: the first implementation that gives the logits of "eager", which makes the
    scores of all heads and tokens at once.
    """
    for attention in (RAGGED_ATTENTION, "sdpa"):
        try:
            model = _copy(tiny, attention, alone)
            whole = [_difference(_whole(model, prompt), rows) for prompt, rows in zip(prompts, wanted, strict=True)]
            if max(whole) <= TOLERANCE and _own_cache_works(model, prompts, wanted, chunk=None) is None:
                return attention
        except Exception:  # an architecture that knows only some names, or calls an implementation in its own way
            continue
    return "eager"


def _prompts(tiny: PretrainedConfig) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocabulary = tiny.get_text_config().vocab_size
    return [
        torch.randint(3, vocabulary, (1, min(n + _DECODE, TINY_CONTEXT)), generator=generator) for n in (_SHORT, _LONG)
    ]


@torch.inference_mode()
def _whole(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of the last prompt token and of each decoded token, from forward passes without a cache."""
    rows = []
    for stop in range(tokens.shape[1] - _DECODE, tokens.shape[1] + 1):
        rows.append(model(input_ids=tokens[:, :stop], use_cache=False).logits[0, -1])
    return torch.stack(rows)


@torch.inference_mode()
def _own_cache_works(
    model: Any, prompts: list[torch.Tensor], wanted: list[torch.Tensor], chunk: int | None
) -> str | None:
    """The requests take turns, as lanes do: a state that the modules keep to themselves shows, too."""
    try:
        caches = [DynamicCache(config=model.config) for _ in prompts]
        rows: list[list[torch.Tensor]] = [[] for _ in prompts]
        cuts = []
        for tokens in prompts:
            prompt = tokens.shape[1] - _DECODE
            cuts.append([*range(0, prompt, chunk or prompt), *range(prompt, tokens.shape[1] + 1)])
        for turn in range(max(map(len, cuts)) - 1):
            for tokens, cache, mine, got in zip(prompts, caches, cuts, rows, strict=True):
                if turn + 1 < len(mine):
                    part = tokens[:, mine[turn] : mine[turn + 1]]
                    logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
                    if mine[turn + 1] >= tokens.shape[1] - _DECODE:
                        got.append(logits[0, -1])
        for got, expected in zip(rows, wanted, strict=True):
            difference = _difference(torch.stack(got), expected[: len(got)])
            # A RoPE that changes with the length is rebuilt by the scheduler's rule, not by the cache: judged on what
            # the cache keeps.
            if not difference <= TOLERANCE and (chunk or rebuild_length(model.config) is None):
                return f"logits differ by {difference:.1e}" + (" in chunks" if chunk else "")
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"
    return None


@torch.inference_mode()
def _ragged_fails(
    config: PretrainedConfig,
    tiny: PretrainedConfig,
    alone: Any,
    prompts: list[torch.Tensor],
    wanted: list[torch.Tensor],
) -> str | None:
    if not special_case(config.model_type).ragged:
        return "declared in the registry"
    try:
        shared = _copy(tiny, RAGGED_ATTENTION, alone)
        for chunk in (None, _CHUNK):
            got = _run_ragged(shared, prompts, chunk)
            for rows, expected in zip(got, wanted, strict=True):
                difference = _difference(rows, expected)
                if not difference <= TOLERANCE:
                    return f"in a shared row its logits differ by {difference:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"
    return None


def _run_ragged(model: Any, prompts: list[torch.Tensor], chunk: int | None) -> list[torch.Tensor]:
    caches = [SequenceCache(capacity=tokens.shape[1]) for tokens in prompts]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    lengths = [tokens.shape[1] - _DECODE for tokens in prompts]
    while any(cache.length < tokens.shape[1] for cache, tokens in zip(caches, prompts, strict=True)):
        ids, positions, segments, members = [], [], [], []
        column = 0
        for index, (cache, tokens) in enumerate(zip(caches, prompts, strict=True)):
            done = cache.length
            if done >= tokens.shape[1]:
                continue
            step = min(chunk or lengths[index], lengths[index] - done) if done < lengths[index] else 1
            ids.append(tokens[0, done : done + step])
            positions.append(torch.arange(done, done + step))
            segments.append(Segment(cache, column, column + step))
            members.append(index)
            column += step
        cache_of_row = RaggedCache(tuple(segments))
        with ragged_row(cache_of_row):
            logits = model(
                input_ids=torch.cat(ids)[None], position_ids=torch.cat(positions)[None],
                past_key_values=cache_of_row, use_cache=True,
            ).logits[0]  # fmt: skip
        cache_of_row.advance()
        for index, segment in zip(members, segments, strict=True):
            if segment.cache.length >= lengths[index]:
                rows[index].append(logits[segment.stop - 1])
    return [torch.stack(r) for r in rows]


def rebuild_length(config: PretrainedConfig) -> int | None:
    """For a RoPE that changes its frequencies once a sequence is longer than so many tokens (longrope, dynamic): that
    length.

    Keys made before are then wrong, and the cache is rebuilt from the tokens, as transformers' `generate` does for
    Phi-3.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *rope.values()]:
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            length = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(length or text.max_position_embeddings)
    return None


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else ""
