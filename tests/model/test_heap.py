"""What the heap keeps of a sweep's activations: between two layers, not more than the sweep's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pipo_ray.model.heap import LEAST_BYTES, Heap, outermost_layers

MIB = 1 << 20

# Layers that have up to 36 MiB of tensors at a time, of many sizes, and keep half a MiB of small ones each.
HOLES = """
import random
import sys
import torch
from torch import nn
from pipo_ray.model.heap import Heap, anonymous_bytes

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, inputs):
        live = []
        for _ in range(24):
            size = int(2 ** choice.uniform(18, 24))
            while sum(map(len, live)) + size > 36 << 20:
                live.pop(choice.randrange(len(live)))
            live.append(torch.ones(size, dtype=torch.uint8))
            self.kept.append(torch.ones(int(2 ** choice.uniform(12, 16)), dtype=torch.uint8))
        most.append(anonymous_bytes())
        return inputs

choice, most = random.Random(1), []
model = nn.Sequential(nn.ModuleList(Layer() for _ in range(40)))
least = anonymous_bytes()
heap = Heap(model, 1 << 20)
with heap.watched(48 if sys.argv[1] == "watched" else 1):
    for layer in model[0]:
        layer(torch.ones(1))
print((max(most) - least) >> 20)
"""


def growth(how: str) -> int:
    """MiB by which a process grew at most that has 36 MiB of tensors in use at a time and keeps 19."""
    # As in a compute worker that has freed something large: all that follows comes from the heap.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(64 * MIB)}
    done = subprocess.run(
        [sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True, env=os.environ | settings
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library cannot give memory back")
def test_holes_between_what_stays_are_given_back() -> None:
    alone, watched = growth("alone"), growth("watched")
    print(f"grew by {alone} MiB, watched by {watched}")
    assert watched < 48 + 36 + 19 + 20 < alone


class Layers:
    """A model of three layers, and a process whose size is told."""

    def __init__(self, token_bytes: int) -> None:
        self.model = nn.Sequential(nn.Embedding(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
        self.size, self.trims = 100 * MIB, 0
        self.heap = Heap(self.model, token_bytes, lambda: self.size, self.trim)

    def trim(self) -> None:
        self.trims += 1
        self.size = 110 * MIB

    def sweep(self, num_tokens: int, sizes: tuple[int, int, int]) -> int:
        """The process has so many MiB when each of the layers begins. How often was trimmed?"""
        before = self.trims
        with self.heap.watched(num_tokens):
            for layer, size in zip(self.model[1], sizes, strict=True):  # type: ignore[call-overload]
                self.size = size * MIB
                layer(torch.zeros(1, 4))
        return self.trims - before


def test_it_is_trimmed_where_it_has_grown_by_more_than_the_sweeps_activations() -> None:
    layers = Layers(MIB)
    assert layers.sweep(20, (100, 119, 120)) == 0
    assert layers.sweep(20, (100, 121, 125)) == 1
    assert layers.sweep(20, (129, 130, 130)) == 0  # 110 were left
    assert layers.sweep(20, (131, 130, 131)) == 2
    assert layers.sweep(20, (90, 110, 100)) == 0
    assert layers.sweep(20, (111, 100, 100)) == 1  # 90 were enough


def test_a_sweep_with_few_activations_is_left_alone() -> None:
    layers = Layers(MIB)
    few = LEAST_BYTES // MIB - 1
    assert layers.sweep(few, (100, 500, 500)) == 0
    assert layers.sweep(few + 1, (100, 500, 110)) == 1


def test_no_hook_stays() -> None:
    layers = Layers(MIB)
    with layers.heap.watched(100):
        assert all(layer._forward_pre_hooks for layer in outermost_layers(layers.model))
    assert not any(module._forward_pre_hooks for module in layers.model.modules())
    with pytest.raises(IndexError), layers.heap.watched(100):
        layers.model[0](torch.tensor([4]))
    assert not any(module._forward_pre_hooks for module in layers.model.modules())


def test_layers_are_the_outermost_lists() -> None:
    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    layers = [nn.Sequential(nn.Linear(2, 2), experts) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(2, 2), nn.Sequential(nn.ModuleList(layers)), nn.Linear(2, 2))
    assert outermost_layers(model) == layers
