"""Parameters are bound while their module runs, whatever the modules look like, and to the right memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_SLUG, VOCAB_SIZE
from harness import Pipeline, pack_checkpoint, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.batch import SweepEntry, WantedLogits
from pipo_ray.model.binding import Binder
from pipo_ray.model.lanes import Lanes
from pipo_ray.model.runner import OutOfStepError
from pipo_ray.model.trace import Trace, Unit
from pipo_ray.pipeline.weight_stream import StreamTimes
from pipo_ray.plan.pieces import PAGE, Piece, PieceTensor, SweepPlan, plan_sweep

WIDTH = 4


class Tree(nn.Module):
    """Adds its own parameter, calls its children as `script` says, and adds the parameter once more."""

    def __init__(self, script: list[int], children: list[nn.Module]) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.children_ = nn.ModuleList(children)
        self.script = script

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x * self.own)
        for child in self.script:
            x = self.children_[child](x)
        return torch.tanh(x + self.own)


@st.composite
def trees(draw: st.DrawFn, depth: int = 0) -> nn.Module:
    """Random modules; a child may be called several times, or never."""
    if depth == 3 or (depth and draw(st.booleans())):
        return nn.Linear(WIDTH, WIDTH, bias=draw(st.booleans())) if draw(st.booleans()) else Tree([], [])
    children = [draw(trees(depth + 1)) for _ in range(draw(st.integers(0, 3)))]
    script = draw(st.lists(st.integers(0, len(children) - 1), max_size=4)) if children else []
    return Tree(script, children)


class FakeStream:
    """Gives fresh copies of the pieces' bytes, and overwrites them once they are released. Positions come in order."""

    def __init__(self, plan: SweepPlan, memory: dict[int, torch.Tensor]) -> None:
        self.device = torch.device("cpu")
        self.times = StreamTimes()
        self.all_stay = False
        self.plan, self.memory = plan, memory
        self.next = 0
        self.held: dict[int, torch.Tensor] = {}
        self.released: list[int] = []
        self.most = 0

    def begin_sweep(self) -> None:
        self.next, self.released = 0, []

    def acquire(self, position: int) -> torch.Tensor:
        assert position == self.next
        self.next += 1
        self.held[position] = self.memory[self.plan.order[position]].clone()
        self.most = max(self.most, len(self.held))
        return self.held[position]

    def release(self, position: int) -> None:
        self.held.pop(position).fill_(255)  # NaN
        self.released.append(position)

    def end_sweep(self) -> None:
        assert not self.held
        assert self.next == len(self.plan.order)

    def abandon(self) -> None:
        self.held.clear()


class StayingStream(FakeStream):
    """Gives the same memory every time, and leaves it alone."""

    def __init__(self, plan: SweepPlan, memory: dict[int, torch.Tensor]) -> None:
        super().__init__(plan, memory)
        self.all_stay = True

    def acquire(self, position: int) -> torch.Tensor:
        super().acquire(position)
        self.held[position] = self.memory[self.plan.order[position]]
        return self.held[position]

    def release(self, position: int) -> None:
        del self.held[position]

    def end_sweep(self) -> None:
        assert not self.held


def traced(model: nn.Module, inputs: torch.Tensor) -> Trace:
    """As `trace` does it, for any module: which modules with parameters of their own are entered and left."""
    called: list[tuple[str, bool]] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: called.append((name, True))))
        handles.append(module.register_forward_hook(lambda *_, name=name: called.append((name, False))))
    model(inputs)
    for handle in handles:
        handle.remove()
    own = {
        name: tuple(f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False))
        for name, module in model.named_modules()
    }
    names = [name for name in dict.fromkeys(name for name, _ in called) if own[name]]
    units = tuple(
        Unit(name, own[name], "linear" if isinstance(model.get_submodule(name), nn.Linear) else "other")
        for name in names
    )
    return Trace(units, tuple((names.index(name), enters) for name, enters in called if own[name]))


def cut(model: nn.Module, trace: Trace, draw: Callable[..., Any]) -> tuple[list[Piece], dict[int, torch.Tensor]]:
    """Pieces of one to three tensors, in any order; some matrices in row parts."""
    weights = dict(model.named_parameters())
    kinds = {name: unit.kind for unit in trace.units for name in unit.tensors}
    pieces: list[Piece] = []
    memory: dict[int, torch.Tensor] = {}

    def put(parts: list[tuple[str, torch.Tensor, int, int, bool]]) -> None:
        tensors, chunks, offset = [], [], 0
        for name, data, start, stop, whole in parts:
            raw = data.detach().clone().reshape(-1).view(torch.uint8)
            tensors.append(PieceTensor(name, "F32", tuple(data.shape), None, start, stop, offset, len(raw), whole))
            chunks += [raw, torch.zeros(-len(raw) % 64, dtype=torch.uint8)]
            offset += len(raw) + -len(raw) % 64
        index = len(pieces)
        memory[index] = torch.cat(chunks)
        pieces.append(Piece(index, f"b{index}", "layer", "f", 0, PAGE, offset, tuple(tensors)))

    pending: list[str] = []
    names = draw(st.permutations(sorted(kinds)))
    for name in names:
        weight = weights[name]
        if kinds[name] == "linear" and weight.dim() == 2 and draw(st.booleans()):
            put([(name, weight[:3], 0, 3, False)])
            put([(name, weight[3:], 3, WIDTH, False)])
            continue
        pending.append(name)
        if len(pending) == 3 or draw(st.booleans()):
            put([(n, weights[n], 0, WIDTH, True) for n in pending])
            pending = []
    if pending:
        put([(n, weights[n], 0, WIDTH, True) for n in pending])
    return pieces, memory


@settings(max_examples=80)
@given(trees(), st.data(), st.integers(1, 3))
def test_any_module_computes_what_it_computes_whole(model: nn.Module, data: st.DataObject, num_lanes: int) -> None:
    inputs = [torch.randn(2, WIDTH) for _ in range(num_lanes)]
    trace = traced(model, inputs[0])
    expected = [model(x) for x in inputs]
    pieces, memory = cut(model, trace, data.draw)
    plan = plan_sweep(pieces, [unit.tensors for unit in trace.units], trace.events, {})
    stream = FakeStream(plan, memory)
    model.to("meta")
    binder = Binder(model, trace, plan, {}, stream, lambda name, ids: pytest.fail("no table"))
    for _ in range(2):
        binder.begin()
        got = model(inputs[0])
        binder.finish_pass()
        binder.end()
        torch.testing.assert_close(got, expected[0])
        assert tuple(stream.released) == plan.releases
    lanes = Lanes(num_lanes)
    binder.begin(lanes, num_lanes)

    def body(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(x)
        binder.finish_pass()
        return result

    together = lanes.run([lambda x=x: body(x) for x in inputs])
    binder.end()
    for one, other in zip(together, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert stream.most == plan.max_held


class Two(nn.Module):
    """Calls `first` and `second`, or what `order` says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.order = ["first", "second"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def bound(model: nn.Module) -> tuple[Binder, FakeStream]:
    trace = traced(model, torch.zeros(1, WIDTH))
    weights = dict(model.named_parameters())
    pieces, memory = [], {}
    for index, unit in enumerate(trace.units):
        raw = [weights[name].detach().clone().reshape(-1).view(torch.uint8) for name in unit.tensors]
        tensors, offset = [], 0
        for name, part in zip(unit.tensors, raw, strict=True):
            tensors.append(
                PieceTensor(name, "F32", tuple(weights[name].shape), None, 0, WIDTH, offset, len(part), True)
            )
            offset += len(part)
        pieces.append(Piece(index, unit.module, "layer", "f", 0, PAGE, offset, tuple(tensors)))
        memory[index] = torch.cat(raw)
    plan = plan_sweep(pieces, [unit.tensors for unit in trace.units], trace.events, {})
    stream = FakeStream(plan, memory)
    model.to("meta")
    return Binder(model, trace, plan, {}, stream, lambda name, ids: ids), stream


def test_a_call_that_the_model_leaves_out_is_passed_by() -> None:
    model = Two()
    second = nn.Linear(WIDTH, WIDTH)
    second.load_state_dict(model.second.state_dict())
    binder, stream = bound(model)
    for order in (["second"], ["first"], []):
        model.order = order
        binder.begin()
        got = model(torch.ones(1, WIDTH))
        binder.finish_pass()
        binder.end()
        assert stream.released == [0, 1]
        if order == ["second"]:
            torch.testing.assert_close(got, second(torch.ones(1, WIDTH)))


@pytest.mark.parametrize("order", [["second", "first"], ["first", "first"], ["first", "second", "second"]])
def test_another_order_than_the_traced_one_is_refused_and_leaves_nothing_held(order: list[str]) -> None:
    model = Two()
    binder, stream = bound(model)
    model.order = order
    binder.begin()
    with pytest.raises(UnsupportedModelError, match="was called out of the traced order"):
        model(torch.ones(1, WIDTH))
    binder.abandon()
    assert not stream.held
    model.order = ["first", "second"]
    binder.begin()
    model(torch.ones(1, WIDTH))
    binder.finish_pass()
    binder.end()


class ReturnsItsBias(nn.Module):
    """GPT-NeoX-Japanese's attention: the layer around it adds the bias that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return x + 1, [self.bias, self.bias[1:]]


class AddsIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ReturnsItsBias(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, (bias, rest) = self.first(x)
        return self.second(x) + bias + rest.sum()


def test_a_parameter_that_a_module_returns_outlives_its_piece() -> None:
    model = AddsIt()
    wanted = model(torch.ones(1, WIDTH))
    binder, _ = bound(model)
    binder.begin()
    torch.testing.assert_close(model(torch.ones(1, WIDTH)), wanted)
    binder.finish_pass()
    binder.end()


def test_a_parameter_used_outside_its_module_is_refused() -> None:
    model = Two()
    binder, _ = bound(model)
    binder.begin()
    with pytest.raises(UnsupportedModelError, match="a parameter outside the module it was traced in"):
        torch.nn.functional.linear(torch.ones(1, WIDTH), model.first.weight)


# --- the runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["llama", "falcon"])
def test_a_failed_sweep_drops_its_caches_and_the_next_one_works(slug: str, tmp_path: Path) -> None:
    checkpoint = BY_SLUG[slug].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(checkpoint, tmp_path / "store", torch.float32)
    (prompt,) = random_prompts(VOCAB_SIZE, (9,))
    with Pipeline(packed) as pipeline:
        wanted = pipeline.greedy([prompt], 3)
        runner = pipeline.runner
        runner.run([SweepEntry("a", tuple(prompt), 0, 20)])
        assert runner.length("a") == 9
        handle = pipeline.model.get_submodule(pipeline.packed.facts.units[9].module).register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
        )
        with pytest.raises(RuntimeError, match="broken"):
            runner.run([SweepEntry("a", (5,), 9, 20)])
        handle.remove()
        assert runner.length("a") == 0
        with pytest.raises(OutOfStepError, match="a: cache holds 0 tokens, not 9"):
            runner.run([SweepEntry("a", (5,), 9, 20)])
        assert pipeline.greedy([prompt], 3) == wanted


@pytest.mark.parametrize("slug", ["llama", "qwen3-next"])
def test_only_the_wanted_logits_are_made(slug: str, tmp_path: Path) -> None:
    checkpoint = BY_SLUG[slug].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(checkpoint, tmp_path / "store", torch.float32)
    (prompt,) = random_prompts(VOCAB_SIZE, (6,))
    with Pipeline(packed, resident_pieces=1 << 20) as pipeline:
        choices: tuple[WantedLogits, ...] = ("none", "last", "all")
        outputs = pipeline.runner.run([SweepEntry(wanted, tuple(prompt), 0, 6, wanted) for wanted in choices])
        assert outputs[0] is None
        assert outputs[1] is not None
        assert outputs[2] is not None
        assert outputs[1].shape == (1, VOCAB_SIZE)
        assert outputs[2].shape == (6, VOCAB_SIZE)
        torch.testing.assert_close(outputs[1], outputs[2][-1:])
        pipeline.runner.drop(["none", "last", "all"])
        assert pipeline.runner.cache_bytes == 0


@settings(max_examples=40)
@given(trees(), st.data())
def test_what_stays_in_memory_is_bound_once(model: nn.Module, data: st.DataObject) -> None:
    inputs = torch.randn(2, WIDTH)
    trace = traced(model, inputs)
    expected = model(inputs)
    pieces, memory = cut(model, trace, data.draw)
    plan = plan_sweep(pieces, [unit.tensors for unit in trace.units], trace.events, {})
    stream = StayingStream(plan, memory)
    model.to("meta")
    binder = Binder(model, trace, plan, {}, stream, lambda name, ids: pytest.fail("no table"))

    def acquired(lanes: Lanes | None = None) -> int:
        def body() -> torch.Tensor:
            result: torch.Tensor = model(inputs)
            binder.finish_pass()
            return result

        binder.begin(lanes)
        torch.testing.assert_close(body() if lanes is None else lanes.run([body])[0], expected)
        binder.end()
        return stream.next

    once = len(plan.order)
    assert [acquired() for _ in range(3)] == [once, 0, 0]
    binder.begin()
    model(inputs)
    binder.abandon()
    assert [acquired() for _ in range(2)] == [once, 0]
    assert acquired(Lanes(1)) == once
    assert [acquired() for _ in range(2)] == [once, 0]
