"""Which KV pages live on the GPU and which in RAM. Pure functions; a page is `PAGE_TOKENS` tokens of one layer of one
sequence, keys and values together. Memory is counted in units: a layer's page takes as many of them as `units` says,
one where all layers are alike.

Layers are visited in the same order in every sweep. For such a cycle a fixed subset of layers that stay is best (least
recently used would evict exactly what comes next), and the others pass through what is left: one layer at work, one on
its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAGE_TOKENS = 64
"""Small beside a conversation (32 tokens of the last page are wasted on average), large beside a table entry: 256 KiB
in a layer of Llama-3-8B. It does not bound a transfer: neighbouring pages travel as one.
"""

_LAYERS_IN_FLIGHT = 2


@dataclass(frozen=True)
class KVPlacement:
    """Units of `unit_bytes` in each tier, of which a page of each layer takes so many `units`. Layers of few `bits`
    have packed pages; the windows before these are on the GPU, `window_bytes` for each of at most `max_sequences`.
    """

    units: tuple[int, ...]
    unit_bytes: int
    gpu_units: int
    ram_units: int
    bits: tuple[int, ...] | None = None
    window_bytes: int = 0
    max_sequences: int | None = None

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.units)

    @property
    def ram_bytes(self) -> int:
        """Of RAM."""
        return self.ram_units * self.unit_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that both tiers hold together, a multiple of `PAGE_TOKENS`."""
        return most_pages_per_layer(self.units, self.gpu_units, self.ram_units) * PAGE_TOKENS


def pages_of(num_tokens: int) -> int:
    """Pages that `num_tokens` tokens of one layer take."""
    return -(-num_tokens // PAGE_TOKENS)


def page_bytes(kv_bytes_per_token: int, num_layers: int) -> int:
    """Bytes of a page, given what a token takes in all layers. A token begins on a multiple of 16 bytes, as attention
    kernels want it.
    """
    row = -(-kv_bytes_per_token // num_layers)
    return PAGE_TOKENS * (-(-row // 16) * 16)


def sweep_pages(num_tokens: int, context_length: int) -> int:
    """Pages of one layer that sequences take which add up to `num_tokens` tokens and are as long as they can be: of
    each, part of a page is wasted.
    """
    return pages_of(num_tokens) + -(-num_tokens // context_length)


def in_flight_units(units: Sequence[int], pages_per_layer: int) -> int:
    """The least units on the GPU with which sequences of `pages_per_layer` pages in all can run."""
    return _LAYERS_IN_FLIGHT * max(units) * pages_per_layer


def resident_layers(units: Sequence[int], pages_per_layer: int, gpu_units: int) -> frozenset[int]:
    """The layers that stay on the GPU, all or as many as leave room for those in flight, spread over the sweep so that
    the link has work behind each of them.

    With fewer pages per layer the set only grows: no layer leaves the GPU for another one.
    """
    if sum(units) * pages_per_layer <= gpu_units:
        return frozenset(range(len(units)))
    left = gpu_units - in_flight_units(units, pages_per_layer)
    chosen: set[int] = set()
    for layer in spread_order(len(units)):
        left -= units[layer] * pages_per_layer
        if left < 0:
            break
        chosen.add(layer)
    return frozenset(chosen)


def passing_units(units: Sequence[int], pages_per_layer: int, gpu_units: int) -> int:
    """Units of the layers that do not stay, which are at home in RAM."""
    resident = resident_layers(units, pages_per_layer, gpu_units)
    return sum(count for layer, count in enumerate(units) if layer not in resident) * pages_per_layer


def fits(units: Sequence[int], pages_per_layer: int, gpu_units: int, ram_units: int) -> bool:
    """Whether sequences of `pages_per_layer` pages in all can be held."""
    passing = passing_units(units, pages_per_layer, gpu_units)
    return not passing or (in_flight_units(units, pages_per_layer) <= gpu_units and passing <= ram_units)


def most_pages_per_layer(units: Sequence[int], gpu_units: int, ram_units: int) -> int:
    """The most pages per layer of which every lower number fits, too."""
    count = gpu_units // sum(units)
    while fits(units, count + 1, gpu_units, ram_units):
        count += 1
    return count


def ram_units_for(units: Sequence[int], pages_per_layer: int, gpu_units: int) -> int:
    """Units in RAM with which everything up to `pages_per_layer` fits; that must be possible with `gpu_units`."""
    counts = range(gpu_units // sum(units) + 1, pages_per_layer + 1)
    return max((passing_units(units, count, gpu_units) for count in counts), default=0)


def spread_order(num_layers: int) -> list[int]:
    """Layers so that every beginning of the list is spread over the range: by their number's bits, reversed."""
    bits = max(1, (num_layers - 1).bit_length())
    order = (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits))
    return [layer for layer in order if layer < num_layers]
