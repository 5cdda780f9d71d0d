"""Correctness on the GPU: models larger than the GPU budget, through the four actors, against transformers alone.

How to run (on a machine with CUDA; about ten minutes, 30 GB of temporary disk):

    python benchmarks/gpu_correctness.py [--quick] [--parts float32,kv,bfloat16,pages] [--mode MODE]
        [--json FILE]

For each architecture a random checkpoint is made. float32: the same 64 greedy tokens as transformers' `generate` (each
prompt alone, unpadded, eager attention), and teacher-forced on them max|a-b| / max|b| of the logits at each position
(at most 1e-4). bfloat16: our RMS error against the float32 result over that of transformers' own bfloat16 run, mean of
five seeds (at most 1.2). Memory: the GPU budget is enforced with `set_per_process_memory_fraction`;
`max_memory_reserved` plus the context, and the whole device's use as the driver counts it, stay below it. The most RAM
that was taken stays below --memory, and all slots, resident pieces and KV pages in RAM are pinned.
KV cache:
a batch whose keys and values exceed what the GPU has for them, in float32: the same text as transformers, pages must
have moved; and pages of random bits through the two tiers, compared bit by bit after every append.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

GPU_BUDGET = 1000 << 20
MEMORY = "8GiB"
PROMPT_LENGTHS = (5, 131, 47)
NEW_TOKENS = 64
KV_PROMPT_LENGTHS = (380, 410, 280, 470, 310, 370)
KV_NEW_TOKENS = 32
_WIDE = {"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 12, "num_key_value_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 9, **_WIDE},
    "gemma2": {"model_type": "gemma2", "num_hidden_layers": 9, "head_dim": 128, "sliding_window": 64, **_WIDE},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 9, "head_dim": 128, **_WIDE},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_hidden_layers": 6, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 768, **_WIDE,
    },
}  # fmt: skip
BF16_ARCHITECTURES = ("llama", "gemma2", "qwen3")
BF16_LAYERS = 16
PARTS = ("float32", "kv", "bfloat16", "pages")


def main() -> None:
    """Parse arguments, make references in a process of its own, run ours, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one bfloat16 seed")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is run (default: %(default)s)")
    parser.add_argument("--bfloat16", default=",".join(BF16_ARCHITECTURES), help="architectures (default: %(default)s)")
    parser.add_argument("--mode", default="performance", choices=["performance", "memory-saver"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--reference", nargs=2, metavar=("FOLDER", "SEEDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts, half = options.parts.split(","), options.bfloat16.split(",")
    full = list(ARCHITECTURES) if "float32" in parts else ["llama"] if "kv" in parts else []
    if options.reference:
        make_references(
            Path(options.reference[0]), full, half if "bfloat16" in parts else [], int(options.reference[1])
        )
        return
    seeds = 1 if options.quick else 5
    with tempfile.TemporaryDirectory(prefix="pipo-bench-") as folder:
        os.environ["PIPO_CACHE"] = f"{folder}/cache"
        subprocess.run([sys.executable, __file__, "--reference", folder, str(seeds), *sys.argv[1:]], check=True)
        print(f"{'architecture':12} {'dtype':9} {'model MB':>8} {'budget':>7} {'device':>7} {'MB copied':>10}  result")
        rows: list[dict[str, Any]] = []
        for name in full if "float32" in parts else ():
            rows.append(_show(run_float32(Path(folder), name, options.mode), options.json, rows))
        if "kv" in parts:
            rows.append(_show(run_large_kv(Path(folder), "llama", options.mode), options.json, rows))
        for name in half if "bfloat16" in parts else ():
            rows.append(_show(run_bfloat16(Path(folder), name, seeds, options.mode), options.json, rows))
        # Last: from here on this process has a CUDA context of its own, which would count as the stage's.
        if "pages" in parts:
            rows.append(_show(run_kv_pages(), options.json, rows))
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


def _show(row: dict[str, Any], file: Path | None, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Print a row as soon as there is one, and keep it: a run that is cut off is not lost."""
    print(
        f"{row['architecture']:12} {row['dtype']:9} {row['model_mb']:8.0f} {GPU_BUDGET / 1e6:7.0f} "
        f"{row['device_mb']:7.0f} {row['copied_mb']:10.0f}  {row['result']}  "
        f"{'ok' if row['ok'] else 'FAILED'}  ({row['seconds']:.0f} s)",
        flush=True,
    )
    if file:
        file.write_text(json.dumps([*before, row], indent=1))
    return row


def make_references(folder: Path, full: list[str], half: list[str], seeds: int) -> None:
    """Checkpoints and what transformers makes of them: `full` in float32, `half` in both precisions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    tasks = [(name, 0, "float32") for name in full]
    tasks += [(name, seed, "bfloat16") for name in half for seed in range(seeds)]
    for name, seed, dtype in tasks:
        torch.manual_seed(seed)
        sizes = {**ARCHITECTURES[name], **({"num_hidden_layers": BF16_LAYERS} if dtype == "bfloat16" else {})}
        config = AutoConfig.for_model(vocab_size=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
        with torch.device("cuda"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
                parameter.copy_(parameter.bfloat16().float())  # both precisions have the same weights
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, 8192, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        sequences = [_continue(model, prompt) for prompt in prompts] if dtype == "float32" else prompts
        arrays = {f"logits{i}": _logits(model, sequence) for i, sequence in enumerate(sequences)}
        if dtype == "bfloat16":
            model.to(torch.bfloat16)
            model.config.dtype = torch.bfloat16
            arrays |= {f"half{i}": _logits(model, sequence) for i, sequence in enumerate(sequences)}
        stem = f"{name}-{dtype}-{seed}"
        if stem == "llama-float32-0":
            long = [torch.randint(3, 8192, (n,), generator=generator).tolist() for n in KV_PROMPT_LENGTHS]
            wanted = [_continue(model, prompt, KV_NEW_TOKENS) for prompt in long]
            (folder / "large-kv.json").write_text(json.dumps({"prompts": long, "sequences": wanted}))
        model.save_pretrained(folder / stem)  # bfloat16: half the bytes, the same weights
        np.savez(folder / f"{stem}.npz", **arrays)
        (folder / f"{stem}.json").write_text(json.dumps({"prompts": prompts, "sequences": sequences}))
        del model
        torch.cuda.empty_cache()
        print(f"reference {stem} made", flush=True)


def _continue(model: Any, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    import torch

    ids = torch.tensor([prompt], device="cuda")
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return list(tokens[0].tolist())


def _logits(model: Any, sequence: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        ids = torch.tensor([sequence], device="cuda")
        return model(ids, use_cache=False).logits[0].float().cpu().numpy()


def run_float32(folder: Path, name: str, mode: str) -> dict[str, Any]:
    """Greedy tokens and logits in float32."""
    from pipo_ray import LLM, SamplingParams

    begin = time.perf_counter()
    truth = json.loads((folder / f"{name}-float32-0.json").read_text())
    arrays = np.load(folder / f"{name}-float32-0.npz")
    with LLM(
        folder / f"{name}-float32-0", device="cuda", gpu_memory=GPU_BUDGET, memory=MEMORY, max_batch_tokens=64,
        mode=mode,
    ) as llm:  # fmt: skip
        outputs = llm.generate(truth["prompts"], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True))
        wanted = [s[len(p) :] for s, p in zip(truth["sequences"], truth["prompts"], strict=True)]
        same = [output.outputs[0].token_ids == tokens for output, tokens in zip(outputs, wanted, strict=True)]
        scores = llm.score(truth["sequences"])
        report = llm.report()
    worst = max(
        float((np.abs(ours - arrays[f"logits{i}"]).max(-1) / np.abs(arrays[f"logits{i}"]).max(-1)).max())
        for i, ours in enumerate(scores)
    )
    row = _row(name, "float32", report)
    row |= {
        "same_text": same,
        "max_relative_error": worst,
        "result": f"text same {sum(same)}/{len(same)}, max error {worst:.1e}",
    }
    row["seconds"] = time.perf_counter() - begin
    row["ok"] = row["ok"] and all(same) and worst <= 1e-4
    return row


def run_large_kv(folder: Path, name: str, mode: str) -> dict[str, Any]:
    """Greedy tokens in float32 of a batch whose KV cache is larger than the GPU's share."""
    from pipo_ray import LLM, SamplingParams

    begin = time.perf_counter()
    truth = json.loads((folder / "large-kv.json").read_text())
    batch = sum(KV_PROMPT_LENGTHS) + len(KV_PROMPT_LENGTHS) * KV_NEW_TOKENS
    with LLM(
        folder / f"{name}-float32-0", device="cuda", gpu_memory=GPU_BUDGET, memory=MEMORY, kv_in_ram=True,
        max_batch_tokens=128, mode=mode,
    ) as llm:  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=KV_NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate(truth["prompts"], params)
        report = llm.report()
        print(*llm.describe(), sep="\n", flush=True)
    wanted = [s[len(p) :] for s, p in zip(truth["sequences"], truth["prompts"], strict=True)]
    same = [output.outputs[0].token_ids == tokens for output, tokens in zip(outputs, wanted, strict=True)]
    worker = next(stage for stage in report["stages"] if stage["stage"] == "ComputeWorker")
    loaded, saved = worker["kv_loaded_bytes"], worker["kv_saved_bytes"]
    row = _row(f"{name}, KV", "float32", report)
    row |= {
        "same_text": same, "batch_tokens": batch, "kv_tokens": report["kv_tokens"],
        "kv_loaded_bytes": loaded, "kv_saved_bytes": saved, "seconds": time.perf_counter() - begin,
        "result": f"text same {sum(same)}/{len(same)}, {batch} tokens of KV, {loaded / 1e6:.0f} MB loaded, "
        f"{saved / 1e6:.0f} MB saved",
    }  # fmt: skip
    # The batch runs at once, so its KV exceeded the GPU's share if anything was loaded again.
    row["ok"] = row["ok"] and all(same) and batch <= report["kv_tokens"] and loaded > 0
    return row


def run_kv_pages() -> dict[str, Any]:
    """Random bits through the tiers, of Llama-3-8B's width, while sequences join and leave."""
    import torch

    from pipo_ray.model.kv_tiers import KVTiers
    from pipo_ray.pipeline.device_ops import CudaOps
    from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement, page_bytes, ram_units_for

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from kv_sweeps import Written, append_random

    begin = time.perf_counter()
    layers, gpu_pages = 32, 1200
    nbytes = page_bytes(layers * 4096, layers)
    placement = KVPlacement((1,) * layers, nbytes, gpu_pages, ram_units_for((1,) * layers, 320, gpu_pages))
    tiers = KVTiers(placement, torch.bfloat16, CudaOps(torch.device("cuda", 0)))
    live: list[Written] = []
    for sweep in range(60):
        if sweep % 5 == 0 and sweep < 40:
            live.append(Written(tiers.open(40 * PAGE_TOKENS)))
        if sweep in (42, 46, 50):
            tiers.drop(live.pop(0).cache)
        batch = [(one, 2000 if one.cache.length == 0 else 1 + sweep % 3) for one in live]
        append_random(tiers, batch, layers, shape=(8, 128, 128))  # raises if a bit differs
    seconds = time.perf_counter() - begin
    moved = tiers.loaded_bytes + tiers.saved_bytes
    return {
        "architecture": "KV pages", "dtype": "bfloat16", "model_mb": 0.0, "device_mb": float("nan"),
        "copied_mb": moved / 1e6, "kv_loaded_bytes": tiers.loaded_bytes, "kv_saved_bytes": tiers.saved_bytes,
        "result": "bit-identical", "ok": tiers.loaded_bytes > tiers.saved_bytes > 0, "seconds": seconds,
    }  # fmt: skip


def run_bfloat16(folder: Path, name: str, seeds: int, mode: str) -> dict[str, Any]:
    """RMS error of the teacher-forced logits against float32, ours over transformers'."""
    from pipo_ray import LLM

    ratios = []
    begin = time.perf_counter()
    rows, started = [], []
    for seed in range(seeds):
        stem = folder / f"{name}-bfloat16-{seed}"
        truth = json.loads(stem.with_suffix(".json").read_text())
        arrays = np.load(stem.with_suffix(".npz"))
        before = time.perf_counter()
        with LLM(
            stem, device="cuda", dtype="bfloat16", gpu_memory=GPU_BUDGET, memory=MEMORY, max_batch_tokens=64,
            mode=mode,
        ) as llm:  # fmt: skip
            started.append(time.perf_counter() - before)
            scores = llm.score(truth["sequences"])
            rows.append(_row(name, "bfloat16", llm.report()))
        ours = _rms([score - arrays[f"logits{i}"] for i, score in enumerate(scores)])
        theirs = _rms([arrays[f"half{i}"] - arrays[f"logits{i}"] for i in range(len(scores))])
        ratios.append(ours / theirs)
        shutil.rmtree(stem)
        shutil.rmtree(Path(os.environ["PIPO_CACHE"]) / "stores")
    mean = float(np.mean(ratios))
    row = max(rows, key=lambda one: float(one["device_mb"]))
    row |= {
        "rms_ratios": ratios,
        "start_s": started,
        "result": f"RMS error over transformers' {mean:.3f} (mean of {seeds})",
    }
    row |= {"seconds": time.perf_counter() - begin, "ok": mean <= 1.2 and all(one["ok"] for one in rows)}
    return row


def _row(name: str, dtype: str, report: dict[str, Any]) -> dict[str, Any]:
    worker = next(stage for stage in report["stages"] if stage["stage"] == "ComputeWorker")
    budget = report["gpu_memory_bytes"]
    return {
        "architecture": name, "dtype": dtype, "model_mb": report["model_bytes"] / 1e6,
        "device_mb": worker["gpu_device_bytes"] / 1e6,
        "reserved_mb": worker["gpu_reserved_bytes"] / 1e6, "context_mb": worker["gpu_context_bytes"] / 1e6,
        "copied_mb": report["bytes_streamed"] / 1e6,
        "peak_memory_mb": report["peak_memory_bytes"] / 1e6,
        "pinned_mb": worker["pinned_bytes"] / 1e6,
        "ok": worker["gpu_device_bytes"] <= budget < report["model_bytes"] < report["bytes_streamed"]
        and report["peak_memory_bytes"] <= report["memory_budget_bytes"]
        and worker["pinned_bytes"] == report["weight_memory_bytes"] + report["kv_ram_bytes"]
        and worker["unpinned_bytes"] == 0,
        "machine": os.uname().nodename,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _rms(differences: list[Any]) -> float:
    return float(np.sqrt(np.mean(np.concatenate([d.ravel().astype(np.float64) ** 2 for d in differences]))))


if __name__ == "__main__":
    main()
