"""What a model may rely on beyond exact products (`tests/model/test_low_bit.py` has those of small weights)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_bit_weights import RandomWeight

import pipo_ray.compiled.int8_products as module
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.int8_products import CompiledInt8
from pipo_ray.compiled.support import LAYOUT, obstacle
from pipo_ray.quant.codec import views_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import divide

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

INT8 = LowBitFormat.parse("int8")


@pytest.fixture(params=[False, True], ids=["rows", "blocks"])
def blocks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("columns, num_inputs", [(2048, 7), (2064, 520), (4112, 3), (16, 1030)])
def test_more_columns_and_inputs_than_are_taken_at_once(columns: int, num_inputs: int, blocks: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = RandomWeight.make("int8", LAYOUT, 130, columns, 300_000, generator)
    inputs = torch.randn(num_inputs, columns, generator=generator).bfloat16()
    got = CompiledInt8().product(weight.memory, weight.panels, 130, num_inputs, blocks=blocks)(inputs)
    weight.require_product(got, inputs, rounded=False, step=2.0**-8)


def test_every_code_is_taken_exactly(blocks: bool) -> None:
    panels = divide(64, 256, INT8, LAYOUT)
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    views = views_of(memory[0], panels)
    views.scales.fill_(0.5)
    views.codes[:] = torch.arange(-128, 128, dtype=torch.int8)
    products = CompiledInt8()
    for value in (1.0, 2.0**120, -(2.0**-120)):
        inputs = torch.eye(256, dtype=torch.bfloat16) * value
        output = products.product(memory, panels, 64, 256, blocks=blocks)(inputs)
        assert torch.equal(output, (torch.arange(-128.0, 128.0) * (value / 2)).bfloat16()[:, None].expand(256, 64))


def test_a_row_comes_out_the_same_in_every_batch_and_on_any_number_of_threads(blocks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = RandomWeight.make("int8", LAYOUT, 1000, 2080, 200_000, generator)
    assert weight.panels.num_panels > 2
    inputs = torch.randn(50, 2080, generator=generator).bfloat16()
    products, before = CompiledInt8(), torch.get_num_threads()
    alone = torch.cat(
        [products.product(weight.memory, weight.panels, 1000, 1, blocks=blocks)(row[None]) for row in inputs]
    )
    try:
        for num_threads, num_inputs in ((1, 50), (2, 2), (3, 3), (3, 4), (2, 5), (2, 33), (2, 50)):
            torch.set_num_threads(num_threads)
            product = products.product(weight.memory, weight.panels, 1000, num_inputs, blocks=blocks)
            assert torch.equal(product(inputs[:num_inputs]), alone[:num_inputs])
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_beside_the_output(blocks: bool) -> None:
    panels = divide(64, 64, INT8, LAYOUT)
    memory = torch.ones(panels.shape, dtype=torch.uint8)
    views_of(memory[0], panels).scales.fill_(2.0)
    products = CompiledInt8()
    for num_rows in (1, 15, 16, 17, 63):
        output = products.product(memory, panels, num_rows, 3, blocks=blocks)(torch.ones(3, 64, dtype=torch.bfloat16))
        assert output.shape == (3, num_rows)
        assert output.eq(128).all()


def test_values_that_are_no_numbers_stay_so(blocks: bool) -> None:
    panels = divide(64, 64, INT8, LAYOUT)
    memory = torch.ones(panels.shape, dtype=torch.uint8)
    views_of(memory[0], panels).scales.fill_(1.0)
    inputs = torch.ones(2, 64, dtype=torch.bfloat16)
    inputs[0, 5] = float("nan")
    output = CompiledInt8().product(memory, panels, 64, 2, blocks=blocks)(inputs)
    assert output[0].isnan().all()
    assert output[1].eq(64).all()


def test_threads_stay_awake_where_few_inputs_are_multiplied_with_weights_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    panels = divide(64, 64, INT8, LAYOUT)
    memory = torch.ones(panels.shape, dtype=torch.uint8)
    seen: list[bool] = []

    def run(function: int, context: int, awake: bool, folder: Any) -> None:
        seen.append(awake)
        run_on_threads(function, context, awake, folder)

    monkeypatch.setattr(module, "run_on_threads", run)
    products = CompiledInt8()
    for num_inputs, blocks in ((1, False), (module.int8_rows.MOST_INPUTS + 1, False), (1, True)):
        call = products.product(memory, panels, 64, num_inputs, blocks=blocks)
        for awake in (True, False):
            products.stay_awake(awake)
            call(torch.ones(num_inputs, 64, dtype=torch.bfloat16))
    assert seen == [True, False, False, False, False, False]
