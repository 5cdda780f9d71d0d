"""A random fault campaign: actors are killed at random moments, again and again, and the text is compared.

How to run (no GPU, no network; half a minute for 10 rounds on two idle cores):

    python benchmarks/fault_campaign.py [--quick] [--rounds 40] [--seed 1] [--model DIR] [--stripes N] [--json FILE]

Each round streams a batch of greedy and sampled requests in float32 and sends SIGKILL to one, two or all four actors:
at once, one shortly after the other (into the recovery), the same one twice, or before the round begins. Checked on the
stream: no token or character that was shown is repeated or changed; at the end all are those of the undisturbed run;
only the victims have new pids. From the trace: sweeps and tokens that were computed again. The deaths of a round are
dated back when it is over, so that three within a minute end the run only where a round kills one actor three times,
which none does. The exit status is 1 if anything was wrong; the seed and the number of the round repeat it. With
--stripes the store lies in so many further folders, and their loaders are killed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipo_ray import LLM, SamplingParams
from pipo_ray.pipeline.roll import WINDOW_S
from pipo_ray.prepare import pack_store

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
NUM_TOKENS = 40
BACK_S = 60.0
PROMPTS = ("Once upon a time", "The little dog", "It was a dark night, and the wind blew over the hills and", "A")
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.95, seed=5, n=2, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, logprobs=2, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(temperature=1.0, min_p=0.05, seed=6, max_tokens=NUM_TOKENS, ignore_eos=True),
)
SEQUENCES = 5


@dataclass
class Round:
    """What was done and what came of it. `kills` are (actor, tokens streamed before it, seconds after that), in order;
    in a round of the kind "before it begins" the seconds lie before its beginning.

    `stall_s` is the longest time without a new token, `sweeps_again` and `tokens_again` what was computed more than in
    the undisturbed run.
    """

    number: int
    kind: str
    kills: list[tuple[str, int, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    took_s: float = 0.0
    stall_s: float = 0.0
    sweeps_again: int = 0
    tokens_again: int = 0


@dataclass
class Streamed:
    """Tokens and texts by request and sample, and what was wrong with the stream."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    took_s: float = 0.0
    stall_s: float = 0.0


class Progress:
    """How many tokens have been streamed, for a thread that waits for it."""

    def __init__(self) -> None:
        self._tokens, self._ended = 0, False
        self._changed = threading.Condition()

    def reached(self, tokens: int | None) -> None:
        """So many; None: the stream has ended."""
        with self._changed:
            self._tokens, self._ended = (self._tokens, True) if tokens is None else (tokens, self._ended)
            self._changed.notify_all()

    def wait(self, tokens: int, seconds: float) -> bool:
        """Wait for so many tokens and then so long. False if the stream has ended before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._tokens >= tokens)
            return not self._changed.wait_for(lambda: self._ended, seconds)


def stream(llm: LLM, progress: Progress | None = None) -> Streamed:
    """Stream the batch and look at every output."""
    result = Streamed()
    begin = last = time.perf_counter()
    first: int | None = None
    for output in llm.stream(PROMPTS, PARAMS):
        first = int(output.request_id) if first is None else min(first, int(output.request_id))
        now = time.perf_counter()
        result.stall_s, last = max(result.stall_s, now - last), now
        for sample in output.outputs:
            key = (int(output.request_id), sample.index)
            shown, text = result.tokens.get(key, []), result.texts.get(key, "")
            if sample.token_ids[: len(shown)] != shown or not sample.text.startswith(text):
                result.wrong.append(f"what was streamed of {key} has changed")
            result.tokens[key], result.texts[key] = sample.token_ids, sample.text
        if progress is not None:
            progress.reached(sum(map(len, result.tokens.values())))
    if progress is not None:
        progress.reached(None)
    result.took_s = time.perf_counter() - begin
    result.tokens = {(key[0] - (first or 0), key[1]): value for key, value in result.tokens.items()}
    result.texts = {(key[0] - (first or 0), key[1]): value for key, value in result.texts.items()}
    return result


def choose(chance: random.Random, number: int, sweep_s: float, actors: Sequence[str]) -> Round:
    """What the round `number` does to which of `actors`, where a sweep takes `sweep_s`."""
    at = chance.randrange(SEQUENCES * (NUM_TOKENS - 5)), chance.uniform(0, sweep_s)
    first, second = chance.sample(actors, 2)
    kinds = {
        "one": [(first, *at)],
        "two at once": [(first, *at), (second, at[0], 0.0)],
        "into the recovery": [(first, *at), (second, at[0], chance.uniform(0, 3))],
        "the same twice": [(first, *at), (first, at[0], chance.uniform(1, 5))],
        "before it begins": [(first, 0, chance.uniform(0, 3))],
        "all": [(actor, at[0], 0.0) for actor in actors],
    }
    kind = chance.choice(["one", *kinds])  # "one" twice as often
    return Round(number, kind, kinds[kind])


def kill(llm: LLM, plan: Round, progress: Progress) -> None:
    """Do what the round has planned; what the generation is too short for is left out."""
    done = []
    for actor, tokens, seconds in plan.kills:
        if not progress.wait(tokens, seconds):
            break
        if kill_one(llm, actor):
            done.append((actor, tokens, seconds))
    plan.kills = done


def kill_one(llm: LLM, actor: str) -> bool:
    """SIGKILL the actor's process; False if it is dead and not back yet."""
    try:
        os.kill(llm.pids()[actor], signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def sweeps(llm: LLM, since: float) -> list[int]:
    """Tokens computed in each sweep that was completed since."""
    folder = llm._stage.trace_folder
    assert folder is not None
    found = []
    for file in folder.glob("ComputeWorker-*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if event["kind"] == "sweep" and event["end"] > since:
                found.append(event["labels"]["tokens"])
    return found


def play(llm: LLM, plan: Round, expected: Streamed, expected_sweeps: list[int]) -> None:
    """Play a round and write down what came of it."""
    before = llm.pids()
    if plan.kind == "before it begins":
        for actor, _, seconds in plan.kills:
            kill_one(llm, actor)
            time.sleep(seconds)  # how far it is with its recovery is what is random here
        begin = time.perf_counter()
        result = stream(llm)
    else:
        progress = Progress()
        killer = threading.Thread(target=kill, args=(llm, plan, progress), daemon=True)
        killer.start()
        begin = time.perf_counter()
        result = stream(llm, progress)
        killer.join()
    plan.took_s, plan.stall_s = result.took_s, result.stall_s
    plan.wrong += result.wrong
    if result.tokens != expected.tokens:
        plan.wrong.append("other tokens than undisturbed")
    if result.texts != expected.texts:
        plan.wrong.append("other text than undisturbed")
    again = sweeps(llm, begin)
    plan.sweeps_again, plan.tokens_again = len(again) - len(expected_sweeps), sum(again) - sum(expected_sweeps)
    victims = {actor for actor, *_ in plan.kills}
    if not victims & {"ComputeWorker", "Scheduler"} and again != expected_sweeps:
        plan.wrong.append("sweeps were computed again although neither compute worker nor scheduler died")
    # Of a scheduler's last sweep but one the driver may not have heard either, when they are as short as here.
    if plan.sweeps_again > len(plan.kills) + sum(actor == "Scheduler" for actor, *_ in plan.kills):
        plan.wrong.append(f"{plan.sweeps_again} sweeps were computed again")
    deadline = time.monotonic() + BACK_S
    while any(llm.pids()[victim] == before[victim] for victim in victims) and time.monotonic() < deadline:
        time.sleep(0.05)
    changed = {actor for actor, pid in llm.pids().items() if pid != before[actor]}
    if changed != victims:
        plan.wrong.append(f"{sorted(victims)} were killed, {sorted(changed)} are new")


def settle(llm: LLM) -> None:
    """Wait until every actor answers, then date its deaths back."""
    stage = llm._stage
    for actor in (*stage.nvme_loaders, stage.scheduler):
        stage.call(actor, "ready")
    stage.call(stage.staging_pool, "books")
    stage.call(stage.compute_worker, "times")
    stage.roll._rows[:, 2:] -= WINDOW_S + 1


def model_of(arguments: argparse.Namespace, folder: Path) -> str:
    """The model, or the striped store that was made of it in `folder`."""
    if not arguments.stripes:
        return str(arguments.model)
    stripes = [folder / f"stripe{number}" for number in range(arguments.stripes)]
    pack_store(arguments.model, folder / "store", dtype="float32", stripes=stripes)
    return str(folder / "store")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The campaign; all figures in seconds."""
    rounds: list[Round] = []
    with (
        tempfile.TemporaryDirectory(prefix="pipo-faults-") as folder,
        LLM(
            model_of(arguments, Path(folder)), dtype="float32", memory="3GiB",
            weight_memory=arguments.weight_memory, device="cpu", ray_address="local", trace=Path(folder) / "trace.json",
        ) as llm,
    ):  # fmt: skip
        stream(llm)
        begin = time.perf_counter()
        expected = stream(llm)
        expected_sweeps = sweeps(llm, begin)
        print(f"undisturbed: {expected.took_s:.1f} s, {len(expected_sweeps)} sweeps; seed {arguments.seed}", flush=True)
        for number in range(arguments.rounds):
            chance = random.Random(f"{arguments.seed} {number}")
            plan = choose(chance, number, expected.took_s / NUM_TOKENS, tuple(llm.pids()))
            play(llm, plan, expected, expected_sweeps)
            settle(llm)
            rounds.append(plan)
            kills = ", ".join(f"{actor} at {tokens} + {seconds:.2f} s" for actor, tokens, seconds in plan.kills)
            print(f"{number:4} {plan.kind:<18} {'; '.join(plan.wrong) or 'same text':<12} {kills}", flush=True)
    return {
        "seed": arguments.seed, "undisturbed_s": expected.took_s, "sweeps": len(expected_sweeps),
        "rounds": [asdict(one) for one in rounds], "wrong": sum(bool(one.wrong) for one in rounds),
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """One row for the rounds in which one actor died, for those in which several did, and for all."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in result["rounds"]:
        died = {actor for actor, *_ in one["kills"]}
        groups["nobody" if not died else "several" if len(died) > 1 else f"only {died.pop()}"].append(one)
    groups["all rounds"] = result["rounds"]
    columns = ("stall median", "stall most", "sweeps again", "tokens again")
    print(f"\n{'died':<20}{'rounds':>7}{'wrong':>7}" + "".join(f"{column:>14}" for column in columns))
    alone = sorted(name for name in groups if name.startswith("only "))
    for name in ["nobody", *alone, "several", "all rounds"]:
        if found := groups.get(name):
            stalls = [one["stall_s"] for one in found]
            print(
                f"{name:<20}{len(found):7}{sum(bool(one['wrong']) for one in found):7}"
                f"{statistics.median(stalls):12.2f} s{max(stalls):12.2f} s"
                f"{max(one['sweeps_again'] for one in found):14}{max(one['tokens_again'] for one in found):14}"
            )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default: 40")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default=str(BUNDLED), help="a checkpoint with a tokenizer (default: bundled)")
    parser.add_argument("--stripes", type=int, default=0, help="further folders of a striped store")
    parser.add_argument("--weight-memory", default="6MiB", help="less than the model, so that it streams")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (5 if arguments.quick else 40)
    result = run(arguments)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
