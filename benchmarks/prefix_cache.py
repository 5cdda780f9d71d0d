"""What prompts with a common beginning cost, with the prefix cache and without it.

How to run (a model of 0.4 GiB, random, in a temporary folder; four minutes):

    python benchmarks/prefix_cache.py [--layers 8] [--device cpu] [--kv-precision 4] [--own 30] [--folder DIR]
        [--quick] [--json FILE]

On one random Llama in bf16 that fits in memory, each once with `prefix_cache` and once without: a chat of ten turns,
each of which sends the whole conversation again with 40 tokens more, and is answered with 32; and 16 requests whose
first 2000 tokens are one system prompt, with 30 of their own and 16 tokens of answer, the first one alone and 15 at the
same time behind it. In a KV cache of few bits these begin where the first one's last tokens at 16 bits reach back to;
with `--own 130` they do not reach back so far, and the second one computes all again. Printed: tokens computed; seconds
to the first token (medians of the chat's later half, and of the 15); bytes of KV cache reserved while all 15 are
answered; and the ratios of without to with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from random_llama import LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams

TURNS, ASKED, ANSWERED = 10, 40, 32
REQUESTS, SYSTEM, NEW = 16, 2000, 16


def tokens(count: int, seed: int) -> list[int]:
    """A random prompt."""
    return [int(number) for number in np.random.default_rng(seed).integers(3, 30000, count)]


def stage(llm: LLM, name: str) -> dict[str, Any]:
    """What an actor says of itself."""
    return next(one for one in llm.report()["stages"] if one["stage"] == name)


def chat(llm: LLM, turns: int) -> dict[str, Any]:
    """A conversation."""
    before = stage(llm, "Scheduler")["tokens_computed"]
    history, first = [], []
    for turn in range(turns):
        history += tokens(ASKED, turn)
        (output,) = llm.generate([history], SamplingParams(temperature=0.0, max_tokens=ANSWERED, ignore_eos=True))
        history += output.outputs[0].token_ids
        first.append(output.metrics.ttft_s or 0.0)
    return {
        "tokens_computed": stage(llm, "Scheduler")["tokens_computed"] - before,
        "ttft_s": statistics.median(first[turns // 2 :]), "ttft_s_of_turns": first, "tokens": history,
    }  # fmt: skip


def requests(llm: LLM, system: int, own: int) -> dict[str, Any]:
    """Requests with one system prompt."""
    before = stage(llm, "Scheduler")["tokens_computed"]
    prompt = tokens(system, 100)
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    llm.generate([prompt + tokens(own, 101)], params)
    prompts = [prompt + tokens(own, 102 + number) for number in range(1, REQUESTS)]
    reserved, last = 0, {}
    for output in llm.stream(prompts, params):
        last[output.request_id] = output
        if not reserved and len(last) == len(prompts):
            reserved = stage(llm, "ComputeWorker")["cache_bytes"]
    outputs = [last[request] for request in sorted(last, key=int)]
    return {
        "tokens_computed": stage(llm, "Scheduler")["tokens_computed"] - before,
        "ttft_s": statistics.median(output.metrics.ttft_s or 0.0 for output in outputs),
        "kv_bytes": reserved, "tokens": [output.outputs[0].token_ids for output in outputs],
    }  # fmt: skip


def measure(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Both loads, with and without."""
    result: dict[str, Any] = {}
    turns, system = (4, 300) if arguments.quick else (TURNS, SYSTEM)
    for name, prefix_cache in (("with", True), ("without", False)):
        with LLM(
            checkpoint, device=arguments.device, memory=arguments.memory, ray_address="local",
            max_kv_tokens=REQUESTS * (system + arguments.own + NEW), prefix_cache=prefix_cache,
            kv_precision=arguments.kv_precision,
        ) as llm:  # fmt: skip
            print("\n".join(llm.describe()), file=sys.stderr)
            llm.generate([tokens(64, 99)], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
            result[name] = {"chat": chat(llm, turns), "requests": requests(llm, system, arguments.own)}
    for load in ("chat", "requests"):
        one, other = result["with"][load], result["without"][load]
        result[load] = {key: other[key] / one[key] for key in ("tokens_computed", "ttft_s", "kv_bytes") if one.get(key)}
        # In bf16 another batch may turn a token; how many answers are the same is worth knowing, and no error.
        result[load]["same_tokens"] = statistics.fmean(
            a == b for a, b in zip(one.pop("tokens"), other.pop("tokens"), strict=True)
        )
    return result


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kv-precision", default="16", help="bits of the KV cache: 16, 8 or 4")
    parser.add_argument("--own", type=int, default=30, help="tokens that each request has behind the system prompt")
    parser.add_argument("--folder", type=Path, help="keep the model here")
    parser.add_argument("--quick", action="store_true", help="two layers, four turns, a system prompt of 300 tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = LlamaShape(2 if arguments.quick else arguments.layers, hidden=1024, intermediate=4096, heads=16, kv_heads=4)
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="pipo-bench-"))
    os.environ["PIPO_CACHE"] = str(base / "cache")
    try:
        checkpoint = base / f"llama-{shape.layers}"
        if not checkpoint.exists():
            make_checkpoint(checkpoint, shape)
        result = measure(arguments, checkpoint)
    finally:
        if arguments.folder is None:
            shutil.rmtree(base, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
