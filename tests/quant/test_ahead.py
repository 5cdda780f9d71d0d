"""Panels that are made before the model is known are those that packing wants, or are not used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipo_ray.compiled.quantizer import CompiledRounding
from pipo_ray.quant import ahead as ahead_module
from pipo_ray.quant.ahead import PanelsAhead, guessed_panels, read_ahead_bytes
from pipo_ray.quant.codec import views_of, write_rows
from pipo_ray.quant.panels import Panels
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.rounding import round_to_nearest
from pipo_ray.store.checkpoint import Checkpoint

pytest.importorskip("llvmlite")

INT4 = Precision.parse("int4-g32")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 11}
    return tiny_checkpoint("LlamaConfig", dtype="bfloat16", **sizes)


@pytest.fixture
def checkpoint(folder: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(folder) as opened:
        yield opened


def panel_of(checkpoint: Checkpoint, name: str, panels: Panels) -> torch.Tensor:
    weight = torch.from_numpy(checkpoint.read(name, 0, checkpoint.tensors[name].nbytes)).view(torch.bfloat16)
    panel = torch.zeros(panels.panel_bytes, dtype=torch.uint8)
    rounded = round_to_nearest(weight.view(panels.rows, panels.columns).float(), panels.low_bit)
    write_rows(views_of(panel, panels), panels, 0, rounded)
    return panel


def test_the_guess_is_the_layers_matrices_in_their_order(checkpoint: Checkpoint) -> None:
    guesses = guessed_panels(checkpoint, INT4, "avx2")
    layers = [int(name.split(".")[2]) for name in guesses]
    assert layers == sorted(layers)
    assert len(guesses) == 11 * 7
    assert not any("norm" in name or "embed" in name for name in guesses)
    assert guessed_panels(checkpoint, Precision(), "avx2") == {}


def test_panels_are_those_that_packing_makes(checkpoint: Checkpoint) -> None:
    guesses = guessed_panels(checkpoint, INT4, "avx512")
    interval = sys.getswitchinterval()
    with PanelsAhead(checkpoint, guesses, CompiledRounding(), 1 << 30) as ahead:
        finished(ahead)
        for name, panels in guesses.items():
            panel = ahead.take(name, panels, 0)
            assert (panel is not None) == (panels.rows >= 64)  # others fill no block
            if panel is not None:
                assert torch.equal(torch.from_numpy(panel), panel_of(checkpoint, name, panels))
                assert ahead.take(name, panels, 0) is None
        ahead.settle(guesses)
        assert sys.getswitchinterval() == interval


def finished(ahead: PanelsAhead) -> PanelsAhead:
    """When it has made all that it may for now."""

    def rests() -> bool:
        works = ahead._todo and ahead._has_room()
        return not works and all(memory is not None for memory in ahead._panels.values())

    with ahead._changed:
        assert ahead._changed.wait_for(rests, 20)
    return ahead


def join(ahead: PanelsAhead) -> None:
    for thread in ahead._threads:
        thread.join(20)
        assert not thread.is_alive()


def test_only_what_the_model_wants_is_kept(checkpoint: Checkpoint) -> None:
    guesses = guessed_panels(checkpoint, INT4, "avx512")
    with PanelsAhead(checkpoint, guesses, CompiledRounding(), 1 << 30) as ahead:
        finished(ahead).settle({UP: guesses[UP], "model.layers.2.mlp.up_proj.weight": replace(guesses[UP], rows=3)})
        assert set(ahead._panels) == {(UP, 0)}
        assert ahead.take(UP, replace(guesses[UP], layout="avx2"), 0) is None
        assert ahead.take(UP, guesses[UP], 0) is not None


def test_memory_is_bounded(checkpoint: Checkpoint) -> None:
    guesses = guessed_panels(checkpoint, INT4, "avx512")
    limit = 3 * max(panels.panel_bytes for panels in guesses.values())
    with PanelsAhead(checkpoint, guesses, CompiledRounding(), limit) as ahead:
        made = sum(panel.nbytes for panel in finished(ahead)._panels.values() if panel is not None)
        assert limit / 2 < made <= limit
    assert not ahead._panels


def test_it_goes_on_as_panels_are_taken_until_packing_has_caught_up(checkpoint: Checkpoint) -> None:
    guesses = guessed_panels(checkpoint, INT4, "avx512")
    limit = 3 * max(panels.panel_bytes for panels in guesses.values())
    whole = [name for name, panels in guesses.items() if panels.rows >= 64]  # others fill no block
    with PanelsAhead(checkpoint, guesses, CompiledRounding(), limit) as ahead:
        finished(ahead).settle(guesses)
        for name in whole[:20]:
            panel = ahead.take(name, guesses[name], 0)
            assert panel is not None
            assert torch.equal(torch.from_numpy(panel), panel_of(checkpoint, name, guesses[name]))
            finished(ahead)
            assert sum(one.nbytes for one in ahead._panels.values() if one is not None) <= limit
        assert all(thread.is_alive() for thread in ahead._threads)
        assert ahead.take(whole[-1], guesses[whole[-1]], 0) is None  # not begun
        join(ahead)
        made = {name for name, _ in ahead._panels}
        assert made
        for name in made:
            assert ahead.take(name, guesses[name], 0) is not None


def test_a_tensor_that_the_model_does_not_want_is_not_made_any_more(checkpoint: Checkpoint) -> None:
    guesses = guessed_panels(checkpoint, INT4, "avx512")
    limit = 2 * max(panels.panel_bytes for panels in guesses.values())
    with PanelsAhead(checkpoint, guesses, CompiledRounding(), limit) as ahead:
        finished(ahead).settle({UP: guesses[UP]})
        join(ahead)  # the last of them is made
        assert set(ahead._panels) == {(UP, 0)}
        assert ahead._left == limit - guesses[UP].panel_bytes


def test_what_cannot_be_rounded_is_left_to_packing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        guesses = guessed_panels(checkpoint, INT4, "avx512")
        with PanelsAhead(checkpoint, guesses, CompiledRounding(), 1 << 30) as ahead:
            assert (UP, 0) not in finished(ahead)._panels
            assert ahead.take(UP, guesses[UP], 0) is None
            # Nor are the 32 rows of keys and values, which fill no block.
            assert len(ahead._panels) == sum(panels.rows >= 64 for panels in guesses.values()) - 1


def test_an_eighth_of_the_memory_and_one_gibibyte_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, wanted in ((800 << 20, 100 << 20), (64 << 30, 1 << 30)):
        monkeypatch.setattr(ahead_module, "available_memory", lambda available=available: available)
        assert read_ahead_bytes() == wanted
