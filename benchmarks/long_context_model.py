#!/usr/bin/env python3
"""A long-context variant of the bundled model, so that what a KV cache loses can be measured at 32,768 tokens.

How to run (four minutes of training, or `--seconds`, on a CUDA device; the texts need a Debian system and its archive):

    python benchmarks/long_context_model.py --write-texts texts.npz [--packages FOLDER]
    python benchmarks/long_context_model.py --texts texts.npz --out FOLDER [--seconds 240 | --steps N,N,N,N]

The texts are those of `train_bundled_model.py`, with the same documents held out, but in the order in which each source
has them: chapters of a novel, pages of a manual behind each other. So there is something to be found far back.

Training takes the bundled checkpoint, raises RoPE's base from 10,000 to 500,000 ("Effective long-context scaling of
foundation models", arXiv 2309.16039) and goes on with longer and longer rows: 1,024, 4,096, 16,384 and 32,768 tokens.
The result is an ordinary checkpoint, with its held-out text in FOLDER/heldout.txt, for

    python benchmarks/kv_low_bit.py --model FOLDER --text FOLDER/heldout.txt --context 32768

What it reports is the perplexity of held-out text by position in rows of 32,768, each token once in each quarter of a
row, beside that of the same tokens when only up to 1,024 tokens before them are seen, in rows of that length: by this
model, and by the bundled one. A model that uses its context has less far back than with the short rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_bundled_model import BOS, EOS, SEED, collect, drop_repeats, encode, fetch, save_checkpoint

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
SHORT, LONG = 1024, 32768
POSITIONS = LONG + SHORT
ROPE_BASE = 500_000.0
LENGTHS = (SHORT, 4096, 16384, LONG)
TIME_SHARES = (0.15, 0.2, 0.25, 0.4)
RANGES = ((0, 1024), (1024, 8192), (8192, LONG))
LEARNING_RATE, WARM_UP, DROPOUT, WEIGHT_DECAY = 1e-3, 0.03, 0.1, 0.1


def write_texts(file: Path, packages: Path | None) -> None:
    """`train`, `val` and `test`: token ids of all documents of a part, between <|bos|> and <|eos|>, in order."""
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "unpacked").mkdir()
        versions = fetch((packages or scratch / "packages").resolve(), scratch / "unpacked")
        documents, _, _ = collect(scratch / "unpacked")
    order = {(one.source, one.name): number for number, one in enumerate(documents)}
    random.Random(SEED).shuffle(documents)  # which of two equal paragraphs stays, as in the bundled model's corpus
    documents = sorted(drop_repeats(documents), key=lambda one: order[one.source, one.name])
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    parts = {}
    for part in ("train", "val", "test"):
        parts[part], _ = encode(tokenizer, [f"{BOS}{one.text}{EOS}" for one in documents if one.split == part])
    np.savez_compressed(file, **parts)
    sizes = {part: len(ids) for part, ids in parts.items()}
    print(json.dumps({"packages": versions, "tokens": sizes, "bytes": file.stat().st_size}, indent=1))


@dataclass(frozen=True)
class Texts:
    """Token ids [tokens] of each part, on the device."""

    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor

    @classmethod
    def load(cls, file: Path, device: torch.device) -> Texts:
        """What `write_texts` wrote."""
        arrays = np.load(file)
        return cls(*(torch.from_numpy(arrays[part].astype(np.int32)).to(device) for part in ("train", "val", "test")))


def stretched_model(device: torch.device) -> Any:
    """The bundled model with room for POSITIONS tokens, RoPE's larger base, and dropout as it was trained with."""
    model = causal_model(BUNDLED, device, max_position_embeddings=POSITIONS, rope_base=ROPE_BASE)

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def causal_model(folder: Path, device: torch.device, rope_base: float | None = None, **changes: Any) -> Any:
    """A checkpoint in float32 whose attention makes no mask: always causal, so FlashAttention takes it."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    config = LlamaConfig.from_pretrained(folder, attn_implementation="sdpa_causal", use_cache=False, **changes)
    if rope_base is not None:
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope_base}
    return LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).to(device)


def in_16_bits(device: torch.device) -> Any:
    """Products and attention in bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Loss of each token [rows, length] given those before it; `rows` [rows, length + 1]."""
    with in_16_bits(rows.device):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    following = rows[:, 1:]
    of_each = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), following.flatten(), reduction="none")
    return of_each.view(following.shape)


def drawn(texts: Texts, length: int, num_rows: int, random_: np.random.Generator) -> torch.Tensor:
    """Rows [num_rows, length + 1] from anywhere in the training text."""
    starts = torch.from_numpy(random_.integers(0, len(texts.train) - length, num_rows)).to(texts.train.device)
    return texts.train[starts[:, None] + torch.arange(length + 1, device=starts.device)].long()


def train(
    model: Any, texts: Texts, options: argparse.Namespace, log: Callable[..., None]
) -> Iterator[tuple[int, int, float]]:
    """Trains; yields stage, step and loss about every tenth of a stage. The rate follows the share that is done: of
    the time, or with `--steps` of the tokens.
    """
    decayed = [one for one in model.parameters() if one.ndim >= 2]
    groups = [{"params": decayed}, {"params": [o for o in model.parameters() if o.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    random_ = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    model.train()
    steps = [int(one) for one in options.steps.split(",")] if options.steps else None
    began = time.monotonic()
    shares = np.array(steps or TIME_SHARES, float)
    ends = np.cumsum(shares / shares.sum())
    for stage, length in enumerate(LENGTHS[: len(ends)]):
        begin = ends[stage - 1] if stage else 0.0
        done, progress, shown, sums = 0, float(begin), 0, []
        length = min(length, options.most_tokens)
        while progress < ends[stage] - 1e-9:
            rate = min(1.0, (progress + 1e-3) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate
            rows = drawn(texts, length, max(1, options.batch_tokens // length), random_)
            loss = losses(model, rows).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums.append(loss.detach())
            done += 1
            if steps:
                progress = float(begin + (ends[stage] - begin) * done / steps[stage])
            else:
                if done % 8 == 0 and rows.is_cuda:
                    torch.cuda.synchronize()  # else time runs ahead of the device
                progress = (time.monotonic() - began) / options.seconds
            part = int(10 * (progress - begin) / (ends[stage] - begin))
            if part > shown:
                shown = part
                yield stage, done, float(torch.stack(sums).mean())
                sums = []
        log(event="stage", length=length, steps=done)


@torch.no_grad()
def perplexities(
    model: Any, bundled: Any, ids: torch.Tensor, length: int, offsets: Sequence[int]
) -> list[dict[str, Any]]:
    """By range of positions in rows of `length`: of this model, and of both models in rows of SHORT tokens. Rows begin
    at each of `offsets` in the text, which is taken as a ring.
    """
    model.eval()
    count = len(ids) // length
    assert count, f"{len(ids)} tokens are held out, a row has {length}"
    ring = torch.cat([ids, ids[: length + 1]]).long()
    short = {name: short_losses(one, ring[: len(ids) + 1]) for name, one in (("short", model), ("bundled", bundled))}
    sums = {(low, name): 0.0 for low, _ in RANGES for name in ("long", *short)}
    numbers = dict.fromkeys((low for low, _ in RANGES), 0)
    for start in (row * length + offset for offset in offsets for row in range(count)):
        start %= len(ids)
        found = losses(model, ring[None, start : start + length + 1])[0]
        there = torch.arange(start, start + length, device=ids.device) % len(ids)
        for low, high in RANGES:
            where = slice(low, min(high, length))
            sums[low, "long"] += float(found[where].double().sum())
            for name, of_each in short.items():
                sums[low, name] += float(of_each[there[where]].double().sum())
            numbers[low] += len(found[where])
    return [
        {"from": low, "to": min(high, length), "tokens": numbers[low]}
        | {name: round(math.exp(sums[low, name] / numbers[low]), 3) for name in ("long", *short)}
        for low, high in RANGES
        if numbers[low]
    ]


def short_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of each token but the first, in rows of SHORT."""
    found = []
    for start in range(0, len(ids) - 1, SHORT):
        found.append(losses(model, ids[None, start : start + SHORT + 1])[0])
    return torch.cat(found)


def main() -> None:
    """Write the texts, or train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-texts", type=Path, metavar="FILE")
    parser.add_argument("--packages", type=Path, help="a folder of .deb files; missing ones are downloaded into it")
    parser.add_argument("--texts", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="of training")
    parser.add_argument("--steps", help="exact numbers of steps of each length, whatever time they take")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--most-tokens", type=int, default=LONG, help="rows are no longer: to try the script")
    options = parser.parse_args()
    if options.write_texts:
        write_texts(options.write_texts, options.packages)
        return
    if not (options.texts and options.out):
        parser.error("--write-texts FILE, or --texts FILE and --out FOLDER")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = Texts.load(options.texts, device)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (options.out / "training_log.jsonl").open("w") as file:

        def log(**record: Any) -> None:
            line = json.dumps({"seconds": round(time.monotonic() - began, 1), **record})
            print(line, flush=True)
            file.write(line + "\n")

        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        log(event="start", device=name, torch=torch.__version__, batch_tokens=options.batch_tokens)
        model = stretched_model(device)
        val = texts.val[: options.most_tokens + 1].long()[None]
        for stage, step, loss in train(model, texts, options, log):
            model.eval()
            with torch.no_grad():
                of_val = losses(model, val)[0].mean().item()
            model.train()
            log(event="training", stage=stage, step=step, loss=round(loss, 4), validation_loss=round(of_val, 4))
        save_checkpoint(model, BUNDLED, options.out)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
        heldout = tokenizer.decode(texts.test.tolist(), skip_special_tokens=False)
        (options.out / "heldout.txt").write_text(heldout)
        saved, bundled = causal_model(options.out, device), causal_model(BUNDLED, device)
        length = min(LONG, options.most_tokens)
        offsets = [length * quarter // 4 for quarter in range(4)]
        for row in perplexities(saved, bundled, texts.test, length, offsets):
            log(event="heldout", **row)


if __name__ == "__main__":
    main()
