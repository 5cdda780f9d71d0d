"""A prompt of 64k tokens on a GPU with three tiers of KV: GPU, RAM and drive, against all of it in memory.

How to run (a machine with CUDA, 40 GB of RAM and 45 GB of temporary disk; seven minutes):

    python benchmarks/gpu_kv_disk.py [--tokens 65536] [--new 32] [--layers 32] [--kv 2GiB] [--chunk 2048]
        [--without-pages] [--folder DIR] [--json FILE] [--trace DIR] [--every 10]

Llama-3-8B's shape with random bf16 weights and a GPU budget of 6 GiB. A prompt of random tokens in chunks of --chunk,
then 32 tokens more. Before it: GB/s of pages through the file with as many threads as the loader has. Meanwhile, every
so many seconds, what was moved so far. In the first run RAM has room for all of it; in the second the KV cache has --kv
bytes on GPU and RAM together, and the rest is in an encrypted file. The 1000 highest log probabilities of every new
token, over the whole vocabulary, must be the same bits in both. With --without-pages a third run has a GPU budget that
holds everything, and no pages: another order of additions, so its log probabilities differ by rounding; the largest
difference is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kv_disk import page_rates
from random_llama import LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.device import choose_device
from pipo_ray.plan.budget import CUDA_PROCESS_BYTES, plan_run
from pipo_ray.plan.kv_disk import KVOnDisk, disk_page_bytes, pages_of, ram_bytes_for
from pipo_ray.prepare import prepare_store
from pipo_ray.session.memory import format_size, parse_size

COMPARED = 1000
GPU_MEMORY = 6 << 30


def run(name: str, store: Path, prompt: list[int], arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """One start."""
    params = SamplingParams(temperature=0.0, max_tokens=arguments.new, ignore_eos=True, logprobs=COMPARED)
    total = len(prompt) + arguments.new
    trace = arguments.trace / f"{name.replace(' ', '-')}.json" if arguments.trace else None
    with LLM(store, device="cuda", max_batch_tokens=arguments.chunk, max_model_len=total, trace=trace,
             **settings) as llm:  # fmt: skip
        print(*llm.describe(), sep="\n", flush=True)
        with progress(llm, arguments.every):
            output = llm.generate([{"prompt_token_ids": prompt}], params)[0]
        stages = {stage["stage"]: stage for stage in llm.report()["stages"]}
        plan = llm._plan
    loader, worker, metrics = stages["NvmeLoader"], stages["ComputeWorker"], output.metrics
    assert metrics.tokens_per_s is not None
    row = {
        "first_token_s": metrics.ttft_s, "per_token_s": 1 / metrics.tokens_per_s,
        "gpu_kv_bytes": plan.kv_bytes - (plan.kv_disk.ram_bytes if plan.kv_disk else 0),
        "saved_bytes": loader.get("kv_saved_bytes", 0), "loaded_bytes": loader.get("kv_loaded_bytes", 0),
        "gpu_bytes": worker["gpu_reserved_bytes"] + worker["gpu_context_bytes"],
        "kv_waited_s": worker.get("kv_waited_s", 0.0),
        "answer": (output.outputs[0].token_ids, output.outputs[0].logprobs),
    }  # fmt: skip
    show(name, row)
    return row


@contextmanager
def progress(llm: LLM, every_s: float) -> Iterator[None]:
    """Print what was moved so far, every so many seconds."""
    over, begin = threading.Event(), time.perf_counter()

    def watch() -> None:
        before = 0
        while not over.wait(every_s):
            report = llm.report()
            stages = {stage["stage"]: stage for stage in report["stages"]}
            loader, worker = stages["NvmeLoader"], stages["ComputeWorker"]
            loaded = loader.get("kv_loaded_bytes", 0)
            print(
                f"    {time.perf_counter() - begin:5.0f} s: {report['sweeps']} sweeps, KV pages "
                f"{loader.get('kv_saved_bytes', 0) / 1e9:.1f} GB saved, {loaded / 1e9:.1f} GB loaded "
                f"({(loaded - before) / every_s / 1e9:.2f} GB/s), waited for {worker.get('kv_waited_s', 0.0):.1f} s",
                flush=True,
            )
            before = loaded

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def largest_difference(mine: Any, other: Any) -> float:
    """Of the log probabilities of the first new token; of tokens that both have."""
    a, b = mine[1][0], other[1][0]
    return max(abs(a[token].logprob - b[token].logprob) for token in a if token in b)


def measure(store: Path, arguments: argparse.Namespace, base: Path) -> dict[str, Any]:
    """All runs."""
    prepared = prepare_store(str(store))
    facts = prepared.facts
    prompt = torch.randint(
        3, facts.vocab_size, (arguments.tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    total = arguments.tokens + arguments.new
    everything = facts.num_layers * pages_of(total) * disk_page_bytes(facts)
    # More than does not fit on the GPU: so much has its room before keys and values.
    weights = plan_run(prepared.manifest, facts, memory_bytes=64 << 30).model_bytes
    rates = page_rates(disk_page_bytes(facts), base, 3)["rates"]
    for name, row in rates.items():
        print(
            f"pages through the file, {name}: {median(row['write']):.2f} GB/s written, {median(row['read']):.2f} read"
        )
    file = KVOnDisk(2 * everything, str(base))
    settings: dict[str, Any] = {
        "gpu_memory": GPU_MEMORY, "weight_memory": weights, "max_kv_tokens": total, "kv_on_disk": file,
    }  # fmt: skip
    rows: dict[str, Any] = {}
    fixed = CUDA_PROCESS_BYTES + weights
    plenty = fixed + ram_bytes_for(facts, total)
    rows["pages in RAM"] = run("pages in RAM", store, prompt, arguments, memory=plenty, **settings)
    in_ram = parse_size(arguments.kv, "--kv") - rows["pages in RAM"]["gpu_kv_bytes"]
    rows["three tiers"] = run("three tiers", store, prompt, arguments, memory=fixed + in_ram, **settings)
    if arguments.without_pages:
        everything_on = {"gpu_memory": 40 << 30, "memory": "40GiB", "max_kv_tokens": total}
        rows["no pages"] = run("no pages", store, prompt, arguments, **everything_on)
    answers = {name: row.pop("answer") for name, row in rows.items()}
    found = {
        "tokens": arguments.tokens, "kv_bytes": everything, "rows": rows, "file": rates,
        "bit_equal": answers["three tiers"] == answers["pages in RAM"], "device": torch.cuda.get_device_name(0),
    }  # fmt: skip
    if arguments.without_pages:
        found["difference_without_pages"] = largest_difference(answers["three tiers"], answers["no pages"])
    return found


def show(name: str, row: dict[str, Any]) -> None:
    """A line."""
    print(
        f"{name:>14}: first token {row['first_token_s']:7.1f} s, {row['per_token_s']:7.3f} s a token, "
        f"{row['saved_bytes'] / 1e9:.1f} GB saved, {row['loaded_bytes'] / 1e9:.1f} GB loaded, waited for pages "
        f"{row['kv_waited_s']:.1f} s, GPU {row['gpu_bytes'] / 1e9:.2f} GB",
        flush=True,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv", default="2GiB", help="KV cache on GPU and RAM together")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of the prompt in a sweep")
    parser.add_argument("--without-pages", action="store_true", help="and everything on the GPU")
    parser.add_argument("--folder", type=Path, help="for the store, which is kept there, and the file of KV pages")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--trace", type=Path, help="a folder for a trace of each run, which costs speed")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines of progress")
    arguments = parser.parse_args()
    choose_device("cuda")  # says what is missing
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="pipo-bench-kv-"))
    base.mkdir(parents=True, exist_ok=True)
    try:
        store = base / "long.store"
        if not store.exists():
            from pipo_ray.prepare import pack_store

            shape = LlamaShape(arguments.layers, 4096, 14336, 32, 8, 128256, rope_theta=500000.0, positions=131072)
            make_checkpoint(base / "checkpoint", shape)
            pack_store(base / "checkpoint", store)
            shutil.rmtree(base / "checkpoint")
        found = measure(store, arguments, base)
    finally:
        if arguments.folder is None:
            shutil.rmtree(base, ignore_errors=True)
    print(f"{found['device']}: {format_size(found['kv_bytes'])} of KV pages, bit-equal: {found['bit_equal']}")
    if "difference_without_pages" in found:
        print(f"largest difference from the run without pages: {found['difference_without_pages']:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0 if found["bit_equal"] else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
