"""Who takes part in the next sweep, and with how many tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from pipo_ray.messages import SequenceStep
from pipo_ray.scheduling.sequences import Sequence


@dataclass(frozen=True)
class Limits:
    """`kv_tokens`: tokens of KV cache that the budget holds. `max_batch_tokens`: tokens per sweep. `chunked`: prompts
    may be split.

    `rebuild_length`: once a sequence is longer, its cache is rebuilt (RoPE that changes with the length); None: never.
    `max_sequences`: sequences that run at the same time, because each may want a row of logits in the same sweep.
    `max_scored_tokens`: tokens per sweep whose logits go to a client. `state_tokens`: what a sequence takes besides its
    tokens (a recurrent state), in tokens of KV cache. `page_tokens`: a sequence takes KV cache in pages of so
    many tokens.
    """

    kv_tokens: int
    max_batch_tokens: int
    chunked: bool = True
    rebuild_length: int | None = None
    max_sequences: int = 256
    max_scored_tokens: int = 1 << 30
    state_tokens: int = 0
    page_tokens: int = 1

    def reserved(self, sequence: Sequence) -> int:
        """Tokens of KV cache that are kept for `sequence`: whole pages for all it can become, and its state."""
        return -(-sequence.capacity // self.page_tokens) * self.page_tokens + self.state_tokens


def admit(waiting: deque[Sequence], running: list[Sequence], limits: Limits) -> None:
    """Move sequences from `waiting` to `running`, first come first served, as long as the KV budget holds all they can
    become, and a sweep's logits all that they may want. So nobody who runs is ever sent back, and a sequence's pages
    can be neighbours.
    """
    reserved = sum(limits.reserved(sequence) for sequence in running)
    while waiting and len(running) < limits.max_sequences:
        reserved += limits.reserved(waiting[0])
        if reserved > limits.kv_tokens:
            break
        running.append(waiting.popleft())


def form_batch(running: list[Sequence], limits: Limits) -> list[SequenceStep]:
    """The steps of the next sweep: first one token of every decoding sequence, then prompts, in chunks, as far as the
    tokens reach.

    A prompt that may not be split comes whole, alone if it is larger than a sweep. There is always a step if anything
    is running.
    """
    for sequence in running:
        if limits.rebuild_length is not None and sequence.cached <= limits.rebuild_length < sequence.length:
            sequence.cached = 0
    steps: list[SequenceStep] = []
    left, scored_left = limits.max_batch_tokens, limits.max_scored_tokens
    for sequence in running:
        if sequence.decoding:
            steps.append(_step(sequence, 1))
            left -= 1
    for sequence in running:
        if sequence.decoding:
            continue
        wanted = sequence.length - sequence.cached
        room = min(left, scored_left) if sequence.score else left
        if limits.chunked and wanted > room:
            if room < min(wanted, _least_chunk(limits, sequence)) and steps:
                break
            wanted = max(1, min(wanted, room))
        elif wanted > room and steps:
            break
        steps.append(_step(sequence, wanted))
        left -= wanted
        if sequence.score:
            scored_left -= wanted
    return steps


def after(running: list[Sequence], steps: tuple[SequenceStep, ...]) -> list[Sequence]:
    """The sequences as they will be when the sweep of `steps`, which runs, has ended: without those that end with it
    for certain. They may still end by what it chooses.
    """
    by_name = {step.sequence: step for step in steps}
    result = []
    for sequence in running:
        step = by_name.get(sequence.name)
        if step is None:
            result.append(sequence)
            continue
        stop = step.start + step.num_tokens
        ends = stop == sequence.length if sequence.score else len(sequence.generated) + 1 >= sequence.max_tokens
        if not (ends and (step.sample or sequence.score)):
            result.append(replace(sequence, cached=stop, chosen_ahead=int(step.sample)))
    return result


def _least_chunk(limits: Limits, sequence: Sequence) -> int:
    # A sweep streams all weights whatever it computes: a few tokens more are nearly free, but a chunk of a few tokens
    # delays the rest.
    least = max(1, limits.max_batch_tokens // 8)
    return min(least, limits.max_scored_tokens) if sequence.score else least


def _step(sequence: Sequence, num_tokens: int) -> SequenceStep:
    stop = sequence.cached + num_tokens
    last = stop == sequence.length
    return SequenceStep(
        sequence=sequence.name,
        token_ids=sequence.tokens(sequence.cached, stop),
        start=sequence.cached,
        capacity=sequence.capacity,
        sample=last and not sequence.score,
        logits="all" if sequence.score else "last" if last else "none",
        spec=sequence.spec() if sequence.cached == 0 else None,
        follows=bool(sequence.chosen_ahead),
    )
