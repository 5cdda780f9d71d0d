"""A peak with replayed layers is the peak without; only those that compute the same are replayed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from pipo_ray.model.layer_replay import layer_kinds, replayed_layers
from pipo_ray.model.live_bytes import LiveBytes

WIDTH, ROWS = 8, 100
RAN: list[int] = []
KEPT: list[torch.Tensor] = []


class Layer(nn.Module):
    """`times` as wide within as without."""

    def __init__(self, times: int, layer_idx: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, times * WIDTH), nn.Linear(times * WIDTH, WIDTH)
        self.layer_idx = layer_idx
        self.activation = partial(nn.functional.gelu, approximate="tanh")

    def forward(self, inputs: torch.Tensor, _: Any = None) -> Any:
        RAN.append(self.layer_idx)
        return self.result(self.down(self.activation(self.up(inputs))), inputs)

    def result(self, made: torch.Tensor, inputs: torch.Tensor) -> Any:
        return made


class Tuple(Layer):
    def result(self, made: torch.Tensor, inputs: torch.Tensor) -> Any:
        return made, torch.empty_like(made)


class GivesNothing(Layer):
    def result(self, made: torch.Tensor, inputs: torch.Tensor) -> Any:
        return ()


class Keeps(Layer):
    def result(self, made: torch.Tensor, inputs: torch.Tensor) -> Any:
        KEPT.append(torch.empty_like(made))
        return made


class GivesBackItsInputs(Layer):
    def result(self, made: torch.Tensor, inputs: torch.Tensor) -> Any:
        return made, inputs


class GivesView(Layer):
    def result(self, made: torch.Tensor, inputs: torch.Tensor) -> Any:
        return made.expand(2, *made.shape)[0], torch.empty(2, *made.shape, device="meta")[1]


KINDS = [Layer, Tuple, GivesNothing, Keeps, GivesBackItsInputs, GivesView]


class Model(nn.Module):
    """Layers one after the other; `keeps` all that they give until the end."""

    def __init__(self, layers: Sequence[tuple[type[Layer], int]], keeps: bool = False, **options: Any) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=len(layers), **options)
        self.layers = nn.ModuleList(kind(times, number) for number, (kind, times) in enumerate(layers))
        self.keeps = keeps

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        kept = []
        for layer in self.layers:
            result = layer(inputs)
            inputs = (*result, inputs)[0] if isinstance(result, tuple) else result
            if self.keeps:
                kept.append(result)
        return inputs


def made(layers: Sequence[tuple[type[Layer], int]], **options: Any) -> Any:
    with torch.device("meta"):
        return Model(layers, **options)


def peak_of(model: Any, replays: bool, inputs: torch.Tensor | None = None) -> int:
    """Bytes; RAN has the layers that computed."""
    RAN.clear()
    with torch.no_grad(), LiveBytes() as live:
        if replays:
            with replayed_layers(layer_kinds(model), live):
                model(torch.empty(ROWS, WIDTH, device="meta") if inputs is None else inputs)
        else:
            model(torch.empty(ROWS, WIDTH, device="meta") if inputs is None else inputs)
    KEPT.clear()
    return live.peak


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3)), min_size=1, max_size=9), st.booleans())
def test_the_peak_is_that_of_all_layers(layers: list[tuple[type[Layer], int]], keeps: bool) -> None:
    model = made(layers, keeps=keeps)
    assert peak_of(model, replays=True) == peak_of(model, replays=False)
    assert len(RAN) == len(layers)  # nothing is left behind


def test_of_each_kind_one_layer_computes() -> None:
    model = made([(Layer, 2), (Layer, 3), (Tuple, 2)] * 3)
    peak_of(model, replays=True)
    assert RAN == [0, 1, 2]


@pytest.mark.parametrize("kind", [Keeps, GivesBackItsInputs, GivesView])
def test_what_leaves_more_or_less_than_new_tensors_is_never_replayed(kind: type[Layer]) -> None:
    peak_of(made([(kind, 2)] * 3), replays=True)
    assert RAN == [0, 1, 2]


def test_nor_is_what_the_configuration_tells_apart() -> None:
    peak_of(made([(Layer, 2)] * 4, layer_types=["full_attention", "sliding_attention"] * 2), replays=True)
    assert RAN == [0, 1]


def test_nor_where_inputs_have_numbers() -> None:
    model = made([(Layer, 2)] * 3)
    for layer in model.layers:
        layer.to_empty(device="cpu")
    peak_of(model, replays=True, inputs=torch.zeros(ROWS, WIDTH))
    assert RAN == [0, 1, 2]


def test_layers_compute_again_when_a_run_has_failed() -> None:
    model = made([(Layer, 2), (Layer, 2)])
    with pytest.raises(RuntimeError), torch.no_grad(), LiveBytes() as live, replayed_layers(layer_kinds(model), live):
        model(torch.empty(ROWS, WIDTH + 1, device="meta"))
    peak_of(model, replays=False)
    assert RAN == [0, 1]
