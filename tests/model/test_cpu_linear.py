"""Products with 16-bit weights against float64, by every kernel, and what a bound weight does else."""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulated_tiles import matrix_unit
from hypothesis import given, settings
from hypothesis import strategies as st

import pipo_ray.model.cpu_linear as cpu_linear
from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.float_inputs import PaddedInputs
from pipo_ray.compiled.float_products import LEAST_COLUMNS, CompiledFloats
from pipo_ray.compiled.support import floats_obstacle, obstacle
from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.cpu_linear import (
    HALF_DTYPES,
    CpuProducts,
    HalfMatrix,
    ProductInputs,
    always,
    is_hopeless,
    linear_into,
    measure_profile,
)
from pipo_ray.model.kept_profiles import ProfilePlaces
from pipo_ray.model.kernel_profile import KERNELS, SCRATCH_BYTES, SIXTEEN_BIT_LAYOUTS, Cost, Kernel, KernelProfile
from pipo_ray.model.streamed import SplitMatrix

REASONS: dict[Kernel, str | None] = {
    "compiled": obstacle(), "amx": floats_obstacle(), "dots": floats_obstacle(), "outer": floats_obstacle(),
}  # fmt: skip
MISSING = {kernel for kernel, reason in REASONS.items() if reason is not None}
KINDS = sorted({kernel for layout in SIXTEEN_BIT_LAYOUTS for kernel in KERNELS[layout]} - MISSING)
shapes = st.tuples(
    st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 3), st.integers(0, 5)), st.just(())),
    st.integers(1, 70),
    st.integers(1, 70),
)


def within_one_rounding(got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> bool:
    """Half a unit in the last place of the result, and float32's share of the sum of the terms' magnitudes."""
    kind = torch.finfo(got.dtype)
    step = kind.eps * torch.exp2(torch.frexp(exact).exponent.double() - 1).clamp(min=kind.tiny)
    return bool(((got.double() - exact).abs() <= 0.501 * step + 1e-6 * terms).all())


def weight_at(shape: tuple[int, int], dtype: torch.dtype, offset: int) -> torch.Tensor:
    """A weight whose memory begins `offset` elements behind an aligned address."""
    return torch.randn(shape[0] * shape[1] + offset).to(dtype)[offset:].view(shape)


@cache
def own(dtype: torch.dtype = torch.bfloat16) -> OwnKernels:
    """All that this machine can have, also those that it would not use; compiled once for all tests."""
    is_bf16 = dtype is torch.bfloat16
    with matrix_unit():
        return OwnKernels(
            CompiledBf16() if is_bf16 and not REASONS["compiled"] else None,
            CompiledAmx() if is_bf16 and not REASONS["amx"] else None,
            None if REASONS["dots"] else CompiledFloats(dtype),
        )


def chunked(profile: KernelProfile, scratch_elements: int, dtype: torch.dtype = torch.bfloat16) -> CpuProducts:
    """With a scratch so small that these small matrices take several chunks."""
    products = CpuProducts(profile, own(dtype))
    products._scratch = torch.empty(scratch_elements)
    return products


@settings(deadline=None, max_examples=150)
@given(
    shapes, st.booleans(), st.sampled_from(HALF_DTYPES), st.sampled_from([kind for kind in KINDS if kind != "native"]),
    st.integers(0, 3),
    st.sampled_from([71, 300, 100_000]), st.sampled_from(["plain", "transposed", "strided", "expanded"]),
    st.sampled_from(["linear", "matmul"]),
)  # fmt: skip
def test_every_product_is_rounded_once(
    shape: tuple[tuple[int, ...], int, int], with_bias: bool, dtype: torch.dtype, kernel: Kernel, offset: int,
    scratch: int, strides: str, layout: str,
) -> None:  # fmt: skip
    leading, width, height = shape
    no_half, no_narrow = kernel in ("compiled", "amx"), kernel in ("dots", "outer")
    if layout == "matmul" or (no_half and dtype is torch.float16) or (no_narrow and width < LEAST_COLUMNS):
        kernel = "wide"  # instead: they have no such products
    products = chunked(always(kernel, dtype), scratch, dtype)
    inputs = torch.randn(*leading, width).to(dtype)
    if strides == "transposed":
        inputs = inputs.mT.contiguous().mT if inputs.dim() > 1 else inputs
    elif strides == "strided":
        inputs = torch.randn(*leading, 2 * width).to(dtype)[..., ::2]
    elif strides == "expanded" and leading:
        inputs = inputs[:1].expand_as(inputs)
    bias = torch.randn(height).to(dtype) if with_bias else None
    weight = weight_at((height, width) if layout == "linear" else (width, height), dtype, offset)
    bound = products.bind(weight)
    as_columns = weight.double().T if layout == "linear" else weight.double()
    exact = inputs.double() @ as_columns + (0 if bias is None else bias.double())
    terms = inputs.double().abs() @ as_columns.abs() + (0 if bias is None else bias.double().abs())
    if layout == "linear":
        got = F.linear(inputs, bound, bias)
    elif bias is not None and len(leading) == 1:
        got = torch.addmm(bias, inputs, bound)
    else:
        got = inputs @ bound
        exact, terms = inputs.double() @ as_columns, inputs.double().abs() @ as_columns.abs()
    assert type(got) is torch.Tensor
    assert (got.dtype, got.shape) == (dtype, exact.shape)
    assert within_one_rounding(got, exact, terms)


@pytest.mark.parametrize("kernel", KINDS)
def test_the_same_again_in_and_out_of_inference_mode(kernel: Kernel) -> None:
    products = chunked(always(kernel), 1000)
    inputs, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((5, 96), (33, 96), (33,)))
    first = F.linear(inputs, products.bind(weight), bias)
    with torch.inference_mode():
        again = F.linear(inputs.clone(), products.bind(weight.clone()), bias.clone())
    shifted = torch.empty(weight.numel() + 1, dtype=weight.dtype)[1:].view(weight.shape).copy_(weight)
    assert torch.equal(first, again)
    assert torch.equal(first, F.linear(inputs, products.bind(shifted), bias))
    assert torch.equal(first, F.linear(inputs, products.bind(weight), bias))


def test_the_kernels_chosen_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for kind, name in (
        (CpuProducts, "_wide_linear"), (CpuProducts, "_tall_linear"), (CpuProducts, "_wide_matmul"),
        (CompiledBf16, "linear"), (CompiledAmx, "linear_into"), (CompiledFloats, "dots_into"),
        (CompiledFloats, "outer_into"),
    ):  # fmt: skip
        original = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *args, n=name, call=original: (ran.append(n), call(self, *args))[1]
        )
    inputs, weight = torch.randn(3, 8).bfloat16(), torch.randn(8, 8).bfloat16()
    for kernel in KINDS:
        bound = CpuProducts(always(kernel), own()).bind(weight)
        module = torch.nn.Linear(8, 8, bias=False, device="meta")
        module._parameters["weight"] = bound
        module(inputs)
        inputs.matmul(bound)
    names = {
        "amx": "linear_into", "compiled": "linear", "dots": "dots_into", "outer": "outer_into", "tall": "_tall_linear",
        "wide": "_wide_linear",
    }  # fmt: skip
    assert ran == [*(names[kernel] for kernel in KINDS if kernel in names), "_wide_matmul"]


@pytest.mark.parametrize("kernel", ["compiled", "amx", "dots", "outer"])
def test_what_our_kernels_are_not_made_for_is_another_s(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel in MISSING:
        pytest.skip(str(REASONS[kernel]))
    monkeypatch.setattr(CompiledBf16, "linear", lambda *_: pytest.fail("called"))
    monkeypatch.setattr(CompiledAmx, "linear_into", lambda *_: pytest.fail("called"))
    for name in ("dots_into", "outer_into"):
        monkeypatch.setattr(CompiledFloats, name, lambda *_: pytest.fail("called"))
    for products, dtype in ((CpuProducts(always(kernel)), torch.bfloat16), (chunked(always(kernel), 99), None)):
        kind = dtype or torch.float16
        weight, inputs = torch.randn(6, 16).to(kind), torch.randn(2, 16).to(kind)
        assert products.linear(inputs, weight).shape == (2, 6)
    columns = torch.randn(16, 6).bfloat16().T
    assert chunked(always(kernel), 99).linear(torch.randn(2, 16).bfloat16(), columns).shape == (2, 6)
    if kernel in ("dots", "outer"):
        weight = torch.randn(6, LEAST_COLUMNS - 1).bfloat16()
        assert chunked(always(kernel), 99).linear(torch.randn(2, LEAST_COLUMNS - 1).bfloat16(), weight).shape == (2, 6)


def test_transformers_conv1d_is_multiplied_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.pytorch_utils import Conv1D

    products = chunked(always("wide"), 100)
    module = Conv1D(nf=24, nx=10).bfloat16()
    inputs = torch.randn(2, 3, 10).bfloat16()
    exact = inputs.double() @ module.weight.double() + module.bias.double()
    called: list[int] = []
    original = CpuProducts._wide_matmul
    monkeypatch.setattr(CpuProducts, "_wide_matmul", lambda self, *a: (called.append(1), original(self, *a))[1])
    module._parameters["weight"] = products.bind(module.weight.detach())
    module._parameters["bias"] = module.bias.detach()
    torch.testing.assert_close(module(inputs).double(), exact, rtol=0.004, atol=1e-4)
    assert called


def test_float32_weights_are_left_alone() -> None:
    products = CpuProducts(always("wide"))
    for weight in (torch.randn(4, 4), torch.randn(4).bfloat16(), torch.ones(4, 4, dtype=torch.int8)):
        assert products.bind(weight) is weight


def test_a_bound_weight_is_else_the_plain_tensor() -> None:
    products = CpuProducts(always("wide"))
    weight = torch.randn(6, 4).bfloat16()
    bound = products.bind(weight)
    assert bound.data_ptr() == weight.data_ptr()
    for result, expected in (
        (bound.T, weight.T), (bound + 1, weight + 1), (bound.float(), weight.float()), (bound[1:3], weight[1:3]),
        (torch.randn(2, 6).bfloat16().zero_() @ bound, torch.zeros(2, 4).bfloat16()),
    ):  # fmt: skip
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    assert torch.equal(F.linear(bound, weight), F.linear(weight, weight))
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(2, 5).bfloat16(), bound)
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(2, 4), bound)
    wanted = torch.randn(2, 4).bfloat16().requires_grad_()
    F.linear(wanted, bound).float().sum().backward()
    assert wanted.grad is not None


def test_a_stack_of_experts_is_multiplied_here_one_by_one() -> None:
    stack = CpuProducts(always("wide")).bind(torch.randn(3, 6, 4).bfloat16())
    assert type(stack[1]) is HalfMatrix
    assert type(stack[torch.tensor(2)]) is HalfMatrix
    inputs = torch.randn(2, 4).bfloat16()
    exact = inputs.double() @ torch.Tensor.as_subclass(stack, torch.Tensor)[1].double().T
    torch.testing.assert_close(F.linear(inputs, stack[1]).double(), exact, rtol=0.004, atol=1e-5)


def test_a_split_matrix_is_multiplied_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    products = CpuProducts(always("tall"))
    weight, inputs = torch.randn(10, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    parts: list[int] = []
    original = CpuProducts._tall_linear
    monkeypatch.setattr(
        CpuProducts, "_tall_linear", lambda self, x, w, b: (parts.append(len(w)), original(self, x, w, b))[1]
    )
    split = SplitMatrix.make(
        (10, 4), torch.bfloat16, torch.device("cpu"),
        lambda _: ((a, b, products.bind(weight[a:b])) for a, b in ((0, 7), (7, 10))),
    )  # fmt: skip
    torch.testing.assert_close(
        F.linear(inputs, split).double(), inputs.double() @ weight.double().T, rtol=0.004, atol=1e-4
    )
    assert parts == [7, 3]


@pytest.mark.parametrize(
    ("kernel", "made_of"),
    [("amx", (CompiledAmx, "pack")), ("dots", (PaddedInputs, "of")), ("outer", (CompiledFloats, "group"))],
)
def test_parts_of_a_matrix_share_what_is_made_of_their_inputs(
    kernel: Kernel, made_of: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel in MISSING:
        pytest.skip(str(REASONS[kernel]))
    products = CpuProducts(always(kernel), own())
    weight, inputs = torch.randn(100, 40).bfloat16(), torch.randn(2, 3, 40).bfloat16()
    made: list[int] = []
    original = getattr(*made_of)
    monkeypatch.setattr(*made_of, lambda *args: (made.append(len(args[-1])), original(*args))[1])
    split = SplitMatrix.make(
        (100, 40), torch.bfloat16, torch.device("cpu"),
        lambda _: ((a, b, products.bind(weight[a:b])) for a, b in ((0, 64), (64, 100))),
    )  # fmt: skip
    exact = inputs.double() @ weight.double().T
    torch.testing.assert_close(F.linear(inputs, split).double(), exact, rtol=0.008, atol=1e-3)
    assert made == [6]


@pytest.mark.parametrize("kernel", [None, *KINDS])
@pytest.mark.parametrize("rows", [1, 31, 32, 50])
@pytest.mark.parametrize("columns", [24, 512])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_goes_to_its_columns_and_no_others(
    kernel: Kernel | None, rows: int, columns: int, with_bias: bool
) -> None:
    dtype = torch.float32 if kernel is None else torch.bfloat16
    weight, inputs = torch.randn(columns, 16).to(dtype), torch.randn(rows, 16).to(dtype)
    bias = torch.randn(columns).to(dtype) if with_bias else None
    exact = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    part = weight if kernel is None else CpuProducts(always(kernel), own()).bind(weight)
    output = torch.full((rows, columns + 36), 7.0, dtype=dtype)
    mine = output[:, 20 : 20 + columns]
    linear_into(ProductInputs(inputs), part, bias, mine, columns)
    torch.testing.assert_close(mine.double(), exact, rtol=0.008, atol=1e-2 if kernel else 1e-5)
    assert (output[:, :20] == 7).all()
    assert (output[:, 20 + columns :] == 7).all()


@pytest.mark.skipif("outer" in MISSING, reason="no kernels in float32 here")
@pytest.mark.parametrize(("kernel", "name"), [("outer", "outer_into"), ("tall", "_tall_linear")])
def test_a_small_part_is_multiplied_as_all_of_its_matrix_by_machine_code_alone(
    kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call takes besides decides for a small weight, and not for the small parts that are one call."""
    known = {"native": Cost(0.0, (1, 2), (1e-9, 2e-9)), kernel: Cost(1e-4, (1, 2), (1e-12, 2e-12))}
    costs = {one: known.get(one, Cost(1.0, (1, 2), (1.0, 1.0))) for one in KERNELS["linear"]}
    products = CpuProducts(KernelProfile("bfloat16", torch.get_num_threads(), {"linear": costs}), own())
    ran: list[str] = []
    kind = CompiledFloats if kernel == "outer" else CpuProducts
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args: (ran.append(kernel), original(*args))[1])
    weight, inputs = torch.randn(16, 32).bfloat16(), torch.randn(2, 32).bfloat16()
    wanted = F.linear(inputs, weight)
    for all_rows in (16, 16 * 1000):
        output = torch.zeros(2, all_rows).bfloat16()
        linear_into(ProductInputs(inputs), products.bind(weight), None, output[:, :16], all_rows)
        torch.testing.assert_close(output[:, :16], wanted)
        is_one_call = kernel == "outer" and all_rows > 16
        assert ran == ([kernel] if is_one_call else [])
        made = products.rows_product(ProductInputs(inputs), weight, None, output)
        assert (made is not None) == is_one_call
    assert products.linear(inputs, weight).equal(wanted)


def test_the_scratch_is_all_that_is_taken_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 copy of the weight: what a product allocates has the size of inputs and outputs."""
    products = CpuProducts(always("wide"))
    assert products._scratch.nbytes == SCRATCH_BYTES
    weight, inputs = torch.randn(9000, 1024).bfloat16(), torch.randn(2, 1024).bfloat16()
    assert 4 * weight.numel() > 4 * SCRATCH_BYTES
    bound = products.bind(weight)
    with torch.inference_mode():
        F.linear(inputs, bound)
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            F.linear(inputs, bound)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert 0 < allocated <= 4 * inputs.numel() + 8 * len(inputs) * len(weight) + 65536


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_a_profile_is_measured_once_and_kept(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels.json"
    code = tmp_path / "code"
    first = CpuProducts.for_run(dtype, ProfilePlaces(file), code)
    monkeypatch.setattr(cpu_linear, "measure_costs", lambda *_: pytest.fail("measured again"))
    again = CpuProducts.for_run(dtype, ProfilePlaces(file), code)
    assert again._profile == first._profile
    compiles = not REASONS["dots"] or (dtype is torch.bfloat16 and not REASONS["compiled"])
    assert set(tmp_path.iterdir()) == {file} | ({code} if compiles else set())
    monkeypatch.setattr(cpu_linear, "measure_costs", lambda layouts, dtype, *_: always("tall", dtype).costs)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert CpuProducts.for_run(other, ProfilePlaces(file))._profile.dtype == str(other).removeprefix("torch.")


@pytest.mark.parametrize(
    ("rates", "times_the_best", "hopeless"),
    [
        ((1.0, 1.0, 1.05), 2.3, False),  # as many rows as there are cost the same
        ((1.0, 2.0, 4.0), 2.3, True),
        ((1.0, 2.0, 4.0), 1.9, False),
        ((9.0,), 9.0, False),
    ],
)
def test_a_kernel_is_given_up_if_rows_cost_no_less_where_there_are_more(
    rates: tuple[float, ...], times_the_best: float, hopeless: bool
) -> None:
    assert is_hopeless(rates, (1, 2, 4, 8), times_the_best) == hopeless


def test_what_is_slow_with_few_rows_is_still_measured_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's product where the processor multiplies matrices (AMX): as slow for one row as for sixteen."""

    def seconds(multiply: dict[Kernel, object], inputs: torch.Tensor, *_: object) -> dict[Kernel, float]:
        rows = len(inputs) if inputs.shape[1] > 8 else 0
        return {kernel: 3e-4 if kernel == "native" else 1e-4 * max(1, rows / 4) for kernel in multiply}

    monkeypatch.setattr(cpu_linear, "least_seconds", seconds)
    profile = measure_profile(torch.bfloat16)
    assert profile.costs["linear"]["native"].rows[-1] == 128
    assert profile.choose("linear", 1, 1 << 20) != "native"
    assert profile.choose("linear", 1024, 1 << 20) == "native"


def test_what_is_made_for_many_rows_is_measured_with_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if something else disturbed it while there were few."""

    def seconds(multiply: dict[Kernel, object], inputs: torch.Tensor, *_: object) -> dict[Kernel, float]:
        rows = len(inputs) if inputs.shape[1] > 8 else 0
        flat = {1: 4e-4, 2: 4e-4, 4: 9e-4}.get(rows, 4e-4 * max(1, rows / 16))
        return {kernel: flat if kernel in ("outer", "tall", "amx") else 1e-4 * max(1, rows / 2) for kernel in multiply}

    monkeypatch.setattr(cpu_linear, "least_seconds", seconds)
    costs = measure_profile(torch.bfloat16, own()).costs["linear"]
    for kernel in {"outer", "tall", "amx"} & set(costs):
        assert costs[kernel].rows[-1] == 128


def test_measured_costs_are_positive_for_every_kernel() -> None:
    profile = measure_profile(torch.bfloat16, own())
    assert tuple(profile.costs) == SIXTEEN_BIT_LAYOUTS
    for layout in SIXTEEN_BIT_LAYOUTS:
        assert set(profile.costs[layout]) == set(KERNELS[layout]) - MISSING
        for cost in profile.costs[layout].values():
            assert 0 < cost.seconds(1, 1 << 20) <= cost.seconds(64, 1 << 20)
