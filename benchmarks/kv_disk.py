"""KV pages on the drive: a prompt of 8k tokens with RAM for a quarter of its KV, against all of it in RAM; and what the
encryption costs.

How to run (1 GiB free in --folder, which is to be on the drive that is asked about; three minutes, --quick: one):

    python benchmarks/kv_disk.py [--tokens 8192] [--new 32] [--layers 8] [--hidden 1024] [--rounds 3] [--folder DIR]
        [--kv-precision 4] [--share 4] [--quick] [--json FILE]

A random Llama (hidden size 1024, 8 KV heads of 64, bf16; all weights in memory, so that nothing but KV moves) reads the
bundled held-out text in chunks of 512 tokens and goes on for 32. Printed per run: seconds to the first token and per
token behind it, bytes saved and loaded, and whether the log probabilities of all of the vocabulary are bit-equal to
those of the run with all pages in RAM, at every new token. "one range" is the KV cache without pages, as it is without
--kv-on-disk. With --kv-precision the same of a KV cache of so many bits, with as much RAM. Below: GB/s of pages through
the file with the loader's number of threads, as they are, with a checksum, and encrypted, in turns; and of the cipher
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from random_llama import BUNDLED, LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.pipeline.page_server import PAGE_THREADS
from pipo_ray.plan.budget import PROCESS_BYTES, plan_run
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.plan.kv_disk import RUN_BYTES, KVOnDisk, disk_page_bytes, pages_of, ram_bytes_for
from pipo_ray.prepare import prepare_store
from pipo_ray.session.huge_pages import scratch_memory
from pipo_ray.session.kv_file import KVFile, read_key
from pipo_ray.session.memory import format_size

CHUNK = 512
MIB = 1 << 20


def run(store: Path, kv_bytes: int, wish: KVOnDisk | None, bits: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One start with so much RAM for KV of so many bits."""
    prepared = prepare_store(str(store))
    total = arguments.tokens + arguments.new
    plan = plan_run(
        prepared.manifest, prepared.facts, memory_bytes=20 << 30, max_batch_tokens=CHUNK, max_kv_tokens=total
    )
    memory = PROCESS_BYTES + plan.activation_bytes + plan.weight_bytes + kv_bytes
    params = SamplingParams(
        temperature=0.0, max_tokens=arguments.new, ignore_eos=True, logprobs=prepared.facts.vocab_size
    )
    with LLM(store, memory=memory, weight_memory=plan.weight_bytes, device="cpu", ray_address="local",
             max_batch_tokens=CHUNK, max_kv_tokens=total, kv_on_disk=wish,
             kv_precision=bits) as llm:  # fmt: skip
        prompt = llm.encode((BUNDLED / "heldout.txt").read_text())[: arguments.tokens]
        assert len(prompt) == arguments.tokens, f"the held-out text has {len(prompt)} tokens"
        output = llm.generate([{"prompt_token_ids": prompt}], params)[0]
        stages = {stage["stage"]: stage for stage in llm.report()["stages"]}
        lines = llm.describe()
    loader, metrics = stages["NvmeLoader"], output.metrics
    assert metrics.tokens_per_s is not None
    return {
        "first_token_s": metrics.ttft_s, "per_token_s": 1 / metrics.tokens_per_s, "plan": lines[-1],
        "saved_bytes": loader.get("kv_saved_bytes", 0), "loaded_bytes": loader.get("kv_loaded_bytes", 0),
        "waiting_s": stages["ComputeWorker"]["waiting_s"],
        "answer": (output.outputs[0].token_ids, output.outputs[0].logprobs),
    }  # fmt: skip


def generate(arguments: argparse.Namespace, base: Path) -> dict[str, Any]:
    """The runs, and their ratios to the one with all pages in RAM."""
    hidden, heads = arguments.hidden, arguments.hidden // 64
    shape = LlamaShape(arguments.layers, hidden, intermediate=11 * hidden // 4, heads=heads, kv_heads=heads // 2,
                       vocabulary=4096, positions=65536)  # fmt: skip
    checkpoint = base / "checkpoint"
    make_checkpoint(checkpoint, shape)
    facts = prepare_store(str(checkpoint)).facts
    total = arguments.tokens + arguments.new
    everything = facts.num_layers * pages_of(total) * disk_page_bytes(facts)
    plenty = ram_bytes_for(facts, total)
    share = arguments.share
    kinds: dict[str, tuple[int, KVOnDisk | None]] = {
        "one range": (plenty, None),
        "pages in RAM": (plenty, KVOnDisk(64 * MIB, str(base))),
        f"1/{share} in RAM": (everything // share, KVOnDisk(2 * everything, str(base), encrypted=False)),
        f"1/{share}, encrypted": (everything // share, KVOnDisk(2 * everything, str(base))),
    }
    rounds: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        rows: dict[str, Any] = {}
        for name, (kv_bytes, wish) in kinds.items():
            for bits in sorted({16, arguments.kv_precision}, reverse=True):
                rows[_named(name, bits)] = run(checkpoint, kv_bytes, wish, bits, arguments) | {"bits": bits}
        answers = {name: row.pop("answer") for name, row in rows.items()}
        for name, row in rows.items():
            row["bit_equal"] = answers[name] == answers[_named("pages in RAM", row["bits"])]
        rounds.append(rows)
    return {"kv_bytes": everything, "page_bytes": disk_page_bytes(facts), "rounds": rounds}


def _named(kind: str, bits: int) -> str:
    return kind if bits == 16 else f"{kind}, {bits} bits"


def page_rates(page_bytes: int, folder: Path, rounds: int, file_bytes: int = 512 * MIB) -> dict[str, Any]:
    """GB/s of pages written to and read from a file, as many at once as the loader takes, per round."""
    at_once = max(1, RUN_BYTES // page_bytes)
    num_pages = file_bytes // page_bytes // at_once * at_once
    file = KVFile(folder, num_pages * page_bytes)
    numbers, key = count(1), read_key(file.key_path)
    sealed = {
        "checksum": PageFile(file.path, page_bytes, None, lambda: next(numbers)),
        "encrypted": PageFile(file.path, page_bytes, key, lambda: next(numbers)),
    }
    raw = os.open(file.path, os.O_RDWR | os.O_DIRECT)
    memory = scratch_memory(PAGE_THREADS * at_once * page_bytes).reshape(PAGE_THREADS, at_once, page_bytes)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.shape, np.uint8)
    seals: dict[int, Any] = {}

    def rate(move: Callable[[list[memoryview], int], object]) -> float:
        def several(thread: int) -> None:
            mine = [page.data for page in memory[thread]]
            for page in range(thread * at_once, num_pages, PAGE_THREADS * at_once):
                move(mine, page)

        begin = time.perf_counter()
        with ThreadPoolExecutor(PAGE_THREADS) as pool:
            list(pool.map(several, range(PAGE_THREADS)))
        return num_pages * page_bytes / (time.perf_counter() - begin) / 1e9

    rates: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        row = rates.setdefault("as it is", {"write": [], "read": []})
        row["write"].append(rate(lambda pages, first: os.pwritev(raw, pages, first * page_bytes)))
        row["read"].append(rate(lambda pages, first: os.preadv(raw, pages, first * page_bytes)))
        for name, opened in sealed.items():
            row = rates.setdefault(name, {"write": [], "read": []})
            row["write"].append(rate(lambda pages, first, o=opened: seals.update({first: o.save(pages, first)})))
            row["read"].append(rate(lambda pages, first, o=opened: o.load(pages, first, seals[first])))
    os.close(raw)
    for opened in sealed.values():
        opened.close()
    file.close()
    return {"rates": rates, "cipher": cipher_rate(page_bytes)}


def cipher_rate(page_bytes: int, seconds: float = 1.0) -> float:
    """GB/s of one thread that encrypts."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key, page, target = os.urandom(32), memoryview(os.urandom(page_bytes)), memoryview(bytearray(page_bytes))
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        cipher = Cipher(algorithms.AES(key), modes.GCM(done.to_bytes(12, "little"))).encryptor()
        cipher.update_into(page, target)
        cipher.finalize()
        done += 1
    return done * page_bytes / (time.perf_counter() - begin) / 1e9


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024, help="size, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-precision", type=int, default=16, choices=(16, 8, 4), help="bits to compare with 16")
    parser.add_argument("--share", type=int, default=4, help="RAM is for one in so many bytes of the KV at 16 bits")
    parser.add_argument("--folder", type=Path, help="where everything is; default: the temporary folder")
    parser.add_argument("--quick", action="store_true", help="one round, 4 layers, 4096 tokens")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.layers, arguments.tokens = 1, 4, 4096
    base = Path(tempfile.mkdtemp(prefix="pipo-bench-", dir=arguments.folder))
    os.environ["PIPO_CACHE"] = str(base / "cache")
    try:
        result = generate(arguments, base)
        result |= page_rates(result["page_bytes"], base, max(3, arguments.rounds))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    rounds = result["rounds"]
    sizes = f"KV {format_size(result['kv_bytes'])}, pages of {PAGE_TOKENS} tokens, {format_size(result['page_bytes'])}"
    print(f"{arguments.tokens} tokens and {arguments.new} more, {arguments.layers} layers, {sizes}")
    for bits in sorted({16, arguments.kv_precision}, reverse=True):
        print(rounds[-1][_named(f"1/{arguments.share}, encrypted", bits)]["plan"])
    columns = f"{'saved':>10} {'loaded':>10} {'waiting':>8} bit-equal"
    print(f"{'':>24} {'first token':>12} {'per token':>10} {'ratio':>11} {columns}")
    for name in rounds[0]:
        first, each, waiting = (
            statistics.median(r[name][field] for r in rounds) for field in ("first_token_s", "per_token_s", "waiting_s")
        )
        ratios = [
            statistics.median(r[name][field] / r["pages in RAM"][field] for r in rounds)
            for field in ("first_token_s", "per_token_s")
        ]
        last, equal = rounds[-1][name], all(r[name]["bit_equal"] for r in rounds)
        print(f"{name:>24} {first:10.2f} s {each * 1e3:7.1f} ms {ratios[0]:5.2f} {ratios[1]:5.2f} "
              f"{format_size(last['saved_bytes']):>10} {format_size(last['loaded_bytes']):>10} {waiting:6.2f} s "
              f"{'yes' if equal else 'no'}")  # fmt: skip
    print(f"{'pages through the file':>24} {'write':>10} {'read':>10}")
    for name, row in result["rates"].items():
        print(f"{name:>24} {statistics.median(row['write']):5.2f} GB/s {statistics.median(row['read']):5.2f} GB/s")
    print(f"AES-256-GCM, one thread: {result['cipher']:.1f} GB/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    equal = all(row["bit_equal"] for rows in rounds for name, row in rows.items() if "one range" not in name)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
