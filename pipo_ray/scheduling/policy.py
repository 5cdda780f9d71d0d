"""Who takes part in the next sweep, and with how many tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pipo_ray.messages import SequenceStep
from pipo_ray.model.batch import PrefixPart
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.prefixes import PrefixCache
from pipo_ray.scheduling.sequences import Sequence


def admit(
    waiting: deque[Sequence], running: list[Sequence], limits: Limits, prefixes: PrefixCache | None = None
) -> None:
    """Move sequences from `waiting` to `running`, first come first served, as long as the KV budget holds all they can
    become, and a sweep's logits all that they may want. So nobody who runs is ever sent back, and a sequence's pages
    can be neighbours. What has ended makes room: nobody waits for it.
    """
    prefixes = prefixes or PrefixCache()
    while waiting and len(running) < limits.max_sequences and _fits(waiting[0], running, limits, prefixes):
        running.append(waiting.popleft())


def _fits(sequence: Sequence, running: list[Sequence], limits: Limits, prefixes: PrefixCache) -> bool:
    def has_room() -> bool:
        return prefixes.make_room(prefixes.held - limits.free([*running, sequence]))

    prefixes.place(sequence)
    prefixes.wish(sequence)
    if has_room():
        return True
    prefixes.wish(sequence, no_points=True)
    if has_room():
        return True
    # A prefix that is copied is there twice at first, for which there may be no room, nor for others' behind them.
    for others_alone in (False, True):
        prefixes.end(sequence)
        if others_alone:
            alone = [replace(other, shared=0, to_keep=0, points=0) for other in [*running, sequence]]
            if limits.window.tokens and limits.free(alone).lacks:
                break  # it would be of no use, and what they share by pages counts on it
            prefixes.forgo_copies()
        prefixes.place(sequence, alone=True)
        if has_room():
            return True
        prefixes.end(sequence)
    return False


def form_batch(running: list[Sequence], limits: Limits, prefixes: PrefixCache | None = None) -> list[SequenceStep]:
    """The steps of the next sweep, which will be sent: first one token of every decoding sequence, then prompts, in
    chunks, as far as the tokens reach.

    A prompt that may not be split comes whole, alone if it is larger than a sweep. There is always a step if anything
    is running.
    """
    prefixes = prefixes or PrefixCache()

    def has_room() -> bool:
        return not (limits.free(prefixes.sequences) - prefixes.held).lacks

    for sequence in running:
        if limits.rebuild_length is not None and sequence.cached <= limits.rebuild_length < sequence.length:
            sequence.cached = 0
    steps: list[SequenceStep] = []
    left, scored_left = limits.max_batch_tokens, limits.max_scored_tokens
    for sequence in running:
        if sequence.decoding:
            steps.append(_step(sequence, 1))
            left -= 1
            if not steps[-1].follows:
                prefixes.computes(steps[-1])
    for sequence in running:
        if sequence.decoding:
            continue
        if sequence.cached == 0:  # since it was admitted, more of its prefix may have come to be there
            prefixes.place(sequence)
        wanted = sequence.length - (sequence.cached or prefixes.start(sequence))
        room = min(left, scored_left) if sequence.score else left
        if limits.chunked and wanted > room:
            if room < min(wanted, _least_chunk(limits, sequence)) and steps:
                break
            wanted = max(1, min(wanted, room))
        elif wanted > room and steps:
            break
        prefix = () if sequence.cached else prefixes.begin(sequence, has_room)
        steps.append(_step(sequence, wanted, prefix))
        prefixes.computes(steps[-1])
        if kept := prefixes.keep(sequence, steps[-1].start, steps[-1].start + wanted):
            steps[-1] = replace(steps[-1], keep=kept)
        left -= wanted
        if sequence.score:
            scored_left -= wanted
    prefixes.formed(steps)
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


def _step(sequence: Sequence, num_tokens: int, prefix: tuple[PrefixPart, ...] = ()) -> SequenceStep:
    start = sequence.cached or sequence.begins
    stop = start + num_tokens
    last = stop == sequence.length
    return SequenceStep(
        sequence=sequence.name,
        token_ids=sequence.tokens(start, stop),
        start=start,
        capacity=sequence.most_cached,
        sample=last and not sequence.score,
        logits="all" if sequence.score else "last" if last else "none",
        spec=sequence.spec() if sequence.cached == 0 else None,
        follows=bool(sequence.chosen_ahead),
        prefix=prefix,
    )
