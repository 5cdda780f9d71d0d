"""What a model may rely on beyond exact products (`tests/model/test_low_bit.py` has those)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pipo_ray.compiled.products as module
from pipo_ray.compiled.crew import run_on_threads
from pipo_ray.compiled.products import CompiledInt4
from pipo_ray.compiled.support import LAYOUT, obstacle
from pipo_ray.quant.codec import views_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import divide

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@pytest.mark.parametrize("name", ["int4-g32", "int4", "int4-g128"])
def test_a_row_comes_out_the_same_in_every_batch_and_on_any_number_of_threads(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    panels = divide(1000, 1024, LowBitFormat.parse(name), LAYOUT, 200_000)
    assert panels.num_panels > 2
    memory = torch.randint(0, 256, panels.shape, generator=generator, dtype=torch.uint8)
    for panel in memory:
        scales = views_of(panel, panels).scales
        scales.copy_(torch.randn(scales.shape, generator=generator) / 64)
    inputs = torch.randn(50, panels.columns, generator=generator).bfloat16()
    products, before = CompiledInt4(), torch.get_num_threads()
    alone = torch.cat([products.product(memory, panels, panels.rows, 1)(row[None]) for row in inputs])
    try:
        for num_threads, num_inputs in ((1, 50), (2, 2), (3, 3), (3, 4), (2, 5), (2, 33), (2, 50)):
            torch.set_num_threads(num_threads)
            product = products.product(memory, panels, panels.rows, num_inputs)
            assert torch.equal(product(inputs[:num_inputs]), alone[:num_inputs])
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_beside_the_output() -> None:
    panels = divide(64, 64, LowBitFormat.parse("int4"), LAYOUT)
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    views_of(memory[0], panels).scales.fill_(1.0)
    for num_rows in (1, 15, 16, 17, 63):
        output = CompiledInt4().product(memory, panels, num_rows, 3)(torch.ones(3, 64, dtype=torch.bfloat16))
        assert output.shape == (3, num_rows)
        assert output.eq(-7 * 64).all()  # (0 - 8) x 1 + 1


def test_values_that_are_no_numbers_stay_so() -> None:
    panels = divide(64, 64, LowBitFormat.parse("int4"), LAYOUT)
    memory = torch.zeros(panels.shape, dtype=torch.uint8)
    views_of(memory[0], panels).scales.fill_(1.0)
    inputs = torch.ones(2, 64, dtype=torch.bfloat16)
    inputs[0, 5] = float("nan")
    output = CompiledInt4().product(memory, panels, 64, 2)(inputs)
    assert output[0].isnan().all()
    assert output[1].eq(-7 * 64).all()


def test_threads_stay_awake_where_few_inputs_are_multiplied_with_weights_that_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    panels = divide(64, 64, LowBitFormat.parse("int4"), LAYOUT)
    memory = torch.full(panels.shape, 17, dtype=torch.uint8)
    seen: list[bool] = []

    def run(function: int, context: int, awake: bool, folder: Any) -> None:
        seen.append(awake)
        run_on_threads(function, context, awake, folder)

    monkeypatch.setattr(module, "run_on_threads", run)
    products = CompiledInt4()
    for num_inputs in (1, module.int4.MOST_INPUTS + 1):
        call = products.product(memory, panels, 64, num_inputs)
        for awake in (False, True, False):
            products.stay_awake(awake)
            call(torch.ones(num_inputs, 64, dtype=torch.bfloat16))
    assert seen == [False, True, False, False, False, False]
