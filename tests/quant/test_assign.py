from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipo_ray.errors import InputError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.assign import assign
from pipo_ray.quant.policy import Precision, Rule


def block(*tensors: TensorSpec) -> tuple[BlockSpec, ...]:
    return (BlockSpec("layers.0.mlp", "mlp", 0, tensors),)


LINEAR = TensorSpec("up.weight", (100, 128), "BF16", cut="rows")
OTHERS = {
    "norm.weight": TensorSpec("norm.weight", (128,), "BF16"),
    "embed.weight": TensorSpec("embed.weight", (100, 128), "BF16", cut="rows"),
    "conv.weight": TensorSpec("conv.weight", (100, 128), "BF16"),
    "expert.weight": TensorSpec("expert.weight", (100, 128), "BF16", expert=1),
    "router.weight": TensorSpec("router.weight", (100, 128), "F32", cut="rows"),
    "odd.weight": TensorSpec("odd.weight", (100, 120), "BF16", cut="rows"),
}
REASONS = {
    "norm.weight": r"shape \[128\]",
    "embed.weight": "table of embeddings",
    "conv.weight": "other than nn.Linear",
    "expert.weight": "fused experts",
    "router.weight": "keeps it in F32",
    "odd.weight": "groups of 64 need a multiple of 64 columns, it has 120",
}


def of(*rules: tuple[str, str]) -> Precision:
    return Precision(tuple(Rule(*rule) for rule in rules))


@pytest.mark.parametrize("name", OTHERS)
def test_only_matrices_of_linear_modules_are_quantized(name: str) -> None:
    (got,) = assign(block(LINEAR, OTHERS[name]), Precision.parse("int4"), looked_up={"embed.weight"}, layout="avx512")
    packed, kept = got.tensors
    assert kept == OTHERS[name]
    assert packed.panels is not None
    assert (packed.dtype, packed.shape) == ("U8", packed.panels.shape)
    assert (packed.panels.rows, packed.panels.columns) == LINEAR.shape
    with pytest.raises(InputError, match=f"{name} cannot be int4-g64: .*{REASONS[name]}"):
        assign(
            block(LINEAR, OTHERS[name]), of((name, "int4"), ("*", "int4")),
            looked_up={"embed.weight"}, layout="avx512",
        )  # fmt: skip
    with pytest.raises(InputError, match=f"no tensor can be quantized .*{REASONS[name]}"):
        assign(block(OTHERS[name]), Precision.parse("int4"), looked_up={"embed.weight"}, layout="avx512")


def test_experts_that_are_multiplied_one_by_one_are_quantized() -> None:
    experts = block(OTHERS["expert.weight"])
    (got,) = assign(experts, Precision.parse("int8"), looked_up=(), layout="avx512", linear_experts=True)
    (tensor,) = got.tensors
    assert tensor.panels is not None
    assert (tensor.expert, tensor.cut, tensor.dtype, tensor.shape) == (1, "none", "U8", tensor.panels.shape)


def test_nothing_is_touched_at_16_bits() -> None:
    blocks = block(LINEAR, *OTHERS.values())
    assert assign(blocks, Precision(), looked_up=(), layout="avx512") == blocks


def test_a_rule_for_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r'rule \["down.*", "int4"\] matches no tensor'):
        assign(block(LINEAR), of(("down.*", "int4"), ("*", "int8")), looked_up=(), layout="avx512")


def with_columns(name: str, columns: int) -> TensorSpec:
    return TensorSpec(name, (100, columns), "BF16", cut="rows")


@pytest.mark.parametrize(
    "columns, asked, fitting",
    [
        (192, "int4-g128", "int4-g64 or int4-g32 or int8"),
        (192, "int4-g128-sym", "int4-g64-sym or int4-g32-sym or int8"),
        (96, "int4", "int4-g32 or int8"),
        (16, "int4-g32", "int8"),
        (24, "int8", None),
    ],
)
def test_what_fits_is_named(columns: int, asked: str, fitting: str | None) -> None:
    """The policy's file, the rule, and what to write instead; 16 bits where nothing else divides the columns."""
    weight = with_columns("a.down.weight", columns)
    policy = replace(of(("*.down.*", asked), ("*", "int4")), file=Path("mine.json"))
    with pytest.raises(InputError) as raised:
        assign(block(with_columns("up.weight", 128), weight), policy, looked_up=(), layout="avx512")
    instead = f"write {fitting} in this rule, or " if fitting else ""
    assert str(raised.value).startswith(
        f'precision policy mine.json: rule ["*.down.*", "{asked}"]: a.down.weight cannot'
    )
    assert str(raised.value).endswith(f'; {instead}put ["a.down.weight", "16bit"] in front of it')
    with pytest.raises(InputError) as raised:
        assign(block(weight), Precision.parse(asked), looked_up=(), layout="avx512")
    assert "no tensor can be quantized (a.down.weight: " in str(raised.value)
    assert str(raised.value).endswith(f"; use --precision {fitting or '16bit'}")


def test_what_fits_is_what_fits_most() -> None:
    weights = [with_columns("a.weight", 32), with_columns("b.weight", 64), with_columns("c.weight", 64)]
    with pytest.raises(InputError, match=r"; use --precision int4-g32 or int8$"):
        assign(block(*weights), Precision.parse("int4-g128"), looked_up=(), layout="avx512")
    with pytest.raises(InputError, match=r"; use --precision int4-g64 or int4-g32 or int8$"):
        assign(block(*weights[1:]), Precision.parse("int4-g128"), looked_up=(), layout="avx512")


def test_formats_by_rule() -> None:
    (got,) = assign(
        block(LINEAR, OTHERS["odd.weight"]), of(("up.*", "int8"), ("*", "int4")), looked_up=(), layout="avx2"
    )
    assert [t.panels and (t.panels.format, t.panels.layout) for t in got.tensors] == [("int8", "rows"), None]
