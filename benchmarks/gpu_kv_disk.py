"""A prompt of 64k tokens on a GPU with three tiers of KV: GPU, RAM and drive, against all of it in memory.

How to run (a machine with CUDA, 40 GB of RAM and 45 GB of temporary disk; seven to eight minutes):

    python benchmarks/gpu_kv_disk.py [--tokens 65536] [--new 32] [--layers 32] [--kv 2GiB] [--chunk 2048]
        [--text FILE] [--kv-precision 4] [--without-pages] [--folder DIR] [--json FILE] [--trace DIR] [--every 10]
    python benchmarks/gpu_kv_disk.py --quick [--device cpu]

Llama-3-8B's shape with random bf16 weights and a GPU budget of 6 GiB. The prompt is a real text, nothing of it twice:
the bundled model's held-out text and its calibration text behind it, 86,762 tokens of its tokenizer (ids below 4,096 of
the 128,256), or FILE. It goes in chunks of --chunk, then 32 tokens more. Before it: GB/s of pages through the file with
as many threads as the loader has. Meanwhile, every so many seconds, what was moved so far. In the first run RAM has
room for all of it; in the second the KV cache has --kv bytes on GPU and RAM together, and the rest is in an encrypted
file. The log probabilities of the whole vocabulary must be the same bits in both, for each of the 32 tokens. To make
and send so many takes time with each of them, which is measured on a short prompt, with and without, and said. With
--kv-precision the KV has so many bits in both. With --without-pages a third run has a GPU budget that holds
everything, and no pages: another order of additions, so its log probabilities differ by rounding; the largest
difference is printed.

--quick tries the script: 4 layers of 1024, 4,096 tokens and 8 more, a quarter of their KV. --device cpu has two tiers.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from kv_disk import page_rates
from random_llama import BUNDLED, LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.device import choose_device
from pipo_ray.outputs import Logprob
from pipo_ray.plan.budget import CUDA_PROCESS_BYTES, PROCESS_BYTES, plan_run
from pipo_ray.plan.kv_disk import KVOnDisk, disk_page_bytes, pages_of, ram_bytes_for
from pipo_ray.prepare import prepare_store
from pipo_ray.session.memory import format_size, parse_size

GPU_MEMORY = 6 << 30
VOCABULARY = 128256
TEXTS = (BUNDLED / "heldout.txt", BUNDLED / "calibration.txt")


def prompt_of(texts: Sequence[Path], tokens: int) -> list[int]:
    """The first `tokens` ids of the bundled tokenizer for `texts`, one behind the other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = [token for text in texts for token in tokenizer.encode(text.read_text()).ids]
    if len(ids) < tokens:
        raise SystemExit(
            f"{', '.join(map(str, texts))}: {len(ids)} tokens, --tokens wants {tokens}; give a longer text"
        )
    return ids[:tokens]


def log_probabilities(entries: Sequence[Mapping[int, Logprob]]) -> npt.NDArray[np.float64]:
    """Of each new token, those of the whole vocabulary: [new, vocabulary]."""
    table = np.full((len(entries), VOCABULARY), np.nan)
    for row, entry in zip(table, entries, strict=True):
        row[np.fromiter(entry, np.int64, len(entry))] = [one.logprob for one in entry.values()]
    assert not np.isnan(table).any(), "a run did not give the log probabilities of all of the vocabulary"
    return table


def run(name: str, store: Path, prompt: list[int], arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """One start."""
    params = SamplingParams(temperature=0.0, max_tokens=arguments.new, ignore_eos=True, logprobs=VOCABULARY)
    total = len(prompt) + arguments.new
    trace = arguments.trace / f"{name.replace(' ', '-')}.json" if arguments.trace else None
    with LLM(store, device=arguments.device, max_batch_tokens=arguments.chunk, max_model_len=total, trace=trace,
             kv_precision=arguments.kv_precision, **settings) as llm:  # fmt: skip
        print(*llm.describe(), sep="\n", flush=True)
        with progress(llm, arguments.every):
            output = llm.generate([{"prompt_token_ids": prompt}], params)[0]
        stages = {stage["stage"]: stage for stage in llm.report()["stages"]}
        plan = llm._plan
        with_all, without = (seconds_per_token(llm, prompt[:16], number) for number in (VOCABULARY, None))
    loader, worker, metrics = stages["NvmeLoader"], stages["ComputeWorker"], output.metrics
    assert metrics.tokens_per_s is not None
    row = {
        "first_token_s": metrics.ttft_s, "per_token_s": 1 / metrics.tokens_per_s, "logprobs_s": with_all - without,
        "gpu_kv_bytes": plan.kv_bytes - (plan.kv_disk.ram_bytes if plan.kv_disk else 0),
        "activation_bytes": plan.activation_bytes,
        "saved_bytes": loader.get("kv_saved_bytes", 0), "loaded_bytes": loader.get("kv_loaded_bytes", 0),
        "gpu_bytes": worker.get("gpu_reserved_bytes", 0) + worker.get("gpu_context_bytes", 0),
        "kv_waited_s": worker.get("kv_waited_s", 0.0),
        "answer": log_probabilities(output.outputs[0].logprobs or []),
    }  # fmt: skip
    show(name, row)
    return row


def seconds_per_token(llm: LLM, prompt: list[int], logprobs: int | None) -> float:
    """Of three tokens behind a short prompt, with so many log probabilities of each."""
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=logprobs)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    assert output.metrics.tokens_per_s is not None
    return 1 / output.metrics.tokens_per_s


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


def measure(store: Path, arguments: argparse.Namespace, base: Path) -> dict[str, Any]:
    """All runs."""
    prompt = prompt_of([arguments.text] if arguments.text else TEXTS, arguments.tokens)
    prepared = prepare_store(str(store))
    facts = prepared.facts
    total = arguments.tokens + arguments.new
    everything = facts.num_layers * pages_of(total) * disk_page_bytes(facts)
    rates = page_rates(disk_page_bytes(facts), base, 3)["rates"]
    for name, row in rates.items():
        print(
            f"pages through the file, {name}: {median(row['write']):.2f} GB/s written, {median(row['read']):.2f} read"
        )
    plan = plan_run(prepared.manifest, facts, memory_bytes=64 << 30, max_batch_tokens=arguments.chunk,
                    max_kv_tokens=total)  # fmt: skip
    settings: dict[str, Any] = {"max_kv_tokens": total, "kv_on_disk": KVOnDisk(2 * everything, str(base))}
    if arguments.device == "cuda":
        # More than does not fit on the GPU: so much has its room before keys and values.
        settings |= {"gpu_memory": GPU_MEMORY, "weight_memory": plan.model_bytes}
        fixed = CUDA_PROCESS_BYTES + plan.model_bytes
    else:
        settings |= {"ray_address": "local", "weight_memory": plan.weight_bytes}
        fixed = PROCESS_BYTES + plan.activation_bytes + plan.weight_bytes
    rows: dict[str, Any] = {}
    plenty = fixed + ram_bytes_for(facts, total)
    rows["pages in RAM"] = run("pages in RAM", store, prompt, arguments, memory=plenty, **settings)
    on_gpu = rows["pages in RAM"]["gpu_kv_bytes"]
    if arguments.device == "cpu":  # with less memory there is less for activations
        fixed -= plan.activation_bytes - rows["pages in RAM"]["activation_bytes"]
    in_ram = parse_size(arguments.kv, "--kv") - on_gpu if arguments.kv else everything // 4
    rows["three tiers"] = run("three tiers", store, prompt, arguments, memory=fixed + in_ram, **settings)
    if arguments.without_pages:
        everything_on = {"gpu_memory": 40 << 30, "memory": "40GiB", "max_kv_tokens": total}
        rows["no pages"] = run("no pages", store, prompt, arguments, **everything_on)
    if not rows["three tiers"]["loaded_bytes"]:
        raise SystemExit(f"no page came from the drive: {arguments.tokens} tokens fit in memory; lower --kv")
    answers = {name: row.pop("answer") for name, row in rows.items()}
    tiers, in_memory = answers["three tiers"], answers["pages in RAM"]
    found = {
        "tokens": arguments.tokens, "kv_bytes": everything, "rows": rows, "file": rates,
        "bit_equal": [bool(np.array_equal(mine, other)) for mine, other in zip(tiers, in_memory, strict=True)],
        "difference": float(np.abs(tiers - in_memory).max()), "device": device_name(arguments.device),
    }  # fmt: skip
    if arguments.without_pages:
        # Of the first new token: of later ones the tokens before them may be others.
        found["difference_without_pages"] = float(np.abs(tiers[0] - answers["no pages"][0]).max())
    return found


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else "cpu"


def show(name: str, row: dict[str, Any]) -> None:
    """A line."""
    print(
        f"{name:>14}: first token {row['first_token_s']:7.1f} s, {row['per_token_s']:7.3f} s a token (up to "
        f"{row['logprobs_s']:.3f} of it for log probabilities), "
        f"{row['saved_bytes'] / 1e9:.2f} GB saved, {row['loaded_bytes'] / 1e9:.2f} GB loaded, waited for pages "
        f"{row['kv_waited_s']:.1f} s, GPU {row['gpu_bytes'] / 1e9:.2f} GB",
        flush=True,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv", help="KV cache on GPU and RAM together; default: 2GiB")
    parser.add_argument("--text", type=Path, help="of the prompt; default: the bundled held-out and calibration texts")
    parser.add_argument("--kv-precision", type=int, default=16, choices=(16, 8, 4), help="bits of the KV cache")
    parser.add_argument("--quick", action="store_true", help="a small model and a short prompt: to try the script")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of the prompt in a sweep")
    parser.add_argument("--without-pages", action="store_true", help="and everything on the GPU")
    parser.add_argument("--folder", type=Path, help="for the store, which is kept there, and the file of KV pages")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--trace", type=Path, help="a folder for a trace of each run, which costs speed")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between lines of progress")
    arguments = parser.parse_args()
    choose_device(arguments.device)  # says what is missing
    shape = LlamaShape(arguments.layers, 4096, 14336, 32, 8, VOCABULARY, rope_theta=500000.0, positions=131072)
    if arguments.quick:
        shape = LlamaShape(4, 1024, 2816, 16, 8, VOCABULARY, positions=131072)
        arguments.tokens, arguments.new, arguments.chunk = 4096, 8, 512
    elif arguments.kv is None:
        arguments.kv = "2GiB"
    base = arguments.folder or Path(tempfile.mkdtemp(prefix="pipo-bench-kv-"))
    base.mkdir(parents=True, exist_ok=True)
    try:
        store = base / "long.store"
        if not store.exists():
            from pipo_ray.prepare import pack_store

            make_checkpoint(base / "checkpoint", shape)
            for file in (base / "checkpoint").glob("tokenizer*"):
                file.unlink()  # else the text of each of the log probabilities' tokens is made
            pack_store(base / "checkpoint", store)
            shutil.rmtree(base / "checkpoint")
        found = measure(store, arguments, base)
    finally:
        if arguments.folder is None:
            shutil.rmtree(base, ignore_errors=True)
    equal = found["bit_equal"]
    print(
        f"{found['device']}: {format_size(found['kv_bytes'])} of KV pages (16 bits), held at {arguments.kv_precision}; "
        f"log probabilities of all {VOCABULARY} tokens bit-equal at {sum(equal)} of {len(equal)} new tokens (largest "
        f"difference {found['difference']})"
    )
    if "difference_without_pages" in found:
        print(f"largest difference from the run without pages: {found['difference_without_pages']:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0 if all(equal) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
