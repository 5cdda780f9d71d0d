"""Products with low-bit weights against float64, by every kernel; a model with such weights against transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import PackedModel, Pipeline, pack_checkpoint, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from low_bit_weights import at_place, rounding_of_inputs, with_strides
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import pipo_ray.model.low_bit as low_bit_module
from pipo_ray.compiled.amx_low_bit_products import CompiledAmxLowBit
from pipo_ray.compiled.float_inputs import PaddedInputs
from pipo_ray.compiled.float_low_bit import FloatLowBit
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.support import amx_obstacle, floats_obstacle
from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.kept_profiles import ProfilePlaces
from pipo_ray.model.kernel_profile import KERNELS, Kernel, KernelProfile
from pipo_ray.model.low_bit import (
    LowBitProducts,
    always_low_bit,
    compiled_low_bit,
    float_low_bit,
    layout_of,
    measure_low_bit,
)
from pipo_ray.model.streamed import SplitMatrix
from pipo_ray.quant.codec import read_rows, views_of, write_rows
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, Panels, divide, machine_layout
from pipo_ray.quant.policy import Precision, Rule
from pipo_ray.quant.rounding import round_to_nearest, values_of

NAMES = ("int4-g32", "int4", "int4-g128", "int4-sym", "int8")
BF16_STEP = 2.0**-8
COMPILED, FLOATS = compiled_low_bit(), float_low_bit()
OWN = {"compiled": COMPILED, "floats": FLOATS}
MISSING: set[Kernel] = (
    (set() if COMPILED else {"compiled", "blocks"})
    | ({"amx"} if amx_obstacle() else set())
    | (set() if FLOATS else {"dots", "outer", "words"})
)

UNUSED: set[Kernel] = {"dots", "outer", "words"} if COMPILED else set()


def packed(weight: torch.Tensor, panels: Panels) -> torch.Tensor:
    """The panels of `weight`, uint8 [num_panels, panel_bytes]."""
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    for index, panel in enumerate(memory):
        start, stop = panels.rows_of(index, index + 1)
        write_rows(views_of(panel, panels), panels, 0, round_to_nearest(weight[start:stop], panels.low_bit))
    return memory


def unpacked(memory: torch.Tensor, panels: Panels) -> torch.Tensor:
    """The float32 weight that panels stand for."""
    rows = [values_of(read_rows(views_of(panel, panels), panels), panels.low_bit) for panel in memory]
    return torch.cat(rows)[: panels.rows]


@settings(max_examples=120)
@given(
    st.sampled_from([(name, kernel) for name in NAMES for kernel in KERNELS[layout_of(LowBitFormat.parse(name))]]),
    st.sampled_from(sorted(INT4_LAYOUTS)),
    st.integers(1, 300), st.integers(1, 24), st.one_of(st.tuples(st.integers(0, 70)), st.just((2, 3)), st.just(())),
    st.booleans(), st.sampled_from([1, 20_000, 1 << 20]), st.integers(0, 3),
    st.sampled_from(["plain", "transposed", "strided", "expanded"]), st.integers(0, 33), st.integers(0, 1 << 30),
)  # fmt: skip
def test_products_are_those_of_the_unpacked_weight(
    what: tuple[str, Kernel], layout: str, rows: int, groups: int, leading: tuple[int, ...], with_bias: bool,
    panel_bytes: int, offset: int, strides: str, start: int, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    name, kernel = what
    low_bit = LowBitFormat.parse(name)
    panels = divide(rows, groups * low_bit.columns_multiple, low_bit, layout, panel_bytes)
    weight = torch.randn(rows, panels.columns, generator=generator) / 8
    stored = packed(weight, panels)
    memory = torch.zeros(stored.numel() + 64 * offset, dtype=torch.uint8)[64 * offset :].view(stored.shape)
    memory.copy_(stored)
    inputs = at_place(torch.randn(*leading, panels.columns, generator=generator).bfloat16(), start)
    if inputs.dim() == 2:
        inputs = with_strides(inputs, strides)
    bias = torch.randn(rows, generator=generator).bfloat16() if with_bias else None
    bound = LowBitProducts(always_low_bit(kernel), machine_layout(), **OWN).bind(memory, panels, 0)
    got = F.linear(inputs, bound, bias)
    assert type(got) is torch.Tensor
    assert (got.dtype, got.shape) == (torch.bfloat16, (*leading, rows))
    values = unpacked(memory, panels).double()
    exact, terms = inputs.double() @ values.T, inputs.double().abs() @ values.abs().T
    # The product, and the sum with a bias, are rounded to bf16; the native kernel and the matrix unit's round each
    # weight (int4), the native one the product before the scale (int8); torch's for int8 scales in another order.
    steps = BF16_STEP * exact.abs() * (2 if low_bit.bits == 8 and kernel in ("packed", "native", "wide") else 1)
    is_unpacked = low_bit.bits == 4 and layout != machine_layout() and kernel != "wide"
    if kernel == "native" or (kernel == "amx" and low_bit.bits == 4) or is_unpacked:
        steps = steps + BF16_STEP / 2 * terms
    if kernel == "words":
        steps = steps + rounding_of_inputs(inputs, values, low_bit.group)
    if bias is not None:
        exact = exact + bias.double()
        steps = steps + BF16_STEP * exact.abs()
    assert bool(((got.double() - exact).abs() <= steps + 1e-5 * terms + 1e-30).all())


def test_another_layout_is_unpacked_exactly() -> None:
    """Torch's kernel would take it and give nonsense."""
    other = next(name for name in INT4_LAYOUTS if name != machine_layout())
    weight, inputs = torch.randn(128, 64), torch.randn(1, 64).bfloat16()
    products = LowBitProducts(always_low_bit("packed"), machine_layout())
    results = []
    for layout in (machine_layout(), other):
        panels = divide(128, 64, LowBitFormat.parse("int4"), layout)
        results.append(F.linear(inputs, products.bind(packed(weight, panels), panels, 0)).float())
    assert torch.allclose(*results, rtol=2e-2, atol=2e-2 * float(results[0].abs().max()))


def test_inputs_of_another_dtype_get_their_own_back() -> None:
    panels = divide(100, 64, LowBitFormat.parse("int4"), machine_layout())
    weight, inputs, bias = torch.randn(100, 64), torch.randn(4, 64), torch.randn(100)
    bound = LowBitProducts(always_low_bit("packed"), machine_layout()).bind(packed(weight, panels), panels, 0)
    got = F.linear(inputs, bound, bias)
    assert got.dtype == torch.float32
    exact = inputs @ unpacked(packed(weight, panels), panels).T + bias
    assert torch.allclose(got, exact, atol=0.05 * float(exact.abs().max()))


def test_any_other_use_is_refused() -> None:
    panels = divide(64, 64, LowBitFormat.parse("int4"), machine_layout())
    bound = LowBitProducts(always_low_bit("packed"), machine_layout()).bind(
        packed(torch.randn(64, 64), panels), panels, 0
    )
    assert (bound.shape, bound.dtype, bound.device.type) == ((64, 64), torch.bfloat16, "cpu")
    with pytest.raises(UnsupportedModelError, match="low-bit weights is used by"):
        bound + 1


def test_the_profile_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_module, "_MEASURED_ROWS", (1, 32))
    monkeypatch.setattr(low_bit_module, "_MEASURED_TIMES", 1)
    file = tmp_path / "profile.json"
    LowBitProducts.for_run(["int4"], ProfilePlaces(file))
    saved = KernelProfile.load(file)
    assert saved is not None
    assert set(saved.costs) == {"int4"}
    assert set(saved.costs["int4"]) == set(KERNELS["int4"]) - MISSING - UNUSED
    monkeypatch.setattr(low_bit_module, "measure_low_bit", lambda *_: pytest.fail("measured again"))
    LowBitProducts.for_run(["int4"], ProfilePlaces(file))
    monkeypatch.setattr(low_bit_module, "measure_low_bit", measure_low_bit)
    LowBitProducts.for_run(["int8"], ProfilePlaces(file))
    measured = KernelProfile.load(file).costs["int8"]  # type: ignore[union-attr]
    assert set(measured) == set(KERNELS["int8"]) - MISSING - UNUSED


def test_without_a_matrix_unit_the_other_kernels_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_module, "_MEASURED_ROWS", (1,))
    monkeypatch.setattr(low_bit_module, "_MEASURED_TIMES", 1)
    monkeypatch.setattr(low_bit_module, "amx_obstacle", lambda: "this processor has no AMX_TILE")
    compiled = compiled_low_bit()
    costs = measure_low_bit(["int4", "int8"], compiled, FLOATS).costs
    assert all(set(costs[layout]) == set(KERNELS[layout]) - MISSING - {"amx"} for layout in ("int4", "int8"))
    # As a run chooses that has another machine's profile.
    products = LowBitProducts(always_low_bit("amx"), machine_layout(), compiled=compiled)
    panels = divide(64, 64, LowBitFormat.parse("int4"), machine_layout())
    stored, inputs = packed(torch.randn(64, 64), panels), torch.randn(2, 64).bfloat16()
    exact = inputs.float() @ unpacked(stored, panels).T
    assert torch.allclose(products.linear(inputs, stored, panels, 64, None).float(), exact, rtol=0.02, atol=0.1)


@pytest.mark.skipif("amx" in MISSING, reason=str(amx_obstacle()))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_a_matrix_share_inputs_in_tiles(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, dtype: torch.dtype
) -> None:
    """Other dtypes are converted for each part. Outputs are written in their columns."""
    tiled: list[int] = []
    original = CompiledAmxLowBit.pack
    monkeypatch.setattr(CompiledAmxLowBit, "pack", lambda self, x: (tiled.append(len(x)), original(self, x))[1])
    products = LowBitProducts(always_low_bit("amx"), machine_layout(), **OWN)
    panels = divide(150, 128, LowBitFormat.parse("int4"), machine_layout(), 1)
    assert panels.num_panels == 3
    stored, inputs = packed(torch.randn(150, 128), panels), torch.randn(2, 5, 128).to(dtype)
    bias = torch.randn(150).bfloat16() if with_bias else None
    split = SplitMatrix.make(
        (150, 128), dtype, torch.device("cpu"),
        lambda _: (
            (64 * first, min(64 * stop, 150), products.bind(stored[first:stop], panels, first))
            for first, stop in ((0, 2), (2, 3))
        ),
    )  # fmt: skip
    got = F.linear(inputs, split, bias)
    assert (got.dtype, got.shape) == (dtype, (2, 5, 150))
    assert torch.equal(got, F.linear(inputs, products.bind(stored, panels, 0), bias))
    assert tiled == ([10, 10] if dtype is torch.bfloat16 else [10, 10, 10])


@pytest.mark.skipif("dots" in MISSING, reason=str(floats_obstacle()))
@pytest.mark.parametrize(
    ("name", "kernel", "made_of"),
    [
        ("int8", "dots", (PaddedInputs, "of")),
        ("int8", "outer", (CompiledFloats, "group")),
        ("int4", "words", (FloatLowBit, "words")),
    ],
)
def test_parts_of_a_matrix_share_widened_inputs(
    name: str, kernel: Kernel, made_of: tuple[type, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are written in their columns."""
    made: list[int] = []
    original = getattr(*made_of)
    monkeypatch.setattr(*made_of, lambda *args: (made.append(1), original(*args))[1])
    products = LowBitProducts(always_low_bit(kernel), machine_layout(), **OWN)
    panels = divide(150, 128, LowBitFormat.parse(name), machine_layout(), 1)
    stored, inputs = packed(torch.randn(150, 128), panels), torch.randn(2, 5, 128).bfloat16()
    split = SplitMatrix.make(
        (150, 128), torch.bfloat16, torch.device("cpu"),
        lambda _: (
            (64 * first, min(64 * stop, 150), products.bind(stored[first:stop], panels, first))
            for first, stop in ((0, 2), (2, 3))
        ),
    )  # fmt: skip
    got = F.linear(inputs, split)
    assert torch.equal(got, F.linear(inputs, products.bind(stored, panels, 0)))
    assert len(made) == 2  # for the parts once


@pytest.mark.skipif("dots" in MISSING, reason=str(floats_obstacle()))
@pytest.mark.parametrize("layout", ["avx2", "avx512"])
@pytest.mark.parametrize("counts", [(1, 2, 3, 4, 5, 9, 40, 300)])
def test_a_row_of_inputs_gives_the_same_bits_in_any_company(layout: str, counts: tuple[int, ...]) -> None:
    """Where few are multiplied, and where many are; whatever panels the weight is in."""
    products = LowBitProducts(always_low_bit("words"), layout, floats=FLOATS)
    weight, inputs = torch.randn(200, 1024), torch.randn(max(counts), 1024).bfloat16()
    results = []
    for panel_bytes in (1, 1 << 20):
        panels = divide(200, 1024, LowBitFormat.parse("int4-g32"), layout, panel_bytes)
        stored = packed(weight, panels)
        results += [products.linear(inputs[:count], stored, panels, 200, None) for count in counts]
    for result in results:
        assert torch.equal(result, results[len(counts) - 1][: len(result)])


def test_without_a_compiler_the_other_kernels_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit_module, "_MEASURED_ROWS", (1,))
    monkeypatch.setattr(low_bit_module, "_MEASURED_TIMES", 1)
    for name in ("obstacle", "floats_obstacle"):
        monkeypatch.setattr(low_bit_module, name, lambda: "llvmlite is not installed")
    products = LowBitProducts.for_run(["int4", "int8"], ProfilePlaces(tmp_path / "profile.json"))
    saved = KernelProfile.load(tmp_path / "profile.json")
    assert saved is not None
    assert all(set(saved.costs[layout]) == {"packed", "native", "wide"} for layout in ("int4", "int8"))
    panels = divide(64, 64, LowBitFormat.parse("int4"), machine_layout())
    stored, inputs = packed(torch.randn(64, 64), panels), torch.randn(2, 64).bfloat16()
    exact = inputs.float() @ unpacked(stored, panels).T
    assert torch.allclose(products.linear(inputs, stored, panels, 64, None).float(), exact, rtol=0.02, atol=0.1)


# --- a model ---------------------------------------------------------------------------------------------------------


def dequantized(store: PackedModel, model: Any) -> Any:
    """`model` with the weights that `store`'s panels stand for, read with the safetensors library."""
    state = model.state_dict()
    changed = 0
    for block in store.manifest.blocks:
        with safe_open(store.folder / block.file, "pt") as file:
            for tensor in block.tensors:
                if tensor.panels is not None:
                    target = state[tensor.name] if tensor.expert is None else state[tensor.name][tensor.expert]
                    target.copy_(unpacked(file.get_tensor(tensor.key), tensor.panels))
                    changed += 1
    assert changed > 5
    return model


@torch.inference_mode()
def forced(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()


MODELS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"attention_bias": True, "mlp_bias": True},
    "OPTConfig": {"ffn_dim": 640, "word_embed_proj_dim": 256, "init_std": 0.06},
    "GPTNeoXConfig": {},
    "Qwen3MoeConfig": {"decoder_sparse_step": 2, "norm_topk_prob": True},
    "MixtralConfig": {},
}
LARGER: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "initializer_range": 0.06,
}  # fmt: skip


FORMATS = {
    "LlamaConfig": ("int4", "int8"), "OPTConfig": ("int4-g32-sym",), "GPTNeoXConfig": ("int4-g32",),
    "Qwen3MoeConfig": ("int8",), "MixtralConfig": ("int4",),
}  # fmt: skip
# How a kernel multiplies is looked at with one model; with the others the two that unpack with torch are slow.
CASES = [
    pytest.param(
        config, name, kernel,
        marks=pytest.mark.slow if config != "LlamaConfig" and kernel in ("native", "wide") else (),
    )
    for config, names in FORMATS.items()
    for name in names
    for kernel in KERNELS[layout_of(LowBitFormat.parse(name))]
]  # fmt: skip


@dataclass(frozen=True)
class Rounded:
    """A store in few bits; the logits that transformers computes with its weights, in float32 and in bf16."""

    store: PackedModel
    exact: list[torch.Tensor]
    theirs: list[torch.Tensor]


SEQUENCES = random_prompts(256, (40, 13, 60), seed=2)


@pytest.fixture(scope="module")
def rounded(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Rounded]:
    """rounded(configuration class, format): made once for all kernels."""

    @cache
    def make(config: str, name: str) -> Rounded:
        checkpoint = tiny_checkpoint(config, dtype="bfloat16", seed=1, **LARGER | MODELS[config])
        folder = tmp_path_factory.mktemp("rounded") / "store"
        store = pack_checkpoint(checkpoint, folder, torch.bfloat16, Precision.parse(name), panel_bytes=1)
        logits = []
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager").eval()
            dequantized(store, model)
            logits.append([forced(model, tokens) for tokens in SEQUENCES])
        return Rounded(store, *logits)

    return make


@pytest.mark.parametrize("config, name, kernel", CASES)
def test_a_model_is_as_exact_as_transformers_with_the_same_weights(
    config: str, name: str, kernel: Kernel, rounded: Callable[[str, str], Rounded]
) -> None:
    """RMS error of logits against float32, beside that of transformers in bf16."""
    known = rounded(config, name)
    store = known.store
    experts = [t for block in store.manifest.blocks for t in block.tensors if t.expert is not None]
    assert all(tensor.panels is not None for tensor in experts)
    assert bool(experts) == (config in ("Qwen3MoeConfig", "MixtralConfig"))
    products = LowBitProducts(always_low_bit(kernel), machine_layout(), **OWN)
    with Pipeline(store, spare_slots=2, chunk=16, low_bit=products) as pipeline:
        assert experts or any(not tensor.whole for piece in pipeline.pieces for tensor in piece.tensors)
        assert pipeline.stream.times.streamed_bytes == 0
        followed = pipeline.follow(SEQUENCES, [len(tokens) - 10 for tokens in SEQUENCES])
        assert pipeline.stream.times.streamed_bytes > 0
    squares = {"ours": 0.0, "theirs": 0.0}
    for exact, theirs, ours in zip(known.exact, known.theirs, followed, strict=True):
        squares["ours"] += float((ours.logits.double() - exact).square().sum())
        squares["theirs"] += float((theirs - exact).square().sum())
    ratio = (squares["ours"] / squares["theirs"]) ** 0.5
    assert ratio <= 1.25, f"{ratio:.2f} times the error that transformers has"


def test_a_model_that_stays_in_memory_computes_what_one_that_streams_does(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(
        "LlamaConfig", dtype="bfloat16", seed=1, **LARGER | {"attention_bias": True, "mlp_bias": True}
    )
    policy = Precision((Rule("*.up_proj.*", "16bit"), Rule("*", "int4")))
    store = pack_checkpoint(checkpoint, tmp_path / "store", torch.bfloat16, policy, panel_bytes=1)
    sequences = random_prompts(256, (20, 7), seed=2)
    results = []
    for resident in (2, None):
        products = LowBitProducts(always_low_bit("packed"), machine_layout())
        told: list[bool] = []
        monkeypatch.setattr(products, "stay_awake", told.append)
        with Pipeline(store, resident_pieces=resident, low_bit=products) as pipeline:
            results.append([one.logits for one in pipeline.follow(sequences, [12, 3])])
            linears = [module for module in pipeline.model.modules() if type(module) is torch.nn.Linear]
            direct = [module for module in linears if "forward" in vars(module)]
            assert bool(direct) == (resident is None)
            assert len(direct) < len(linears)  # those at 16 bits, and those that are split
            pipeline.binder.abandon()
            assert not any("forward" in vars(module) for module in linears)
            assert told == ([True, False] if resident is None else [])
            results.append([one.logits for one in pipeline.follow(sequences, [12, 3])])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_a_policy_mixes_formats_in_one_model(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("LlamaConfig", dtype="bfloat16", seed=1)
    policy = Precision((Rule("lm_head.*", "16bit"), Rule("*.mlp.*", "int4-g32"), Rule("*", "int8")))
    store = pack_checkpoint(checkpoint, tmp_path / "store", torch.bfloat16, policy)
    formats = {t.name: t.panels and t.panels.format for block in store.manifest.blocks for t in block.tensors}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int4-g32"
    assert formats["model.layers.0.self_attn.q_proj.weight"] == "int8"
    assert formats["lm_head.weight"] is None
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    reference = dequantized(store, model)
    (tokens,) = random_prompts(256, (30,))
    with Pipeline(store) as pipeline:
        (ours,) = pipeline.follow([tokens], [20])
    error = (ours.logits.double() - forced(reference, tokens)).abs().max() / forced(reference, tokens).abs().max()
    assert float(error) < 0.05


def test_rows_and_blocks() -> None:
    """A panel's rows are what kernels compute at once, for every layout."""
    assert all(BLOCK_ROWS % order.block == 0 for order in INT4_LAYOUTS.values())
