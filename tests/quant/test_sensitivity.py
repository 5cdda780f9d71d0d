from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.assign import assign
from pipo_ray.quant.knapsack import Option
from pipo_ray.quant.patterns import rules_for
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.sensitivity import FORMATS, Candidate, Candidates, Sensitivity, find_candidates
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.layout import plan_files


def linear(name: str, rows: int, columns: int) -> TensorSpec:
    return TensorSpec(name, (rows, columns), "BF16", cut="rows")


BLOCKS = (
    BlockSpec("embedding.embed.weight", "embedding", None, (TensorSpec("embed.weight", (999, 128), "BF16"),)),
    BlockSpec(
        "layers.0.attention", "attention", 0,
        (TensorSpec("norm.weight", (128,), "BF16"), linear("q.weight", 100, 128), linear("o.weight", 128, 96)),
    ),
    *(
        BlockSpec(f"layers.0.expert.{e}", "expert", 0, (TensorSpec("up.weight", (64, 128), "BF16", expert=e),))
        for e in range(3)
    ),
    BlockSpec("head", "head", None, (TensorSpec("router.weight", (8, 128), "F32", cut="rows"),)),
)  # fmt: skip


def candidates(*, linear_experts: bool = True) -> Candidates:
    return find_candidates(BLOCKS, {"embed.weight"}, "avx512", linear_experts=linear_experts)


def test_what_can_be_quantized_and_how() -> None:
    found = candidates()
    assert {block: [one.name for one in some] for block, some in found.blocks.items()} == {
        "layers.0.attention": ["q.weight", "o.weight"],
        "layers.0.experts": ["up.weight"],
    }
    q, o, up = found.weights
    assert list(q.sizes) == [*FORMATS, "16bit"]
    assert (q.coarsest, o.coarsest) == ("int4-g128", "int4-g32")  # 96 columns are three groups of 32
    assert up.sizes["16bit"] == 3 * 64 * 128 * 2
    assert found.others == ("embed.weight", "router.weight")
    assert [one.name for one in candidates(linear_experts=False).weights] == ["q.weight", "o.weight"]


@pytest.mark.parametrize("formats", [("int4-g64", "int8", "int4-g32"), ("16bit", "16bit", "int4-g128")])
def test_sizes_are_those_of_the_store(formats: tuple[str, ...]) -> None:
    """What is chosen is at most as large in a store as was said; the table of embeddings is not counted."""
    found = candidates()
    chosen = dict(zip((one.name for one in found.weights), formats, strict=True))
    policy = Precision(rules_for(chosen, found.others))
    blocks = assign(BLOCKS, policy, looked_up={"embed.weight"}, layout="avx512", linear_experts=True)
    tensors = {tensor.name: 0 for block in blocks for tensor in block.tensors}
    for block in blocks:
        for tensor in block.tensors:
            tensors[tensor.name] += num_bytes(tensor.dtype, tensor.shape)
    assert {one.name: one.sizes[chosen[one.name]] for one in found.weights} == {name: tensors[name] for name in chosen}
    stored = sum(block.nbytes for file in plan_files(blocks[1:]) for block in file.blocks)
    said = found.fixed_bytes + sum(tensors[name] for name in chosen)
    assert stored <= said <= stored + 4096 * len(BLOCKS)


def test_a_block_s_loss_is_divided_by_relative_errors() -> None:
    sizes = {"int4-g64": 1, "int8": 2, "16bit": 4}
    found = Candidates((Candidate("a", "x", sizes), Candidate("b", "x", sizes), Candidate("c", "y", sizes)), (), 0)
    known = Sensitivity(
        1024,
        {"a": {"int4-g64": 0.03, "int8": 0.003}, "b": {"int4-g64": 0.01, "int8": 0.002}, "c": {"int4-g64": 0.0}},
        {"x": 0.4, "y": 0.0},
    )
    a, b, c = known.items(found)
    assert a.options == (
        Option("int4-g64", 1, pytest.approx(0.3)),
        Option("int8", 2, pytest.approx(0.03)),
        Option("16bit", 4, 0),
    )
    assert [option.loss for option in b.options] == pytest.approx([0.1, 0.02, 0.0])
    assert [option.loss for option in c.options] == [0, 0, 0]  # nothing of the text reaches it


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "measured.json"
    assert Sensitivity.load(file, 7) == Sensitivity(7)
    part = Sensitivity(7, {"a": {"int8": 0.5}}, {"x": 0.25})
    part.save(file)
    assert Sensitivity.load(file, 7) == part
    assert Sensitivity.load(file, 8) == Sensitivity(8)  # of another text
    for text in ("", "[]", '{"tokens": 7, "errors": [], "divergences": {}}', '{"tokens": 7}'):
        file.write_text(text)
        assert Sensitivity.load(file, 7) == Sensitivity(7)
