"""What a KV cache in few bits takes, and what it costs in accuracy.

How to run (five minutes of processor time; --quick takes four windows of the text and no variants):

    python benchmarks/kv_low_bit.py [--quick] [--windows N] [--model FOLDER] [--text FILE] [--json FILE]
    python benchmarks/kv_low_bit.py --model FOLDER --text FOLDER/heldout.txt --context 32768 [--windows N] [--threads N]

The second form takes a model with room for so many tokens (`long_context_model.py` makes one), and no variants. A
window of 32,768 tokens takes five minutes of processor time on a CPU and, with --device cuda, 11 s (one H200).

Memory: of one layer of Llama-3-8B's shape (8 heads of 128) and of the model's own (the bundled one has 2 heads of 32),
in bf16 at 32,768 tokens, as the cache itself counts its bytes, scales and the 16-bit window included.

Accuracy: the model on a text it was not trained on, in float32 so that nothing but the KV cache differs, through the
attention and the packed pages of a run. What a token sees depends on its position alone, so scoring a window is what
decoding it token by token would be. Counted are the tokens behind the 192nd, which see packed pages, and for `late`
those behind the 768th of 1,024, or the last 2,048 of a longer window. All is compared with the KV cache as it comes
from the model.

    perplexity      e to the mean loss per token, and how much more than with the whole KV cache
    KL              mean Kullback-Leibler divergence of the next token's distribution, in nats
    same token      share of positions at which the most probable token is the same

Variants of 4 bits, by a cache that keeps what the rounded values stand for: keys per token as values are, no window
(but the page at work), and a window of 512. The first of them repeats the real cache, as a check.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from low_bit_quality import BUNDLED, text_windows
from torch import Tensor

from pipo_ray.model.attention import ragged_row
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.facts import RAGGED_ATTENTION
from pipo_ray.model.kv_cache import RaggedCache, Segment, SequenceCache, SequenceKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, WINDOW_TOKENS, PageLayout
from pipo_ray.quant.kv_rounding import round_along
from pipo_ray.report.quality import Quality

LONG, SHORT = 32768, 1024
SHAPE = (8, 128)
"""Key-value heads of Llama-3-8B and their size."""

CHUNK_TOKENS = 1024
"""Tokens that go through the model at a time in a long window: few passes, and scores that fit in memory."""


def bytes_at(bits: int, heads: int, dim: int) -> int:
    """Bytes of one layer's cache of LONG tokens in bf16."""
    cache: SequenceKV = SequenceCache(LONG) if bits == 16 else LowBitStore((bits,)).open(LONG)
    token = torch.zeros(heads, 1, dim, dtype=torch.bfloat16)
    cache.attend(0, token, token, token, AttentionRule(1.0))
    return cache.nbytes


@dataclass
class Variant:
    """A cache that keeps keys and values whole, and beside them what they stand for when rounded: for experiments."""

    bits: int
    window: int = WINDOW_TOKENS
    keys_per_token: bool = False
    capacity: int = 0
    length: int = 0
    layers: dict[int, list[Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """A chunk is a page: all its tokens see the same pages rounded."""
        if layer in self.layers:
            keys, values = (torch.cat(pair, dim=1) for pair in zip(self.layers[layer], (keys, values), strict=True))
        self.layers[layer] = [keys, values]
        count = max(0, self.length - self.window) // PAGE_TOKENS * PAGE_TOKENS
        few = self.rounded_keys(keys[:, :count]), self.rounded_values(values[:, :count])
        seen = [torch.cat([f, t[:, count:]], dim=1) for f, t in zip(few, (keys, values), strict=True)]
        return attend(query, seen[0], seen[1], rule)

    def rounded_keys(self, keys: Tensor) -> Tensor:
        """What keys [heads, tokens, dim] of whole pages stand for in few bits."""
        if self.keys_per_token:
            return self.rounded_values(keys)
        return self.rounded(keys.unflatten(1, (-1, PAGE_TOKENS)), 2).flatten(1, 2) if keys.shape[1] else keys

    def rounded_values(self, values: Tensor) -> Tensor:
        """The same of values; heads share a scale as in `PageLayout`."""
        shared = PageLayout(len(values), values.shape[2], values.shape[2], self.bits).heads_per_group
        return self.rounded(values.unflatten(0, (-1, shared)), (1, 3)).flatten(0, 1) if values.shape[1] else values

    def rounded(self, tensor: Tensor, dim: int | tuple[int, int]) -> Tensor:
        """With a scale along `dim`."""
        parts = round_along(tensor, dim, self.bits)
        return parts.zeros.float() + parts.scales.float() * parts.codes

    def advance(self, num_tokens: int) -> None:
        """A page is complete."""
        self.length += num_tokens

    def drop(self) -> None:
        """Nothing is shared."""

    @property
    def nbytes(self) -> int:
        """Not what is of interest here."""
        return 0


@torch.inference_mode()
def compare(
    model: Any, window: Sequence[int], caches: Mapping[str, SequenceKV], chunk: int, found: Mapping[str, list[Quality]]
) -> None:
    """Add a window's tokens to what was found for each cache, by where they are counted from; the first cache is what
    the others are compared with. All go chunk by chunk, so that no window's logits [tokens, vocabulary] are kept.
    """
    starts, last = starts_of(len(window)), len(window) - 1
    for start in range(0, len(window), chunk):
        ids = torch.tensor([window[start : start + chunk]], device=model.device)
        stop, positions = start + ids.shape[1], torch.arange(start, start + ids.shape[1], device=model.device)[None]
        following = torch.tensor(window[start + 1 : stop + 1], device=model.device)
        made = {}
        for name, cache in caches.items():
            row = RaggedCache((Segment(cache, 0, ids.shape[1]),))
            with ragged_row(row):
                logits = model(ids, position_ids=positions, past_key_values=row, use_cache=True).logits[0]
            row.advance()
            made[name] = torch.log_softmax(logits.float(), dim=-1)
        whole, *_ = made.values()
        for name, ours in made.items():
            for quality, first in zip(found[name], starts, strict=True):
                if (begin := max(first, start)) < (end := min(stop, last)):
                    rows = slice(begin - start, end - start)
                    add(quality, following[rows], ours[rows], whole[rows])


def add(quality: Quality, following: Tensor, ours: Tensor, whole: Tensor) -> None:
    """As `Quality.add`, of log probabilities [tokens, vocabulary] where they are: the tokens `following` [tokens]."""
    quality.loss -= float(ours.gather(-1, following[:, None]).sum(dtype=torch.float64))
    quality.divergence += float((whole.exp() * (whole - ours)).sum(dtype=torch.float64))
    quality.same += int((ours.argmax(-1) == whole.argmax(-1)).sum())
    quality.count += len(following)


def starts_of(length: int) -> tuple[int, int]:
    """From where on tokens of a window are counted: all that see packed pages, and the late ones."""
    return SHORT_TOKENS, max(3 * SHORT // 4, length - 2 * SHORT)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--windows", type=int, help="of the text; default: all")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--context", type=int, default=SHORT, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=1, help="one is the fastest for a tiny model and short windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    document = {"memory": memory(options.model), "accuracy": accuracy(options)}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


def memory(model: Path) -> list[dict[str, Any]]:
    """Bytes per token at LONG tokens, and how much less that is than at 16 bits."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    shapes = {"Llama-3-8B": SHAPE, "the model": (config.num_key_value_heads, config.head_dim)}
    rows = []
    print(f"one layer at {LONG} tokens   bits   bytes per token   times less")
    for name, (heads, dim) in shapes.items():
        wide = bytes_at(16, heads, dim)
        for bits in (16, 8, 4):
            nbytes = bytes_at(bits, heads, dim)
            rows.append({
                "shape": name, "heads": heads, "dim": dim, "bits": bits, "bytes_per_token": nbytes / LONG,
                "times_less": wide / nbytes,
            })  # fmt: skip
            print(f"{name:27} {bits:4} {nbytes / LONG:17.1f} {wide / nbytes:12.3f}", flush=True)
    return rows


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation=RAGGED_ATTENTION
    ).to(options.device).eval()  # fmt: skip
    if options.context > (room := model.config.max_position_embeddings):
        raise SystemExit(f"--context {options.context}: {options.model} has {room} positions")
    layers = model.config.num_hidden_layers
    windows = text_windows(options.model, options.text.read_text(), options.context - 1)
    windows = [one for one in windows if len(one) > starts_of(options.context)[1] + 64]
    windows = windows[: options.windows or (4 if options.quick else None)]
    caches: dict[str, Callable[[int], SequenceKV]] = {
        "whole": SequenceCache, "8 bits": LowBitStore((8,) * layers).open, "4 bits": LowBitStore((4,) * layers).open,
    }  # fmt: skip
    long = options.context > SHORT
    if not (options.quick or long):
        caches |= {
            "4, as a check": lambda _: Variant(4),
            "4, keys per token": lambda _: Variant(4, keys_per_token=True),
            "4, no window": lambda _: Variant(4, window=0),
            "4, window 512": lambda _: Variant(4, window=512),
            "8, keys per token": lambda _: Variant(8, keys_per_token=True),
        }
    totals = {name: [Quality(), Quality()] for name in caches}
    began = time.process_time()
    for number, window in enumerate(windows, start=1):
        opened = {name: open_(len(window)) for name, open_ in caches.items()}
        compare(model, window, opened, CHUNK_TOKENS if long else PAGE_TOKENS, totals)
        so_far = ", ".join(f"{name} {totals[name][0].same_token:.3%}" for name in ("8 bits", "4 bits"))
        seconds = time.process_time() - began
        print(f"window {number} of {len(windows)}: {seconds:.0f} s; same token {so_far}", flush=True)
    rows = []
    print(
        f"\n{len(windows)} windows of {options.context} tokens, {totals['whole'][0].count} of them counted, "
        f"{totals['whole'][1].count} late; {time.process_time() - began:.0f} s of processor time on {options.device}"
    )
    print("KV cache              perplexity                  KL  same token        late")
    for name, (quality, late) in totals.items():
        more = quality.perplexity / totals["whole"][0].perplexity - 1
        rows.append({
            "cache": name, "context": options.context, "windows": len(windows), "tokens": quality.count,
            "perplexity": quality.perplexity, "more": more, "kl": quality.kl, "same_token": quality.same_token,
            "late_tokens": late.count, "kl_late": late.kl, "same_token_late": late.same_token,
        })  # fmt: skip
        print(
            f"{name:20} {quality.perplexity:11.3f} {more:+9.3%} {quality.kl:11.6f} {quality.same_token:11.3%} "
            f"{late.same_token:11.3%}"
        )
    return rows


if __name__ == "__main__":
    main()
