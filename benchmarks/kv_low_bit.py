"""What a KV cache in few bits takes, and what it costs in accuracy.

How to run (five minutes of processor time; --quick takes four windows of the text and no variants):

    python benchmarks/kv_low_bit.py [--quick] [--windows N] [--model FOLDER] [--text FILE] [--json FILE]

Memory: of one layer of Llama-3-8B's shape (8 heads of 128, bf16) at 32,768 tokens, as the cache itself counts its
bytes, scales and the 16-bit window included; and of the bundled model's shape (2 heads of 32).

Accuracy: the bundled model on its held-out text, in float32 so that nothing but the KV cache differs (a window of the
text is 1,024 tokens, all that the model can hold). What a token sees depends on its position alone, so scoring a window
is what decoding it token by token would be. Counted are the tokens behind the 192nd, which see packed pages, and for
`late` those behind the 768th. All is compared with the KV cache as it comes from the model.

    perplexity      e to the mean loss per token, and how much more than with the whole KV cache
    KL              mean Kullback-Leibler divergence of the next token's distribution, in nats
    same token      share of positions at which the most probable token is the same

Variants of 4 bits, by a cache that keeps what the rounded values stand for: keys per token as values are, no window
(but the page at work), and a window of 512. The first of them repeats the real cache, as a check.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
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
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, WINDOW_TOKENS
from pipo_ray.quant.kv_rounding import round_along
from pipo_ray.report.quality import Quality

LONG, LATE = 32768, 768
SHAPES = {"Llama-3-8B": (8, 128), "bundled": (2, 32)}


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
        few = self.rounded(keys[:, :count], per_token=self.keys_per_token), self.rounded(values[:, :count], True)
        seen = [torch.cat([f, t[:, count:]], dim=1) for f, t in zip(few, (keys, values), strict=True)]
        return attend(query, seen[0], seen[1], rule)

    def rounded(self, tensor: Tensor, per_token: bool) -> Tensor:
        """What `tensor` [heads, tokens, dim], whole pages, stands for in few bits."""
        if not tensor.shape[1]:
            return tensor
        pages = tensor.unflatten(1, (-1, PAGE_TOKENS))
        parts = round_along(pages, 3 if per_token else 2, self.bits)
        return (parts.zeros.float() + parts.scales.float() * parts.codes).flatten(1, 2)

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
def logits_of(model: Any, window: list[int], cache: SequenceKV) -> Any:
    """[tokens, vocabulary] float32 of a window, page by page."""
    rows = []
    for start in range(0, len(window), PAGE_TOKENS):
        ids = torch.tensor([window[start : start + PAGE_TOKENS]])
        row = RaggedCache((Segment(cache, 0, ids.shape[1]),))
        positions = torch.arange(start, start + ids.shape[1])[None]
        with ragged_row(row):
            rows.append(model(ids, position_ids=positions, past_key_values=row, use_cache=True).logits[0])
        row.advance()
    return torch.cat(rows).float().numpy()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--windows", type=int, help="of the text; default: all")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the fastest for a tiny model
    document = {"memory": memory(), "accuracy": accuracy(options)}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


def memory() -> list[dict[str, Any]]:
    """Bytes per token at LONG tokens, and how much less that is than at 16 bits."""
    rows = []
    print(f"one layer at {LONG} tokens   bits   bytes per token   times less")
    for name, (heads, dim) in SHAPES.items():
        wide = bytes_at(16, heads, dim)
        for bits in (16, 8, 4):
            nbytes = bytes_at(bits, heads, dim)
            rows.append({"shape": name, "bits": bits, "bytes_per_token": nbytes / LONG, "times_less": wide / nbytes})
            print(f"{name:27} {bits:4} {nbytes / LONG:17.1f} {wide / nbytes:12.3f}", flush=True)
    return rows


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation=RAGGED_ATTENTION
    ).eval()
    layers = model.config.num_hidden_layers
    windows = [one for one in text_windows(options.model, options.text.read_text()) if len(one) > LATE + 64]
    windows = windows[: options.windows or (4 if options.quick else None)]
    caches: dict[str, Callable[[int], SequenceKV]] = {
        "8 bits": LowBitStore((8,) * layers).open, "4 bits": LowBitStore((4,) * layers).open,
    }  # fmt: skip
    if not options.quick:
        caches |= {
            "4, as a check": lambda _: Variant(4),
            "4, keys per token": lambda _: Variant(4, keys_per_token=True),
            "4, no window": lambda _: Variant(4, window=0),
            "4, window 512": lambda _: Variant(4, window=512),
            "8, keys per token": lambda _: Variant(8, keys_per_token=True),
        }
    totals = {name: (Quality(), Quality()) for name in ("whole", *caches)}
    for window in windows:
        whole = logits_of(model, window, SequenceCache(len(window)))
        for name, (quality, late) in totals.items():
            made = whole if name == "whole" else logits_of(model, window, caches[name](len(window)))
            quality.add(window[SHORT_TOKENS:], made[SHORT_TOKENS:], whole[SHORT_TOKENS:])
            late.add(window[LATE:], made[LATE:], whole[LATE:])
    rows = []
    print(f"\n{totals['whole'][0].count} tokens")
    print("KV cache              perplexity                  KL  same token        late")
    for name, (quality, late) in totals.items():
        more = quality.perplexity / totals["whole"][0].perplexity - 1
        rows.append({
            "cache": name, "tokens": quality.count, "perplexity": quality.perplexity, "more": more, "kl": quality.kl,
            "same_token": quality.same_token, "same_token_late": late.same_token,
        })  # fmt: skip
        print(
            f"{name:20} {quality.perplexity:11.3f} {more:+9.3%} {quality.kl:11.6f} {quality.same_token:11.3%} "
            f"{late.same_token:11.3%}"
        )
    return rows


if __name__ == "__main__":
    main()
