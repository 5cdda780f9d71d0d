"""GPTQ, AWQ and compressed-tensors weights, row range by row range, against what was written and who wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.foreign.writers import awq_parts, dense_words, gptq_parts, quantize
from safetensors.torch import save_file

import pipo_ray.quant.foreign.reading as reading
from pipo_ray.errors import CheckpointError
from pipo_ray.model.blocks import TensorSpec
from pipo_ray.quant.foreign.bits import unpack_rows
from pipo_ray.quant.foreign.checkpoint import ForeignCheckpoint, open_foreign
from pipo_ray.quant.foreign.codes import ForeignCodes
from pipo_ray.quant.foreign.weight import Survey, bf16_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import divide
from pipo_ray.quant.rounding import Rounded, values_of
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.source import RowSources

ROWS, COLUMNS = 96, 256


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def opened(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ForeignCheckpoint:
    import json

    folder.mkdir(exist_ok=True)
    save_file(
        {"norm.weight": torch.ones(4), **{f"up.{name}": tensor.contiguous() for name, tensor in tensors.items()}},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    found = open_foreign(Checkpoint.open(folder))
    assert found is not None
    assert found.tensors["up.weight"].shape == (ROWS, COLUMNS)
    assert set(found.tensors) == {"up.weight", "norm.weight"}
    return found


def check(found: ForeignCheckpoint, truth: torch.Tensor, low_bit: str | None) -> None:
    """All values, some values, and the codes if there are any."""
    up = found.weights["up.weight"]
    assert (up.low_bit and up.low_bit.name) == low_bit
    for start, stop in ((0, ROWS), (64, ROWS), (3, 21)):
        assert torch.equal(up.rows(start, stop).values(), truth[start:stop].float())
    data = found.read("up.weight", 4 * (COLUMNS + 5), 4 * (3 * COLUMNS + 1))
    assert torch.equal(
        torch.from_numpy(data).view(torch.float32), truth.float().view(-1)[COLUMNS + 5 : 3 * COLUMNS + 1]
    )
    if up.low_bit is not None:
        rounded = up.rows(3, 21).rounded(up.low_bit)
        check_bound(rounded, truth[3:21], up.low_bit)


def check_bound(rounded: Rounded, truth: torch.Tensor, low_bit: LowBitFormat) -> None:
    """No further from the truth than bf16 may be; with zeros no further than their and the scales' own rounding."""
    bound = truth.abs()
    if low_bit.bits == 4 and not low_bit.symmetric:
        scales, zeros = (part.double().repeat_interleave(low_bit.group, 1) for part in rounded[1:])
        bound = (rounded.codes.double() - 8).abs() * scales.abs() + zeros.abs()
    error = (values_of(rounded, low_bit).double() - truth).abs()
    assert bool((error <= bound * 2.0**-8 * (1 + 2**-7) + 1e-12).all())


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 1 << 30))
def test_words_hold_integers_without_gaps(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack_rows(dense_words(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("layout, strip_bytes", [("gptq", 1 << 20), ("gptq_v2", 2048)])
@pytest.mark.parametrize(
    "bits, group, symmetric, low_bit",
    [
        (4, 128, False, "int4-g128"),
        (4, 128, True, "int4-g128-sym"),
        (4, 32, False, "int4-g32"),
        (4, -1, True, "int4-g128-sym"),
        (4, 16, False, None),
        (8, -1, True, "int8"),
        (8, -1, False, None),
        (8, 32, True, None),
        (3, 64, False, None),
        (2, 64, True, None),
    ],
)
def test_gptq(
    bits: int, group: int, symmetric: bool, low_bit: str | None, layout: str, strip_bytes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(reading.TensorFiles.__init__, "__defaults__", (strip_bytes,))
    made = quantize(weight(), bits, group, symmetric=symmetric)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": layout}
    check(opened(tmp_path, settings, gptq_parts(made, bits, layout=layout)), made.values(), low_bit)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_zero_points_may_be_any_code(bits: int, layout: str, tmp_path: Path) -> None:
    """0, too, which less one borrows from the next."""
    made = quantize(weight(), bits, 32, symmetric=False)
    points = torch.randint(0, 1 << min(bits, 4), made.points.shape, generator=torch.Generator().manual_seed(0))
    made = made._replace(points=points.to(torch.uint8))
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": layout}
    parts = gptq_parts(made, bits, layout=layout)
    check(opened(tmp_path, settings, parts), made.values(), "int4-g32" if bits == 4 else None)


def test_gptq_with_columns_in_another_order(tmp_path: Path) -> None:
    made = quantize(weight(), 4, 64, symmetric=False)
    group_of = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // 64
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    check(opened(tmp_path, settings, gptq_parts(made, 4, group_of)), made.values(group_of), None)


@pytest.mark.parametrize(
    "group, symmetric, low_bit", [(128, False, "int4-g128"), (64, True, "int4-g64-sym"), (16, False, None)]
)
@pytest.mark.parametrize("strip_bytes", [1 << 20, 2048])
def test_awq(
    group: int, symmetric: bool, low_bit: str | None, strip_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading.TensorFiles.__init__, "__defaults__", (strip_bytes,))
    made = quantize(weight(), 4, group, symmetric=symmetric)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    check(opened(tmp_path, settings, awq_parts(made)), made.values(), low_bit)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group, low_bit", [(128, "int4-g128"), (32, "int4-g32"), (16, None)])
def test_awq_is_what_compressed_tensors_reads(
    group: int, low_bit: str | None, zero_point: bool, tmp_path: Path
) -> None:
    """Any words, converted and read by that library, whose authors read AutoAWQ's checkpoints with it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": zero_point}
    generator = torch.Generator().manual_seed(group)
    parts = {
        "qweight": torch.randint(-(2**31), 2**31, (COLUMNS, ROWS // 8), generator=generator).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (COLUMNS // group, ROWS // 8), generator=generator).int(),
        "scales": (torch.rand(COLUMNS // group, ROWS, generator=generator) * 0.01 + 0.001).half(),
    }
    if not zero_point:
        parts["qzeros"][:] = 0x88888888 - (1 << 32)  # what AutoAWQ writes then, and others leave out
    converter = AutoAWQConverter.from_autoawq_config(settings)
    made = converter.process({f"up.{name}": part.clone() for name, part in parts.items()})
    state = {name.removeprefix("up."): part for name, part in made.items()}
    state["weight_scale"] = state["weight_scale"].float()
    config = converter.update_config(None)
    assert config is not None
    (scheme,) = config.config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    truth = compressor.decompress(state, scheme)["weight"].double()
    assert 0.001 < float(truth.abs().max()) < 0.011 * 15
    check(opened(tmp_path, settings, parts), truth, low_bit if zero_point else low_bit and f"{low_bit}-sym")


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_words_are_those_of_compressed_tensors(bits: int) -> None:
    """The writer of the tests above packs as that library does, along the columns of a weight."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    made = quantize(weight(), bits, 32, symmetric=False)
    signed = (made.codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(gptq_parts(made, bits)["qweight"], pack_to_int32(signed.T.contiguous(), bits, packed_dim=0))


def test_scales_that_bf16_holds_are_kept_exactly(tmp_path: Path) -> None:
    made = quantize(weight(), 4, 32, symmetric=True, dtype=torch.bfloat16)
    made = made._replace(scales=made.scales.half().bfloat16())  # small ones are no normal numbers of float16
    found = opened(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq_parts(made, 4))
    assert found.survey == Survey(made.scales.numel(), made.scales.numel())
    up = found.weights["up.weight"]
    assert up.low_bit is not None
    assert torch.equal(values_of(up.rows(0, ROWS).rounded(up.low_bit), up.low_bit), made.values().float())
    # Finer groups hold the same codes; others do not.
    assert up.fits(LowBitFormat.parse("int4-g32"))
    assert not any(up.fits(LowBitFormat.parse(name)) for name in ("int4-g64", "int8"))


def test_finer_groups_hold_the_same_codes(tmp_path: Path) -> None:
    found = opened(tmp_path, GPTQ | {"group_size": 128}, gptq_parts(quantize(weight(), 4, 128, symmetric=False), 4))
    up, fine = found.weights["up.weight"], LowBitFormat.parse("int4-g32")
    assert up.low_bit is not None
    assert up.fits(fine)
    coarse = values_of(up.rows(0, ROWS).rounded(up.low_bit), up.low_bit)
    assert torch.equal(values_of(up.rows(0, ROWS).rounded(fine), fine), coarse)


def test_a_tensor_of_several_gets_the_finest_groups(tmp_path: Path) -> None:
    """Gate and up of an expert may have been quantized differently."""
    for number, (group, symmetric) in enumerate([(128, True), (32, False)]):
        made = quantize(weight(), 4, group, symmetric=symmetric)
        found = opened(tmp_path / str(number), GPTQ | {"group_size": group}, gptq_parts(made, 4))
        if number == 0:
            first = found
    checkpoint: Any = SimpleNamespace(
        weights={"gate": first.weights["up.weight"], "up": found.weights["up.weight"]},
    )
    places = torch.stack((torch.arange(2 * ROWS) // ROWS, torch.arange(2 * ROWS) % ROWS))
    tensors: Any = SimpleNamespace(
        checkpoint_keys=lambda name: ("gate", "up"),
        row_sources=lambda name, expert: RowSources(("gate", "up"), places),
    )
    codes = ForeignCodes(tensors, checkpoint)
    low_bit = codes.low_bit(TensorSpec("gate_up", (2 * ROWS, COLUMNS), "BF16"))
    assert low_bit == LowBitFormat.parse("int4-g32")
    panels = divide(2 * ROWS, COLUMNS, low_bit, "avx512")
    read = codes.read(TensorSpec("gate_up", panels.shape, "U8", None, "rows", panels), ROWS - 32, ROWS + 32)
    assert read is not None
    want = torch.cat(
        (first.weights["up.weight"].rows(64, 96).values(), found.weights["up.weight"].rows(0, 32).values())
    )
    assert float((values_of(read(), low_bit) - want).abs().max()) <= 2**-7 * float(want.abs().max())


def test_panels_are_as_near_as_bf16() -> None:
    """With zeros not for each value, but in the mean: in steps of the codes."""
    made = quantize(torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)), 4, 128, symmetric=False)
    scales, zeros = (
        part.double().repeat_interleave(128, 1) for part in bf16_of(made.scales.float(), made.points.float())
    )
    truth, steps = made.values(), made.scales.double().repeat_interleave(128, 1)

    def error(values: torch.Tensor) -> float:
        return float(((values - truth) / steps).square().mean().sqrt())

    assert error((made.codes.double() - 8) * scales + zeros) < 1.1 * error(truth.bfloat16().double()) < 0.006


SCHEMES: list[tuple[dict[str, Any], str | None]] = [
    ({"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}, "int4-g128-sym"),
    ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "int4-g32"),
    ({"num_bits": 4, "strategy": "channel", "symmetric": True}, "int4-g128-sym"),
    ({"num_bits": 8, "strategy": "channel", "symmetric": True}, "int8"),
    ({"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
    ({"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": True}, None),
    ({"num_bits": 8, "strategy": "tensor", "symmetric": True}, "int8"),
]


def compressed(
    arguments: dict[str, Any], layout: str, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that compressed-tensors writes for a weight, and the values it reads out of them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**arguments)
    groups = weight().view(ROWS, -1, arguments.get("group_size", COLUMNS))
    if args.strategy == "tensor":
        groups = weight().view(1, 1, -1)
    scale, points = calculate_qparams(groups.amin(2), groups.amax(2), args)
    state = {"weight": weight().to(dtype), "weight_scale": scale.to(dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = points.to(torch.int8)
    if args.strategy == "tensor":
        state["weight_scale"] = state["weight_scale"].view(1)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    compressor: Any = BaseCompressor.get_value_from_registry(layout)
    made = compressor.compress(state, scheme)
    exact = {name: value.float() if name == "weight_scale" else value for name, value in made.items()}
    return made, compressor.decompress(exact, scheme)["weight"]


def compressed_settings(arguments: dict[str, Any], layout: str) -> dict[str, Any]:
    """What its configuration says."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **arguments}}},
    }


PLACES = [("pack-quantized", torch.float16, *one) for one in SCHEMES]
PLACES += [("int-quantized", torch.bfloat16, *one) for one in SCHEMES if one[0]["num_bits"] == 8]


@pytest.mark.parametrize("layout, dtype, arguments, low_bit", PLACES)
def test_compressed_tensors(
    layout: str, dtype: torch.dtype, arguments: dict[str, Any], low_bit: str | None, tmp_path: Path
) -> None:
    made, values = compressed(arguments, layout, dtype)
    check(opened(tmp_path, compressed_settings(arguments, layout), made), values.double(), low_bit)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda parts: parts.pop("scales"), "weight 'up.weight' lacks 'up.scales'; the shard that has it is damaged"),
        (lambda parts: parts.pop("qzeros"), "lacks 'up.qzeros'"),
        (lambda parts: parts["scales"].__setitem__((1, 2), torch.nan), "'up.scales' .* holds the scale nan .1 of 768"),
        (lambda parts: parts["scales"].__setitem__((1, 2), 0), "'up.scales' .* holds the scale 0 .*download it again"),
        (
            lambda parts: parts.__setitem__("scales", parts["scales"][:4]),
            r"is F16 of shape \[4, 96\], .* needs .*\[8, 96\]",
        ),
        (lambda parts: parts["g_idx"].__setitem__(7, 99), "'up.g_idx' puts a column into group 99"),
        (lambda parts: parts.__setitem__("qweight", parts["qweight"].float()), "is F32 of shape .* needs I32"),
        (lambda parts: parts.__setitem__("qweight", parts["qweight"].flatten()), "'up.qweight' .* not a matrix's"),
    ],
)
def test_damaged_parts_are_named(
    damage: Callable[[dict[str, torch.Tensor]], object], said: str, tmp_path: Path
) -> None:
    parts = gptq_parts(quantize(weight(), 4, 32, symmetric=False), 4)
    damage(parts)
    with pytest.raises(CheckpointError, match=said):
        opened(tmp_path, GPTQ, parts)


@pytest.mark.parametrize(("value", "said"), [(torch.nan, "nan"), (0.0, "0")])
def test_damaged_scales_of_awq_are_named(value: float, said: str, tmp_path: Path) -> None:
    parts = awq_parts(quantize(weight(), 4, 32, symmetric=False))
    parts["scales"][1, 2] = value
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    with pytest.raises(CheckpointError, match=rf"'up\.scales' .* holds the scale {said} .*download it again"):
        opened(tmp_path, settings, parts)


@pytest.mark.parametrize(("value", "said"), [(torch.inf, "inf"), (0.0, "0")])
def test_damaged_scales_of_compressed_tensors_are_named(value: float, said: str, tmp_path: Path) -> None:
    arguments = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
    made, _ = compressed(arguments, "pack-quantized", torch.float16)
    made["weight_scale"][1, 2] = value
    with pytest.raises(CheckpointError, match=rf"'up\.weight_scale' .* holds the scale {said} .*download it again"):
        opened(tmp_path, compressed_settings(arguments, "pack-quantized"), made)


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    parts = gptq_parts(quantize(weight(), 4, 32, symmetric=False), 4)
    with pytest.raises(CheckpointError, match=r"'up\.weight' has 256 columns, which groups of 48 do not divide"):
        opened(tmp_path, GPTQ | {"group_size": 48}, parts)


def test_nothing_is_quantized(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json says GPTQ int4, groups of 32, and no tensor is"):
        opened(tmp_path, GPTQ, {"weight": weight()})
