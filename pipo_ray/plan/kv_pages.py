"""Which KV pages live on the GPU and which in RAM. Pure functions; a page is `PAGE_TOKENS` tokens of one layer of one
sequence, keys and values together.

Layers are visited in the same order in every sweep. For such a cycle a fixed subset of layers that stay is best (least
recently used would evict exactly what comes next), and the others pass through what is left: one layer at work, one on
its way.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_TOKENS = 64
"""Small beside a conversation (32 tokens of the last page are wasted on average), large beside a table entry: 256 KiB
in a layer of Llama-3-8B. It does not bound a transfer: neighbouring pages travel as one.
"""

_LAYERS_IN_FLIGHT = 2


@dataclass(frozen=True)
class KVPlacement:
    """Pages of `page_bytes` in each tier, for sequences of `num_layers` layers."""

    num_layers: int
    page_bytes: int
    gpu_pages: int
    ram_pages: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that both tiers hold together, a multiple of `PAGE_TOKENS`."""
        return most_pages_per_layer(self.num_layers, self.gpu_pages, self.ram_pages) * PAGE_TOKENS


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


def in_flight_pages(pages_per_layer: int) -> int:
    """The least pages on the GPU with which sequences of `pages_per_layer` pages in all can run."""
    return _LAYERS_IN_FLIGHT * pages_per_layer


def num_resident_layers(num_layers: int, pages_per_layer: int, gpu_pages: int) -> int:
    """How many layers' pages stay on the GPU: all, or as many as leave room for those in flight."""
    if num_layers * pages_per_layer <= gpu_pages:
        return num_layers
    return max(0, min(num_layers, gpu_pages // pages_per_layer - _LAYERS_IN_FLIGHT))


def resident_layers(num_layers: int, pages_per_layer: int, gpu_pages: int) -> frozenset[int]:
    """The layers that stay, spread over the sweep so that the link has work behind each of them.

    With fewer pages per layer the set only grows: no layer leaves the GPU for another one.
    """
    count = num_resident_layers(num_layers, pages_per_layer, gpu_pages)
    return frozenset(spread_order(num_layers)[:count])


def fits(num_layers: int, pages_per_layer: int, gpu_pages: int, ram_pages: int) -> bool:
    """Whether sequences of `pages_per_layer` pages in all can be held."""
    resident = num_resident_layers(num_layers, pages_per_layer, gpu_pages)
    if resident == num_layers:
        return True
    return in_flight_pages(pages_per_layer) <= gpu_pages and (num_layers - resident) * pages_per_layer <= ram_pages


def most_pages_per_layer(num_layers: int, gpu_pages: int, ram_pages: int) -> int:
    """The most pages per layer of which every lower number fits, too."""
    count = gpu_pages // num_layers
    while fits(num_layers, count + 1, gpu_pages, ram_pages):
        count += 1
    return count


def ram_pages_for(num_layers: int, pages_per_layer: int, gpu_pages: int) -> int:
    """RAM pages with which everything up to `pages_per_layer` fits; that must be possible with `gpu_pages`."""
    most = 0
    for count in range(gpu_pages // num_layers + 1, pages_per_layer + 1):
        most = max(most, (num_layers - num_resident_layers(num_layers, count, gpu_pages)) * count)
    return most


def spread_order(num_layers: int) -> list[int]:
    """Layers so that every beginning of the list is spread over the range: by their number's bits, reversed."""
    bits = max(1, (num_layers - 1).bit_length())
    order = (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits))
    return [layer for layer in order if layer < num_layers]
