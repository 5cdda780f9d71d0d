"""What the GPU peers share: the command line, the GPU budget, the timing of a sweep, and the rows, as they come.

A peer is a `Peer`: it loads the checkpoint once and puts as many bytes of weights onto the GPU as it is told. `run`
says how many: the budget minus the CUDA context, the key-value cache, activations and what is in flight, and one layer
less, up to five times, as long as the case runs out of memory. The budget is a limit of torch's allocator and is
checked: the most that was reserved, plus everything else that the driver counts, which needs a GPU without other users.

    decode    seconds of the decode steps behind the first one, from token to token
    prompt    seconds of one forward pass over `--prompt-tokens-total` tokens until the next token is known; the first
              pass is not counted

From disk, the checkpoint is dropped from the page cache before every sweep; that is not part of its seconds.

Each row is printed when it is there, and all of them again at the end as `table.py` makes them; `--out` has the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from table import line, table

RUNTIME_BYTES = 256 << 20
"""Of the GPU budget, what torch keeps for cuBLAS and loses to fragments."""
LATE_CONTEXT_BYTES = 96 << 20
"""By which the CUDA context may still grow when further kernels are loaded."""
CACHED_LAYERS = 3
"""Whose keys and values transformers' offloaded cache has on the GPU; it is used where the whole does not fit."""
PROMPT_REPEATS = 2
PLACEMENTS = 6


@dataclass(frozen=True)
class Options:
    """The command line; sizes in bytes."""

    checkpoint: Path
    gpu_memory: int
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    prompt_tokens_total: int
    prompt_length: int
    from_disk: bool
    device: str
    out: Path
    extra: argparse.Namespace


@dataclass(frozen=True)
class Case:
    """One row: `batch` prompts of `length` random tokens, and so many `new_tokens` behind each."""

    kind: str
    batch: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama or an OPT, and the bytes of its bf16 weights."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_width: int
    layer_bytes: int
    outside_bytes: int
    largest_matrix_bytes: int

    @classmethod
    def of(cls, checkpoint: Path) -> Shape:
        """Read from config.json."""
        config = json.loads((checkpoint / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        intermediate = config.get("intermediate_size") or config["ffn_dim"]
        kv_width = config.get("num_key_value_heads", heads) * (config.get("head_dim") or hidden // heads)
        opt = config["model_type"] == "opt"
        layer = 2 * hidden * (hidden + kv_width) + (2 if opt else 3) * hidden * intermediate
        ends = config["vocab_size"] * hidden
        tied = config.get("tie_word_embeddings", opt)
        return cls(
            layers=config["num_hidden_layers"], hidden=hidden, intermediate=intermediate,
            vocabulary=config["vocab_size"], kv_width=kv_width, layer_bytes=2 * layer,
            outside_bytes=2 * ends * (1 if tied else 2), largest_matrix_bytes=2 * ends,
        )  # fmt: skip

    def kv_bytes(self, case: Case) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * 2 * self.kv_width * case.batch * (case.length + case.new_tokens)

    def activation_bytes(self, case: Case) -> int:
        """A generous guess at what a sweep needs beside weights and key-value cache."""
        tokens = case.batch * case.length
        return 2 * tokens * (3 * self.intermediate + 8 * self.hidden) + 10 * case.batch * self.vocabulary


@dataclass(frozen=True)
class Plan:
    """What a case gets of the GPU: bytes of weights that stay, and where its key-value cache goes."""

    resident_bytes: int
    offload_cache: bool

    def smaller(self, shape: Shape) -> Plan:
        """What to try when this one ran out of memory: one layer less, and without layers an offloaded cache."""
        if self.resident_bytes > shape.outside_bytes or self.offload_cache:
            return replace(self, resident_bytes=max(0, self.resident_bytes - shape.layer_bytes))
        return replace(self, offload_cache=True)


class Peer(Protocol):
    """One contestant, loaded."""

    model: Any
    """With `generate`, as transformers has it."""
    in_flight_bytes: int
    """Of weights, on the GPU at once beside those that stay."""

    def place(self, resident_bytes: int) -> str:
        """Keep at most so many bytes of weights on the GPU and say what stays where."""
        ...


class Rows:
    """The file of results, written anew with every row, so that a run that is cut off loses nothing."""

    def __init__(self, options: Options, peer: str, packages: tuple[str, ...]) -> None:
        self._file = options.out
        versions = {name: _version(name) for name in packages}
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        self._report: dict[str, Any] = {
            "peer": peer, "versions": versions, "device": device, "checkpoint": str(options.checkpoint),
            "gpu_memory": options.gpu_memory, "from": "disk" if options.from_disk else "ram", "rows": [],
        }  # fmt: skip
        print(table(self._report), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and print it."""
        self._report["rows"].append(row)
        partial = self._file.with_name(f"{self._file.name}.partial")
        partial.write_text(json.dumps(self._report, indent=1))
        partial.replace(self._file)
        print(line(self._report, row), flush=True)

    def show(self) -> None:
        """Print all of them: between them are what the peer said and why rows failed."""
        print(f"\n{table(self._report)}\nwritten to {self._file}", flush=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# --- the command line -------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every peer has; a peer may add its own before `parse`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Llama or OPT, safetensors, bf16")
    parser.add_argument("--gpu-memory", type=int, required=True, help="bytes, the CUDA context among them")
    parser.add_argument("--batch", default="1,4,32", help="batches whose decode is measured; empty for none")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt before the decode")
    parser.add_argument("--tokens", type=int, default=3, help="decode steps that count")
    parser.add_argument("--prompt-tokens-total", type=int, default=16384, help="of the long prompt; 0 for none")
    parser.add_argument("--prompt-length", type=int, default=2048, help="tokens of each of its sequences")
    parser.add_argument("--from", dest="source", choices=("ram", "disk"), default="ram")
    parser.add_argument("--resident", type=int, help="bytes of weights to begin with on the GPU; default: what is left")
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every row")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser) -> Options:
    """The command line, read."""
    given = parser.parse_args()
    return Options(
        given.checkpoint.resolve(), given.gpu_memory, tuple(int(batch) for batch in given.batch.split(",") if batch),
        given.prompt, given.tokens, given.prompt_tokens_total, given.prompt_length, given.source == "disk",
        given.device, given.out.resolve(), given,
    )  # fmt: skip


def cases(options: Options) -> list[Case]:
    """Decode at every batch, then the compute-bound prompt."""
    found = [Case("decode", batch, options.prompt, options.tokens + 2) for batch in options.batches]
    if options.prompt_tokens_total:
        length = min(options.prompt_length, options.prompt_tokens_total)
        found.append(Case("prompt", options.prompt_tokens_total // length, length, 1))
    return found


# --- the GPU ----------------------------------------------------------------------------------------------------------


def limit_gpu(options: Options) -> int:
    """Hold torch's allocator to the budget minus the CUDA context; returns the bytes that leaves."""
    if options.device == "cpu":
        return options.gpu_memory
    square = torch.ones(2048, 2048, dtype=torch.bfloat16, device="cuda")
    heads = (square @ square).view(1, 16, -1, 64)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    del square, heads
    _collect()
    allowed = options.gpu_memory - _context_bytes() - LATE_CONTEXT_BYTES
    if allowed <= 0:
        raise SystemExit(f"--gpu-memory {options.gpu_memory} is less than the CUDA context takes")
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    return allowed


def _context_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _memory(options: Options) -> dict[str, Any]:
    if options.device == "cpu":
        return {}
    reserved, context = torch.cuda.max_memory_reserved(), _context_bytes()
    return {
        "gpu_max_reserved_bytes": reserved, "gpu_context_bytes": context,
        "within_budget": reserved + context <= options.gpu_memory,
    }  # fmt: skip


# --- the measurement --------------------------------------------------------------------------------------------------


class _Clock:
    """A streamer of `model.generate`: the seconds of every sweep, the prompt's first; tokens of the first sequence."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self.seconds: list[float] = []
        self.token_ids: list[int] = []
        self._begin: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Told of the prompt before the first sweep, then of a token for every sequence, already on the CPU."""
        if self._begin is not None:
            self.seconds.append(time.perf_counter() - self._begin)
            self.token_ids.append(int(value.flatten()[0]))
        _drop_from_page_cache(self._files)
        self._begin = time.perf_counter()

    def end(self) -> None:
        """The last token was there."""


def _drop_from_page_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sweeps(options: Options, peer: Peer, shape: Shape, case: Case, plan: Plan) -> _Clock:
    generator = torch.Generator().manual_seed(case.batch)
    ids = torch.randint(3, shape.vocabulary, (case.batch, case.length), generator=generator).to(options.device)
    clock = _Clock(sorted(options.checkpoint.glob("*.safetensors")) if options.from_disk else [])
    with torch.inference_mode():
        peer.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0,
            min_new_tokens=case.new_tokens, max_new_tokens=case.new_tokens, streamer=clock,
            **_cache(plan),
        )  # fmt: skip
    return clock


def _cache(plan: Plan) -> dict[str, Any]:
    return {"cache_implementation": "offloaded"} if plan.offload_cache else {}


def _measure(options: Options, peer: Peer, shape: Shape, case: Case, plan: Plan) -> dict[str, Any]:
    if case.kind == "decode":
        clock = _sweeps(options, peer, shape, case, plan)
        prompt, first, *counted = clock.seconds
        seconds = {"seconds": statistics.median(counted), "first_step_s": first, "prompt_s": prompt}
    else:
        clocks = [_sweeps(options, peer, shape, case, plan) for _ in range(1 + PROMPT_REPEATS)]
        clock = clocks[0]
        first, *counted = (one.seconds[0] for one in clocks)
        seconds = {"seconds": statistics.median(counted), "first_step_s": first}
    cache = "offloaded" if plan.offload_cache else "on the GPU"
    return seconds | {"all_seconds": counted, "token_ids": clock.token_ids, "kv_cache": cache}


def _plan(options: Options, peer: Peer, shape: Shape, group: list[Case], allowed: int) -> Plan:
    """What the group's neediest case leaves for weights that stay on the GPU."""
    if options.extra.resident is not None:
        return Plan(options.extra.resident, offload_cache=False)
    kv_bytes = max(shape.kv_bytes(case) for case in group)
    left = allowed - max(shape.activation_bytes(case) for case in group) - peer.in_flight_bytes - RUNTIME_BYTES
    if left - kv_bytes >= shape.outside_bytes or options.device == "cpu":
        return Plan(max(0, left - kv_bytes), offload_cache=False)
    return Plan(max(0, left - CACHED_LAYERS * kv_bytes // shape.layers), offload_cache=True)


def run(options: Options, rows: Rows, make_peer: Callable[[], Peer], *, groups: list[list[Case]], allowed: int) -> None:
    """Measure every group of cases with a placement of its own; a case that fails becomes a row with the reason. At the
    end all rows are printed.
    """
    try:
        _run(options, rows, make_peer, groups, allowed)
    finally:
        rows.show()


def _run(options: Options, rows: Rows, make_peer: Callable[[], Peer], groups: list[list[Case]], allowed: int) -> None:
    try:
        peer = make_peer()
        shape = Shape.of(options.checkpoint)
    except Exception as error:
        _fail(rows, [case for group in groups for case in group], error)
        return
    for group in groups:
        plan = _plan(options, peer, shape, group, allowed)
        left = list(group)
        for attempt in range(PLACEMENTS):
            try:
                _measure_group(options, peer, shape, left, rows, plan)
                break
            except Exception as error:
                smaller = plan.smaller(shape)
                if not isinstance(error, torch.OutOfMemoryError) or smaller == plan or attempt + 1 == PLACEMENTS:
                    _fail(rows, left, error)
                    break
                plan = smaller
                print(f"out of GPU memory, now {plan}: {error}", flush=True)


def _measure_group(options: Options, peer: Peer, shape: Shape, left: list[Case], rows: Rows, plan: Plan) -> None:
    """Place the weights and measure the cases that are `left`, taking each away when it has its row."""
    _collect()
    begin = time.perf_counter()
    placement = {"placement": peer.place(plan.resident_bytes), "placed_s": time.perf_counter() - begin}
    while left:
        _collect()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        figures = _measure(options, peer, shape, left[0], plan)
        rows.add({**asdict(left[0]), **figures, **placement, **_memory(options)})
        left.pop(0)


def _fail(rows: Rows, left: list[Case], error: Exception) -> None:
    traceback.print_exception(error)
    for case in left:
        rows.add({**asdict(case), "failed": f"{type(error).__name__}: {error}"})
