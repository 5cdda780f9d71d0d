"""What fewer bits cost in accuracy, and what they bring: perplexity, KL divergence and agreement on a text, bytes, and
seconds a token.

How to run (eight minutes for the bundled model on two cores, less with --precision; --quick reads a tenth of the text):

    python benchmarks/low_bit_quality.py [--quick] [--model FOLDER] [--text FILE] [--precision P --precision P ...]
        [--calibrate FILE]
    python benchmarks/low_bit_quality.py --speed [--quick] [--rounds 3] [--folder FOLDER]
    python benchmarks/low_bit_quality.py --packing [--folder FOLDER]

The model runs as a user would run it, once per precision, through the actors. The text (by default the bundled model's
held-out one) goes in windows of 1023 tokens, each behind a beginning-of-sequence token, as in `train_bundled_model.py
evaluate`. All is compared with the checkpoint computed in float32. int4 is measured twice: rounded to
nearest, and calibrated ("+gptq") on the bundled calibration text, none of which is in the held-out one; `share` is how
much of what rounding to nearest loses in perplexity is lost then.

    perplexity      e to the mean loss per token, and how much more than in float32
    KL              mean Kullback-Leibler divergence of the next token's distribution from that in float32, in nats
    same token      share of positions at which the most probable token is the same
    bits            per weight, over the quantized matrices, and over the whole store

--speed (four minutes, 7 GB of disk, kept with --folder): a random Llama of 1.04 billion weights beside its embedding
table, all in memory, decodes one request; median over the rounds, in which the precisions take turns, of the time per
token. The bundled model is too small for that: what it takes is not its weights.

--packing (three minutes): the processor time of packing a random Llama of 33 million weights, for each of them: what
int4 takes beyond copying 16 bits, and --calibrate beyond int4. Each packing is said as it ends, so that a run that is
ended from outside leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

from random_llama import LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.prepare import prepare_store
from pipo_ray.report.quality import Logits, Quality, windows_of

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
PRECISIONS = ("int8", "int4-g32", "int4-g32-sym", "int4", "int4-sym")
CALIBRATED = ("int4-g32", "int4-g32-sym", "int4", "int4-sym")
WINDOW = 1023

FAST = ("16bit", "int8", "int4-g32", "int4")
MIDDLE = LlamaShape(layers=16)
SMALL = LlamaShape(layers=2, hidden=1024, intermediate=4096, heads=8, kv_heads=2, vocabulary=4096)
TOKENS = 64


def text_windows(model: Path, text: str, window: int = WINDOW) -> list[list[int]]:
    """Token ids in windows of `window`, each behind the token that begins a sequence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return windows_of(ids, [tokenizer.bos_token_id], window + 1, len(ids))


def logits_of(model: Path, windows: list[list[int]], **options: Any) -> list[Logits]:
    """Per window [tokens, vocabulary]."""
    with LLM(model, ray_address="local", memory="4GiB", **options) as llm:
        return [llm.score([{"prompt_token_ids": window}])[0] for window in windows]


def compare(windows: list[list[int]], got: list[Logits], original: list[Logits]) -> dict[str, float]:
    """Perplexity, KL divergence from `original` and agreement with it."""
    quality = Quality()
    for window, ours, theirs in zip(windows, got, original, strict=True):
        quality.add(window, ours, theirs)
    return {"perplexity": quality.perplexity, "kl": quality.kl, "same_token": quality.same_token}


def bits_of(model: Path, **options: Any) -> tuple[float, float]:
    """Bits per weight over the quantized matrices (16 if there are none), and over the whole store."""
    manifest = prepare_store(model, **options).manifest
    tensors = [tensor for block in manifest.blocks for tensor in block.tensors]
    packed = [tensor for tensor in tensors if tensor.panels is not None]
    weights, quantized = (sum(math.prod(t.weight_shape) for t in some) for some in (tensors, packed))
    nbytes, packed_bytes = (sum(tensor.nbytes for tensor in some) for some in (tensors, packed))
    return 8 * packed_bytes / quantized if packed else 16.0, 8 * nbytes / weights


def show(row: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """Print a row of the table, and return it."""
    more = row["perplexity"] / (first or row)["perplexity"] - 1
    bits = f"{row['bits']:.2f} ({row['whole_bits']:.2f})" if "bits" in row else ""
    share = f"{row['share']:7.0%}" if "share" in row else ""
    print(
        f"{row['precision']:14} {bits:12} {row['perplexity']:8.3f} {more:+8.2%} {row['kl']:12.5f} "
        f"{row['same_token']:10.2%}{share}",
        flush=True,
    )
    return row


def seconds_per_token(model: Path, precision: str) -> tuple[float, int]:
    """Of one request that is decoded with all weights in memory; and the bytes of the weights."""
    with LLM(model, precision=precision, ray_address="local", memory="8GiB") as llm:
        prompt = [[1, *range(5, 20)]]
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        (result,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
        report = llm.report()
        if report["streamed_bytes_per_sweep"]:
            raise SystemExit("the weights do not fit in 8 GiB of memory")
        return 1 / result.metrics.tokens_per_s, report["model_bytes"]


def packing_processor_s(model: Path, precision: str, **options: Any) -> tuple[float, int]:
    """Processor time of packing in the child process, user and system; and the number of weights that are quantized."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    prepared = prepare_store(model, precision=precision, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not prepared.packed_now:
        raise SystemExit(f"{prepared.folder} was there already")
    tensors = [tensor for block in prepared.manifest.blocks for tensor in block.tensors]
    weights = sum(math.prod(tensor.weight_shape) for tensor in tensors if tensor.panels is not None)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    how = " --calibrate" if options.get("calibrate") else ""
    print(
        f"{precision}{how}: {weights / 1e6:.1f} million weights quantized, {seconds:.1f} s of processor time",
        flush=True,
    )
    return seconds, weights


def show_speed(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Print the time per token of each precision."""
    os.environ["PIPO_CACHE"] = str(folder / "cache")
    if not (model := folder / "middle").exists():
        make_checkpoint(model, MIDDLE)
    times: dict[str, list[float]] = {precision: [] for precision in FAST}
    sizes = {}
    for _ in range(rounds):
        for precision in FAST:
            seconds, sizes[precision] = seconds_per_token(model, precision)
            times[precision].append(seconds)
    rows = []
    print("precision    GiB   ms/token (least, most)")
    for precision, some in times.items():
        middle = statistics.median(some)
        rows.append({"precision": precision, "bytes": sizes[precision], "seconds_per_token": some})
        print(
            f"{precision:10} {sizes[precision] / 2**30:5.2f} {1e3 * middle:8.1f}   ({1e3 * min(some):.1f}, "
            f"{1e3 * max(some):.1f})",
            flush=True,
        )
    return rows


def show_packing(folder: Path) -> list[dict[str, Any]]:
    """Print the processor time that rounding takes, for each weight."""
    if not (model := folder / "small").exists():
        make_checkpoint(model, SMALL)
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        plain, _ = packing_processor_s(model, "16bit", cache=cache)
        nearest, weights = packing_processor_s(model, "int4", cache=cache)
        calibrated, _ = packing_processor_s(model, "int4", cache=cache, calibrate=True)
    per_weight = {"int4": (nearest - plain) / weights, "int4 --calibrate": (calibrated - nearest) / weights}
    for name, seconds in per_weight.items():
        print(f"{name} takes {1e6 * seconds:.3f} us more for each weight")
    return [{"weights": weights, "processor_s_per_weight": per_weight}]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--precision", action="append")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.speed or options.packing:
        with tempfile.TemporaryDirectory(prefix="pipo-speed-") as scratch:
            folder = options.folder or Path(scratch)
            rows = show_speed(folder, 1 if options.quick else options.rounds) if options.speed else []
            rows += show_packing(folder) if options.packing else []
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        return
    windows = text_windows(options.model, options.text.read_text())
    if options.quick:
        windows = windows[: max(1, len(windows) // 10)]
    print(f"{sum(len(window) - 1 for window in windows)} tokens")
    print("precision      bits (whole)  perplexity            KL  same token  share")
    original = logits_of(options.model, windows, dtype="float32")
    rows = [show({"precision": "float32", **compare(windows, original, original)}, None)]
    for precision in ("16bit", *(options.precision or PRECISIONS)):
        nearest = math.nan
        for calibrate in (False, options.calibrate or True) if precision in CALIBRATED else (False,):
            how: dict[str, Any] = {"precision": precision, "calibrate": calibrate}
            matrices, whole = bits_of(options.model, **how)
            row = {"precision": precision, "bits": matrices, "whole_bits": whole}
            row |= compare(windows, logits_of(options.model, windows, **how), original)
            if calibrate:
                first = rows[0]["perplexity"]
                row |= {"precision": f"{precision}+gptq", "share": (row["perplexity"] - first) / (nearest - first)}
            nearest = row["perplexity"]
            rows.append(show(row, rows[0]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
