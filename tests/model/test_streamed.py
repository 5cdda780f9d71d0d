"""Stand-ins for parameters that are never whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.streamed import FusedExperts, LookedUpTable, SplitMatrix, SplitProduct, Unbound

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.booleans())
def test_a_table_is_asked_for_the_row_of_each_id(ids: list[int], by_module: bool) -> None:
    table = torch.randn(10, 4)
    asked: list[list[int]] = []

    def answer(rows: torch.Tensor) -> torch.Tensor:
        asked.append(rows.tolist())
        return table[rows]

    stand_in = LookedUpTable.make((10, 4), torch.float32, CPU, answer)
    wanted = torch.tensor([ids])
    if by_module:
        module = torch.nn.Embedding(10, 4, padding_idx=0, device="meta")
        module._parameters["weight"] = stand_in
        got = module(wanted)
    else:
        got = F.embedding(input=wanted, weight=stand_in)
    assert torch.equal(got, F.embedding(wanted, table))
    assert asked == [ids]


@given(st.integers(1, 20), st.data(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_split_matrix_is_linear(rows: int, data: st.DataObject, with_bias: bool, dtype: torch.dtype) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=4)) | {rows})
    weight, bias = torch.randn(rows, 6, dtype=dtype), torch.randn(rows, dtype=dtype) if with_bias else None

    def answer(product: SplitProduct | None) -> Iterator[tuple[int, int, torch.Tensor]]:
        for start, stop in zip([0, *cuts], cuts, strict=False):
            yield start, stop, weight[start:stop].clone()

    module = torch.nn.Linear(6, rows, bias=with_bias, device="meta", dtype=dtype)
    module._parameters["weight"] = SplitMatrix.make((rows, 6), dtype, CPU, answer)
    module._parameters["bias"] = bias
    inputs = torch.randn(2, 3, 6, dtype=dtype)
    got = module(inputs)
    assert got.dtype == dtype
    torch.testing.assert_close(got, F.linear(inputs, weight, bias))


def test_experts_are_asked_for_one_by_one() -> None:
    experts = torch.randn(4, 3, 2)
    stand_in = FusedExperts.make((4, 3, 2), torch.float32, CPU, lambda expert: experts[expert])
    assert torch.equal(stand_in[2], experts[2])
    assert torch.equal(stand_in[torch.tensor(3)], experts[3])


KINDS = [LookedUpTable, SplitMatrix, FusedExperts, Unbound]
USES: dict[str, Callable[[torch.Tensor], object]] = {
    "linear": lambda stand_in: F.linear(torch.randn(3, 4), stand_in, torch.zeros(5)),
    "matmul": lambda stand_in: torch.randn(3, 5) @ stand_in,
    "transpose": lambda stand_in: torch.randn(3, 4) @ stand_in.T,
    "addmm": lambda stand_in: torch.addmm(torch.zeros(4), torch.randn(3, 5), stand_in),
    "einsum": lambda stand_in: torch.einsum("ij,kj->ik", torch.randn(3, 4), stand_in),
    "embedding": lambda stand_in: F.embedding(torch.tensor([1]), stand_in),
    "slice": lambda stand_in: stand_in[1:3],
    "multiply": lambda stand_in: stand_in * 2,
    "add": lambda stand_in: torch.randn(5, 4) + stand_in,
    "in place": lambda stand_in: torch.randn(5, 4).add_(stand_in),
    "sum": lambda stand_in: stand_in.sum(),
    "view": lambda stand_in: stand_in.view(-1),
    "cast": lambda stand_in: stand_in.float(),
    "list": lambda stand_in: stand_in.tolist(),
}
MADE_FOR = {(LookedUpTable, "embedding"), (SplitMatrix, "linear")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_claims_to_be_what_it_stands_for(kind: type[LookedUpTable]) -> None:
    stand_in = kind.make((5, 4), torch.bfloat16, torch.device("cuda", 1), lambda: None)
    assert stand_in.shape == stand_in.size() == (5, 4)
    assert (stand_in.dtype, stand_in.ndim, stand_in.dim(), stand_in.numel()) == (torch.bfloat16, 2, 2, 20)
    assert stand_in.device == torch.device("cuda", 1)
    assert stand_in.is_floating_point()
    assert not stand_in.requires_grad
    assert len(stand_in) == 5
    assert kind.__name__ in repr(stand_in)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_there_cannot_be_used(kind: type[LookedUpTable], use: str) -> None:
    """Torch alone answers a product of a CPU tensor and a meta tensor with garbage."""
    if (kind, use) in MADE_FOR:
        return
    stand_in = kind.make((5, 4), torch.float32, CPU, lambda *_: pytest.fail("asked"))
    with pytest.raises(UnsupportedModelError, match="this architecture cannot be streamed"):
        USES[use](stand_in)
