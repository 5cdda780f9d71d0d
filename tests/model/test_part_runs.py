"""Parts of matrices that machine code takes by itself: the same bits, the same books, the same errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import harness
import pytest
import torch
from architectures import BY_SLUG, VOCAB_SIZE
from emulated_tiles import matrix_unit
from harness import PackedModel, Pipeline, pack_checkpoint, random_prompts

from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.part_run import PartRun
from pipo_ray.compiled.support import floats_obstacle, obstacle
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.cpu_linear import CpuProducts, always
from pipo_ray.model.kernel_profile import Kernel
from pipo_ray.pipeline.loader import Loader
from pipo_ray.pipeline.slots import PieceUnreadableError, SlotTable
from pipo_ray.pipeline.weight_stream import HostStream

REASONS: dict[Kernel, str | None] = {
    "compiled": obstacle(), "amx": floats_obstacle(), "dots": floats_obstacle(), "outer": floats_obstacle(),
}  # fmt: skip
OF_ANY_ROWS = ("amx", "outer")


@cache
def products(kernel: Kernel) -> CpuProducts:
    if kernel in ("dots", "outer"):
        own = OwnKernels(floats=CompiledFloats(torch.bfloat16))
    elif kernel == "amx":
        with matrix_unit():
            own = OwnKernels(amx=CompiledAmx())
    else:
        own = OwnKernels.of(torch.bfloat16)
    return CpuProducts(always(kernel), own)


@pytest.fixture(params=REASONS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    kernel: Kernel = request.param
    if REASONS[kernel] is not None:
        pytest.skip(str(REASONS[kernel]))
    return kernel


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A Llama with biases whose matrices are cut by rows in the smallest slots."""
    folder = tmp_path_factory.mktemp("llama")
    BY_SLUG["llama"].save(folder / "checkpoint", dtype="bfloat16")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.bfloat16)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions that machine code has taken."""
    positions: list[int] = []
    original = HostStream.passed

    def passed(self: HostStream, start: int, stop: int, waited_s: float) -> None:
        positions.extend(range(start, stop))
        original(self, start, stop, waited_s)

    monkeypatch.setattr(HostStream, "passed", passed)
    return positions


def split_positions(pipeline: Pipeline) -> list[int]:
    plan = pipeline.plan
    return [n for n, piece in enumerate(plan.order) if not plan.pieces[piece].tensors[0].whole]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_logits_and_books_are_those_of_one_part_after_the_other(
    packed: PackedModel, kernel: Kernel, taken: list[int], threads: None
) -> None:
    (prompt,) = random_prompts(VOCAB_SIZE, (12,))
    logits, times = [], []
    for native in (True, False):
        with Pipeline(packed, resident_pieces=9, products=products(kernel), chunk=7) as pipeline:
            split = split_positions(pipeline)
            assert len({piece.tensors[0].name for piece in pipeline.pieces if not piece.tensors[0].whole}) > 3
            assert any(pipeline.plan.order[position] in pipeline.resident_rows for position in split)
            assert any(pipeline.plan.order[position] not in pipeline.resident_rows for position in split)
            if not native:
                pipeline.binder._part_runs = None
            logits.append(pipeline.follow([prompt], [10])[0].logits)  # sweeps of 7, 3, 1 and 1 tokens
            times.append(pipeline.stream.times)
            assert taken == (split * (4 if kernel in OF_ANY_ROWS else 2) if native else [])
            taken.clear()
    assert torch.equal(*logits)
    assert (times[0].acquired, times[0].streamed_bytes) == (times[1].acquired, times[1].streamed_bytes)


def _decode(pipeline: Pipeline, lengths: Sequence[int]) -> None:
    for length in lengths:
        pipeline.runner.run([SweepEntry("a", (5,), length, 20)])


def test_a_part_that_cannot_be_read_ends_the_sweep_and_the_next_one_works(
    packed: PackedModel, kernel: Kernel, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = random_prompts(VOCAB_SIZE, (9,))
    original = SlotTable.finish_fill
    # Machine code would not call what takes the place of a method here.
    monkeypatch.setattr(harness, "make_loader", lambda *what, folder, **options: Loader(*what, **options))
    with Pipeline(packed, resident_pieces=2, products=products(kernel), chunk=None) as pipeline:
        wanted = pipeline.greedy([prompt], 2)
        loads, split = pipeline.loads(), split_positions(pipeline)
        streamed = [position for position in range(len(pipeline.plan.order)) if not loads.is_resident(position)]
        parts = [load for load, position in enumerate(streamed) if position in split]
        broken = parts[len(parts) // 2 :][:1]

        def finish_fill(self: SlotTable, slot: int, load: int, *, failed: bool = False) -> None:
            original(self, slot, load, failed=failed or load % len(streamed) in broken)

        pipeline.runner.run([SweepEntry("a", tuple(prompt), 0, 20)])
        monkeypatch.setattr(SlotTable, "finish_fill", finish_fill)
        taken.clear()
        with pytest.raises(PieceUnreadableError):
            _decode(pipeline, (9, 10))  # what the first of them uses may have been read before
        assert taken[-1] < streamed[broken.pop()] == taken[-1] + 1
        assert pipeline.greedy([prompt], 2) == wanted


def test_sequences_that_walk_alone_share_each_part(packed: PackedModel, kernel: Kernel, taken: list[int]) -> None:
    prompts = random_prompts(VOCAB_SIZE, (3, 5))
    with Pipeline(packed, products=products(kernel)) as pipeline:
        wanted = [pipeline.greedy([prompt], 2)[0] for prompt in prompts]
        assert taken
        taken.clear()
        pipeline.runner._ragged = False
        assert pipeline.greedy(prompts, 2) == wanted
        assert not taken


def test_a_traced_stream_tells_of_every_part(
    packed: PackedModel, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HostStream.__init__

    def traced(self: HostStream, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_traced = True

    monkeypatch.setattr(HostStream, "__init__", traced)
    monkeypatch.setattr(PartRun, "run", lambda self: pytest.fail("taken by machine code"))
    with Pipeline(packed, products=products(kernel)) as pipeline:
        pipeline.greedy(random_prompts(VOCAB_SIZE, (3,)), 2)


def test_where_no_kernel_is_compiled_nothing_is(packed: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuProducts, "part_runner", property(lambda self: pytest.fail("compiled")))
    with Pipeline(packed, products=CpuProducts(always("wide"))) as pipeline:
        assert pipeline.binder._part_runs is not None
        pipeline.greedy(random_prompts(VOCAB_SIZE, (3,)), 2)
