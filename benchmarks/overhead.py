"""What Ray and separate processes cost: the same sweep in one process with threads and no Ray, against the four actors.

How to run (two minutes; --quick: half a minute, with the bundled model alone):

    python benchmarks/overhead.py [--size 2GiB] [--resident 0.25] [--rounds 5] [--sweeps 5] [--quick] [--json FILE]

A random Llama of --size is packed into a temporary folder. Both sides get the same sweep plan, the same slots and the
same resident pieces, and the same number of threads: what `plan_run` chose for the actors is handed to the other side,
which consists of the loader's threads, the binder and the model, and nothing else. Rounds of greedy decoding take
turns; the loader of the side that has no turn has filled its slots and waits. The time of a sweep is taken where a user
sees it: between tokens. Tokens must be equal. Goal: at most 3 % of a sweep that takes a second.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from random_llama import LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.binding import Binder
from pipo_ray.model.compiled_layers import compile_model
from pipo_ray.model.cpu_linear import HALF_DTYPES, CpuProducts
from pipo_ray.model.graph import DTYPES, build_graph, load_config
from pipo_ray.model.inspect import trace_of
from pipo_ray.model.kept_profiles import ProfilePlaces
from pipo_ray.model.layout import TORCH_DTYPES
from pipo_ray.model.runner import ModelRunner
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.compiled_loader import make_loader
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.order import LoadOrder
from pipo_ray.pipeline.slots import U8, SlotTable
from pipo_ray.pipeline.weight_stream import HostStream
from pipo_ray.plan.budget import RunPlan
from pipo_ray.prepare import code_folder, prepare_store, profile_folder
from pipo_ray.session.huge_pages import scratch_memory
from pipo_ray.session.memory import format_size, parse_size
from pipo_ray.store.rows import RowReader

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
CPU = torch.device("cpu")
PROMPT = [3, 5, 8, 13, 21, 34]


def touched(num_bytes: int) -> U8:
    """Page-aligned memory with every page in place."""
    memory = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)
    memory[::4096] = 0
    return memory


class LocalPipeline:
    """Loader threads and model of `plan` over the block store in `folder`, in this process. A context manager."""

    def __init__(self, folder: Path, plan: RunPlan, threads: int, kernels: ProfilePlaces) -> None:
        torch.set_num_threads(threads)
        prepared = prepare_store(str(folder))
        manifest, facts = prepared.manifest, prepared.facts
        placement, sweep = plan.placement, plan.sweep
        rows = {piece: row for row, piece in enumerate(sorted(placement.residents))}
        self._table = SlotTable(
            touched(SlotTable.nbytes(placement.num_slots, len(rows))), placement.num_slots, len(rows)
        )
        slots = [scratch_memory(placement.slot_bytes) for _ in range(placement.num_slots)]
        residents = [touched(sweep.pieces[piece].read_bytes) for piece in rows]

        def loads() -> LoadOrder:
            return LoadOrder(sweep.order, sweep.releases, rows, placement.num_slots)

        drive = Drive(folder)
        self._loader = make_loader(
            drive, sweep.pieces, loads(), self._table, slots, residents, threads=plan.transfer.read_threads,
            transfer_bytes=plan.transfer.transfer_bytes,
            checksums=BlockChecksums({b.name: b for b in manifest.blocks}, sweep.pieces, Drive(folder)),
            folder=code_folder(),
        )  # fmt: skip
        self._loader.start()
        self._folder, self._manifest = folder, manifest
        self._readers: dict[str, RowReader] = {}
        stream = HostStream(
            sweep, loads(), self._table, [torch.from_numpy(slot) for slot in slots],
            [torch.from_numpy(piece) for piece in residents],
        )  # fmt: skip
        dtype = DTYPES[manifest.precision]
        graph = build_graph(load_config(folder), dtype, attention=facts.attention, device=CPU)
        products = CpuProducts.for_run(dtype, kernels, code_folder()) if dtype in HALF_DTYPES else None
        attention = layers = None
        if products is not None and products.compiles:  # as the compute worker has it
            attention = CompiledAttention(code_folder())
            layers = compile_model(graph, products, None, attention, code_folder())
        binder = Binder(
            graph, trace_of(facts), sweep, manifest.aliases, stream, self._read_rows, products, layers=layers
        )  # fmt: skip
        self._runner = ModelRunner(graph, binder, CPU, ragged=facts.ragged, attention=attention, layers=layers)

    def decode(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """`num_tokens` greedy tokens behind `prompt`, and the mean of the seconds between them, in a list."""
        ids, fed, times = list(prompt), 0, []
        while len(ids) < len(prompt) + num_tokens:
            entry = SweepEntry("one", tuple(ids[fed:]), fed, len(prompt) + num_tokens, "last")
            fed = len(ids)
            (logits,) = self._runner.run([entry])
            assert logits is not None
            ids.append(int(logits[-1].argmax()))
            times.append(time.perf_counter())
        self._runner.drop(["one"])
        return ids[len(prompt) :], [(times[-1] - times[0]) / (num_tokens - 1)]

    def _read_rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        reader = self._readers.setdefault(name, RowReader(self._folder, self._manifest, name))
        return torch.from_numpy(reader.read(ids.numpy())).view(TORCH_DTYPES[reader.dtype]).view(len(ids), -1)

    def __enter__(self) -> LocalPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.stop()
        self._loader.stop()
        for reader in self._readers.values():
            reader.close()


def compare(model: Path, weight_memory: int, rounds: int, sweeps: int) -> dict[str, Any]:
    """Seconds per sweep of both sides, by rounds."""
    seconds: dict[str, list[float]] = {"one process": [], "four actors": []}
    params = SamplingParams(temperature=0.0, max_tokens=sweeps + 1, ignore_eos=True)
    with LLM(model, weight_memory=weight_memory, device="cpu", ray_address="local") as llm:
        plan, setup = llm._plan, llm._stage._setup
        threads = len(os.sched_getaffinity(0))
        # The same ones as the actors have chosen.
        kernels = ProfilePlaces(Path(llm._session.path) / "kernels.json", profile_folder())
        with LocalPipeline(Path(setup.store), plan, threads, kernels) as local:
            tokens = {}
            for number in range(rounds + 1):  # the first is a warm-up: residents are loaded, checksums checked
                for side in seconds:
                    ids, took = local.decode(PROMPT, sweeps + 1) if side == "one process" else decode(llm, params)
                    tokens[side] = ids
                    if number:
                        seconds[side].append(statistics.median(took))
    ratios = [b / a for a, b in zip(seconds["one process"], seconds["four actors"], strict=True)]
    return {
        "model": plan.model_bytes,
        "streamed": plan.streamed_bytes_per_sweep,
        "equal tokens": tokens["one process"] == tokens["four actors"],
        "seconds per sweep": seconds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def decode(llm: LLM, params: SamplingParams) -> tuple[list[int], list[float]]:
    """Token ids, and the seconds between them."""
    times, ids = [], []
    for output in llm.stream([PROMPT], params):
        times.append(time.perf_counter())
        ids = list(output.outputs[0].token_ids)
    # Two tokens may arrive in one poll: the mean is what a sweep took.
    return ids, [(times[-1] - times[0]) / (len(ids) - 1)]


def show(name: str, row: dict[str, Any]) -> None:
    """One model's line."""
    ones, fours = (statistics.median(row["seconds per sweep"][side]) for side in ("one process", "four actors"))
    print(
        f"{name:<10}{format_size(row['model']):>10}{format_size(row['streamed']):>12}{1000 * ones:14.1f}"
        f"{1000 * fours:14.1f}{1000 * (fours - ones):10.2f}{100 * (row['ratio'] - 1):8.1f} %"
        f"  ({100 * (min(row['ratios']) - 1):.1f} to {100 * (max(row['ratios']) - 1):.1f})"
        + ("" if row["equal tokens"] else "  TOKENS DIFFER")
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB", help="size of the random model")
    parser.add_argument("--resident", type=float, default=0.25, help="weight memory, as a share of the model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--sweeps", type=int, default=5, help="sweeps in a turn")
    parser.add_argument("--quick", action="store_true", help="only the bundled model")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # as the actors have it; read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    result = {"tiny": compare(BUNDLED, 3 << 20, arguments.rounds, 20)}
    if not arguments.quick:
        folder = Path(tempfile.mkdtemp(prefix="pipo-bench-overhead-"))
        os.environ["PIPO_CACHE"] = str(folder / "cache")
        try:
            shape = LlamaShape(1).of_at_least(parse_size(arguments.size, "--size"))
            make_checkpoint(folder / "model", shape)
            result["random"] = compare(
                folder / "model", int(shape.num_bytes * arguments.resident), arguments.rounds, arguments.sweeps
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{'model':<10}{'size':>10}{'a sweep':>12}{'one proc., ms':>14}{'actors, ms':>14}{'cost, ms':>10}{'cost':>10}"
    )
    for name, row in result.items():
        show(name, row)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0 if all(row["equal tokens"] for row in result.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
