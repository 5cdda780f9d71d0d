"""Placing tensors in files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.store.layout import plan_files

SHAPES = st.lists(st.lists(st.lists(st.integers(0, 40), max_size=2), max_size=4), min_size=1, max_size=8)


def blocks_of(shapes: list[list[list[int]]]) -> list[BlockSpec]:
    return [
        BlockSpec(
            f"block {b}",
            "layer",
            b,
            tuple(TensorSpec(f"tensor {b} {t}", tuple(shape), "BF16") for t, shape in enumerate(tensors)),
        )
        for b, tensors in enumerate(shapes)
    ]


@given(shapes=SHAPES, file_bytes=st.integers(1, 40_000))
def test_blocks_are_contiguous_aligned_and_never_straddle_files(shapes: list[list[list[int]]], file_bytes: int) -> None:
    blocks = blocks_of(shapes)
    files = plan_files(blocks, file_bytes)
    assert [block.name for file in files for block in file.blocks] == [block.name for block in blocks]
    for file in files:
        end = len(file.header)
        assert end % 4096 == 0
        for block in file.blocks:
            assert block.offset == end
            assert block.nbytes % 4096 == 0
            position = block.offset
            for tensor in block.tensors:
                assert tensor.offset % 64 == 0
                assert 0 <= tensor.offset - position < 64
                position = tensor.offset + tensor.nbytes
            end += block.nbytes
        assert file.size == end
        assert file.size - len(file.header) <= file_bytes or len(file.blocks) == 1
        header = json.loads(file.header[8:])
        spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
        assert [a[1] for a in spans[:-1]] == [b[0] for b in spans[1:]]
        assert not spans or (spans[0][0], spans[-1][1]) == (0, file.size - len(file.header))


def test_doubles_and_nothing_are_refused() -> None:
    block = BlockSpec("a", "layer", 0, (TensorSpec("x", (2,), "F32"),))
    with pytest.raises(ValueError, match="block a comes twice"):
        plan_files([block, block])
    with pytest.raises(ValueError, match="x comes twice"):
        plan_files([block, BlockSpec("b", "layer", 0, block.tensors)])
    with pytest.raises(ValueError, match="no block"):
        plan_files([])


def test_experts_of_one_tensor_are_different_tensors() -> None:
    experts = tuple(TensorSpec("x", (2,), "F32", expert) for expert in range(3))
    (file,) = plan_files([BlockSpec("a", "expert", 0, experts)])
    assert [tensor.key for tensor in file.blocks[0].tensors] == ["x.expert.0", "x.expert.1", "x.expert.2"]
