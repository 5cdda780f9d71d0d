"""Decoder layers as lists of machine code: which are taken, and that they compute what the modules do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from architectures import BASE, VOCAB_SIZE, Architecture
from harness import PackedModel, Pipeline, pack_checkpoint, random_prompts

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.support import LAYOUT, floats_obstacle, obstacle
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.compiled_layers import CompiledLayers
from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.cpu_linear import CpuProducts, always
from pipo_ray.model.kernel_profile import Kernel, KernelProfile
from pipo_ray.model.low_bit import LowBitProducts, always_low_bit, compiled_low_bit, float_low_bit
from pipo_ray.quant.policy import Precision, Rule

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))

WIDE: dict[str, Any] = {
    **BASE, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_hidden_layers": 3,
}  # fmt: skip
TAKEN = (
    Architecture("llama", "", "llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    Architecture("mistral", "", "mistral", {**WIDE, "sliding_window": 8}),
    Architecture("qwen2", "", "qwen2", WIDE),
    Architecture("qwen3", "", "qwen3", WIDE),
)
OTHERS = (
    Architecture("granite", "", "granite", {**WIDE, "residual_multiplier": 0.5}),  # the comparison finds out
    Architecture("gemma", "", "gemma", WIDE),  # GELU
    Architecture("olmo2", "", "olmo2", WIDE),  # norms elsewhere
)


INT4, BF16 = Precision.parse("int4-g32"), Precision.parse("16bit")


@dataclass(frozen=True)
class Own:
    """Our kernels for one instruction set. What lies between products is for this machine's in either case."""

    layout: str
    int4: Kernel
    int8: Kernel
    half: Kernel

    def low_bit(self) -> LowBitProducts:
        costs = {"int4": always_low_bit(self.int4).costs["int4"], "int8": always_low_bit(self.int8).costs["int8"]}
        own = {"compiled": compiled_low_bit()} if self.layout == LAYOUT else {"floats": float_low_bit()}
        return LowBitProducts(KernelProfile("bfloat16", torch.get_num_threads(), costs), self.layout, **own)

    def products(self, kernel: Kernel) -> CpuProducts:
        return CpuProducts(always(kernel), bf16(self.layout))


@cache
def bf16(layout: str) -> OwnKernels:
    """Compiled once for all tests."""
    return OwnKernels(CompiledBf16()) if layout == LAYOUT else OwnKernels(floats=CompiledFloats(torch.bfloat16))


@pytest.fixture(scope="module", params=[
    pytest.param(Own(LAYOUT, "compiled", "compiled", "compiled"), id=LAYOUT,
                 marks=pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))),
    pytest.param(Own("avx2", "words", "dots", "dots"), id="avx2"),
])  # fmt: skip
def own(request: pytest.FixtureRequest) -> Own:
    made: Own = request.param
    return made


@pytest.fixture(scope="module")
def pack(own: Own, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PackedModel]:
    """pack(architecture, precision): packed once each, and read only."""
    made: dict[tuple[str, Precision], PackedModel] = {}

    def make(architecture: Architecture, precision: Precision = INT4) -> PackedModel:
        key = architecture.slug, precision
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture.slug)
            checkpoint = architecture.save(folder / "checkpoint", dtype="bfloat16")
            made[key] = pack_checkpoint(
                checkpoint, folder / "store", torch.bfloat16, precision, panel_bytes=4096, layout=own.layout
            )
        return made[key]

    return make


@pytest.fixture
def pipeline(own: Own) -> Callable[..., Pipeline]:
    """pipeline(packed, kernel): all weights stay; those of 16 bits are multiplied by that kernel, ours without it."""

    def make(packed: PackedModel, kernel: Kernel | None = None) -> Pipeline:
        return Pipeline(
            packed, resident_pieces=None, products=own.products(kernel or own.half), low_bit=own.low_bit(),
            attention=CompiledAttention(), compile_layers=True, chunk=None,
        )  # fmt: skip

    return make


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layers_of(opened: Pipeline) -> CompiledLayers:
    layers = opened.runner._layers
    assert layers is not None
    return layers


def in_use(opened: Pipeline) -> int:
    """How many layers compute by machine code."""
    return sum(layer.rule is not None for layer in layers_of(opened)._layers)


def logits(opened: Pipeline, tokens: list[int], prompt: int, modules: bool = False) -> torch.Tensor:
    """Of every token behind the prompt, one sweep each."""
    rows = []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, len(tokens)))]:
        if modules:
            layers_of(opened).begin = lambda *_: None  # type: ignore[method-assign]
            layers_of(opened)._cache = None
        (output,) = opened.runner.run([SweepEntry("a", tuple(tokens[start:stop]), start, len(tokens), "last")])
        assert output is not None
        rows.append(output[-1].float())
    opened.runner.drop(["a"])
    return torch.stack(rows)


# One thread is fast for one model alone: what it changes is in the products, which are the same for all.
@pytest.mark.parametrize("precision", [INT4, BF16], ids=["int4", "bf16"])
@pytest.mark.parametrize(("threads", "architecture"), [
    pytest.param(threads, one, id=f"{threads}-{one.slug}", marks=pytest.mark.slow if threads == 1 and number else [])
    for threads in (1, 2) for number, one in enumerate(TAKEN)
], indirect=["threads"])  # fmt: skip
def test_a_layer_is_one_call_and_computes_the_same(
    architecture: Architecture,
    precision: Precision,
    threads: int,
    pack: Callable[..., PackedModel],
    pipeline: Callable[..., Pipeline],
) -> None:
    packed = pack(architecture, precision)
    (tokens,) = random_prompts(VOCAB_SIZE, (60,))
    with pipeline(packed) as opened:
        got = logits(opened, tokens, 20)
        assert in_use(opened) == 3
        calls = []
        for layer in layers_of(opened)._layers:
            compute = layer.compute
            layer.compute = lambda *given, compute=compute: calls.append(1) or compute(*given)  # type: ignore[method-assign]
        assert torch.equal(logits(opened, tokens, 20), got)  # the first time, layers were compared
        assert len(calls) == 3 * 40
        expected = logits(opened, tokens, 20, modules=True)
    assert float((got - expected).norm() / expected.norm()) < 0.01


def test_several_tokens_or_sequences_and_a_prefix_of_another_are_the_modules(
    pack: Callable[..., PackedModel], pipeline: Callable[..., Pipeline]
) -> None:
    packed = pack(TAKEN[0])
    one, other = random_prompts(VOCAB_SIZE, (30, 20))
    with pipeline(packed) as opened:
        alone = opened.greedy([one], 5)
        assert in_use(opened) == 3
        for layer in layers_of(opened)._layers:
            layer.compute = lambda *_: pytest.fail("not for these")  # type: ignore[method-assign]
        both = opened.greedy([one, other], 5)
        assert both[0] == alone[0]


@pytest.mark.parametrize("architecture", OTHERS, ids=lambda one: one.slug)
def test_a_layer_that_computes_something_else_stays_as_it_is(
    architecture: Architecture,
    pack: Callable[..., PackedModel],
    pipeline: Callable[..., Pipeline],
) -> None:
    packed = pack(architecture)
    (tokens,) = random_prompts(VOCAB_SIZE, (12,))
    with pipeline(packed) as opened:
        got = logits(opened, tokens, 8)
        assert in_use(opened) == 0
        assert torch.equal(got, logits(opened, tokens, 8, modules=True))


@pytest.mark.parametrize(("kernel", "taken"), [(None, 3), ("native", 2)])
def test_a_matrix_for_another_kernel_leaves_its_layer_to_the_modules(
    kernel: Kernel | None,
    taken: int,
    pack: Callable[..., PackedModel],
    pipeline: Callable[..., Pipeline],
) -> None:
    policy = Precision((Rule("*.layers.1.mlp.up_proj.*", "16bit"), Rule("*", "int4-g32")))
    packed = pack(TAKEN[1], policy)
    (tokens,) = random_prompts(VOCAB_SIZE, (12,))
    with pipeline(packed, kernel) as opened:
        logits(opened, tokens, 8)
        assert in_use(opened) == taken


@pytest.mark.parametrize(
    "policy",
    [
        (Rule("*", "int8"),),
        (Rule("*.[qk]_proj.*", "int8"), Rule("*", "int4-g32")),
        (Rule("*.[qk]_proj.*", "int8"), Rule("*.v_proj.*", "16bit"), Rule("*", "int4-g32")),
        (Rule("*.q_proj.*", "int4-g32"), Rule("*.gate_proj.*", "int4-g32-sym"), Rule("*", "int4")),
    ],
)
def test_matrices_in_int8_and_all_widths_in_one_layer(
    policy: tuple[Rule, ...],
    pack: Callable[..., PackedModel],
    pipeline: Callable[..., Pipeline],
) -> None:
    packed = pack(TAKEN[3], Precision(policy))
    (tokens,) = random_prompts(VOCAB_SIZE, (20,))
    with pipeline(packed) as opened:
        logits(opened, tokens, 8)  # compared
        assert in_use(opened) == 3
        got = logits(opened, tokens, 8)
        expected = logits(opened, tokens, 8, modules=True)
    assert float((got - expected).norm() / expected.norm()) < 0.01


def test_weights_that_go_and_come_again_are_looked_for_anew(
    pack: Callable[..., PackedModel], pipeline: Callable[..., Pipeline]
) -> None:
    packed = pack(TAKEN[0])
    (tokens,) = random_prompts(VOCAB_SIZE, (12,))
    with pipeline(packed) as opened:
        before = logits(opened, tokens, 8)
        opened.binder.abandon()
        assert in_use(opened) == 0
        assert torch.equal(logits(opened, tokens, 8), before)
        assert in_use(opened) == 3


def test_where_weights_stream_nothing_is_compiled(own: Own, pack: Callable[..., PackedModel]) -> None:
    packed = pack(TAKEN[0])
    (tokens,) = random_prompts(VOCAB_SIZE, (12,))
    with Pipeline(packed, low_bit=own.low_bit(), attention=CompiledAttention(), compile_layers=True) as opened:
        logits(opened, tokens, 8)
        assert not layers_of(opened)._layers
