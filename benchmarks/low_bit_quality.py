"""What fewer bits cost in accuracy: perplexity, KL divergence and agreement on a text, and the bytes that are left.

How to run (six minutes for the bundled model on two cores; --quick reads a tenth of the text):

    python benchmarks/low_bit_quality.py [--quick] [--model FOLDER] [--text FILE] [--precision P --precision P ...]
        [--calibrate FILE]

The model runs as a user would run it, once per precision, through the actors. The text (by default the bundled model's
held-out one) goes in windows of 1023 tokens, each behind a beginning-of-sequence token, as in `train_bundled_model.py
evaluate`. All is compared with the checkpoint computed in float32. int4 is measured twice: rounded to
nearest, and calibrated ("+gptq") on the bundled calibration text, none of which is in the held-out one; `share` is how
much of what rounding to nearest loses in perplexity is lost then.

    perplexity      e to the mean loss per token, and how much more than in float32
    KL              mean Kullback-Leibler divergence of the next token's distribution from that in float32, in nats
    same token      share of positions at which the most probable token is the same
    bits            per weight, over the quantized matrices, and over the whole store
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from pipo_ray import LLM
from pipo_ray.prepare import prepare_store
from pipo_ray.report.quality import Logits, Quality, windows_of

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
PRECISIONS = ("int8", "int4-g32", "int4-g32-sym", "int4", "int4-sym")
CALIBRATED = ("int4-g32", "int4-g32-sym", "int4", "int4-sym")
WINDOW = 1023


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--precision", action="append")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
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
