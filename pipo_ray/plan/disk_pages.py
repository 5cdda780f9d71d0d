"""What a page of RAM and drive holds in each layer. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan import kv_pages
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, LowBitKV, most_page_bytes

PAGE_TOKENS = 256
"""1 MiB in a layer of Llama-3-8B at 16 bits: large enough for the drive, and for attention to a page to be worth its
call. Tokens of the newest page that are not there yet take room, in every layer: 128 on average.
"""

_ALIGNMENT = 4096


@dataclass(frozen=True)
class DiskPages:
    """Pages of `page_bytes`, whole blocks of the drive, which are so many `tokens` of each layer: PAGE_TOKENS at 16
    bits, and of fewer as many whole packed pages as fit (smaller pages would take as many calls as those). Each
    sequence has `window_bytes` besides: the last tokens of its layers of few bits.
    """

    page_bytes: int
    tokens: tuple[int, ...]
    window_bytes: int = 0

    @staticmethod
    def of(facts: ModelFacts, low_bit: LowBitKV | None = None) -> DiskPages:
        """A model's; `facts` may be as `low_bit` changes them."""
        if low_bit is None:
            wide = -(-facts.kv_bytes_per_token // facts.num_layers)
            return DiskPages(_whole_blocks(PAGE_TOKENS * wide), (PAGE_TOKENS,) * facts.num_layers)
        wide = low_bit.wide_token_bytes // len(low_bit.bits)
        packed = {bits: most_page_bytes(facts.kv_shapes, bits) for bits in set(low_bit.bits) - {16}}
        nbytes = _whole_blocks(PAGE_TOKENS * wide)
        tokens = (PAGE_TOKENS if bits == 16 else nbytes // packed[bits] * kv_pages.PAGE_TOKENS for bits in low_bit.bits)
        num_low = sum(bits != 16 for bits in low_bit.bits)
        return DiskPages(nbytes, tuple(tokens), SHORT_TOKENS * wide * num_low)

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.tokens)

    def pages_of(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of a sequence take in all layers together, at most: those of a window are
        counted, too.
        """
        return sum(-(-num_tokens // tokens) for tokens in self.tokens)


def _whole_blocks(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
