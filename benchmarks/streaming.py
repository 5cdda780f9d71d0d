"""What the benchmarks of the weight path share: a random model in a block store, and the time of a sweep over it.

By hand it makes the store that they keep with --folder, once for all of them:

    python benchmarks/streaming.py FOLDER [--size 4GiB]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from random_llama import LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.prepare import pack_store
from pipo_ray.session.memory import parse_size

PROMPT = [3, 5, 8, 13, 21, 34]
WIDE = LlamaShape(1, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=32000)
"""Llama-3-8B's layers."""


@contextlib.contextmanager
def random_store(num_bytes: int, folder: Path | None, precision: str | None = None) -> Iterator[Path]:
    """A block store of a model of at least so many bytes in bf16, packed with `precision` (see `pack_store`); made in
    `folder` and kept there, or in a temporary one.
    """
    base = folder or Path(tempfile.mkdtemp(prefix="pipo-bench-"))
    shape = WIDE.of_at_least(num_bytes)
    os.environ["PIPO_CACHE"] = str(base / "cache")
    store = base / f"llama-{shape.layers}{'' if precision is None else '-' + precision}-store"
    try:
        if not store.exists():
            checkpoint = base / f"llama-{shape.layers}"
            shutil.rmtree(checkpoint, ignore_errors=True)
            make_checkpoint(checkpoint, shape)
            pack_store(checkpoint, store, precision=precision)
            shutil.rmtree(checkpoint)
        yield store
    finally:
        if folder is None:
            shutil.rmtree(base, ignore_errors=True)


def options(description: str | None, *, rounds: int, sweeps: int, quick: str) -> argparse.ArgumentParser:
    """The options that the benchmarks share; `quick` says what --quick leaves out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4GiB", help="of the model")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--sweeps", type=int, default=sweeps, help="in a round")
    parser.add_argument("--folder", type=Path, help="keep the model here")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path)
    return parser


def store_files(store: Path) -> list[Path]:
    """The store's data, largest file first."""
    return sorted(store.glob("*.safetensors"), key=lambda path: -path.stat().st_size)


def sweep_seconds(llm: LLM, sweeps: int, batch: int = 1) -> float:
    """Seconds per sweep of greedy decoding, from the first token to the last."""
    params = SamplingParams(temperature=0.0, max_tokens=sweeps + 1, ignore_eos=True)
    first = last = 0.0
    for output in llm.stream([[*PROMPT[1:], 3 + i] for i in range(batch)], params):
        last = time.perf_counter()
        if len(output.outputs[0].token_ids) == 1:
            first = last
    return (last - first) / sweeps


def prompt_seconds(llm: LLM, sweeps: int, tokens: int) -> float:
    """Seconds per sweep with a whole prompt of so many tokens in it, no two of which begin alike. One sweep more, the
    first, uses up what was read ahead before, and is not counted.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1)
    ends = []
    for _ in range(sweeps + 1):
        llm.generate([[random.randrange(3, 1000) for _ in range(tokens)]], params)
        ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / sweeps


def answer_seconds(llm: LLM, tokens: int, new: int) -> float:
    """Seconds from a prompt of so many tokens, which begins as no other, to the last of `new` tokens: as PIPO's
    throughput is measured.
    """
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate([[random.randrange(3, 1000) for _ in range(tokens)]], params)
    return time.perf_counter() - begin


if __name__ == "__main__":
    by_hand = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_hand.add_argument("folder", type=Path)
    by_hand.add_argument("--size", default="4GiB", help="of the model")
    arguments = by_hand.parse_args()
    with random_store(parse_size(arguments.size), arguments.folder) as made:
        print(made)
