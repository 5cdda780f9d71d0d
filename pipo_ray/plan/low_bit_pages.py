"""Pages of a low-bit KV cache, and what it costs. Pure arithmetic, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.quant.kv_policy import KVPrecision

WINDOW_TOKENS = 128
"""A token sees at least so many before it at 16 bits; a whole number of pages."""

SHORT_TOKENS = WINDOW_TOKENS + PAGE_TOKENS
"""A sequence of at most so many tokens has no packed page: the window is a page longer before it gives one up."""

VISITING_BYTES = 4 << 20
"""So many bytes of packed pages that are at home in RAM visit a GPU at a time, or one page."""

_MOST_CHANNELS = 128
_ALIGNMENT = 64


def packed_pages(num_tokens: int) -> int:
    """Pages of a sequence of `num_tokens` tokens that are packed: those whose tokens have all left the window."""
    return max(0, (num_tokens - WINDOW_TOKENS) // PAGE_TOKENS)


@dataclass(frozen=True)
class PageLayout:
    """A page of one layer: `heads` that have keys of `key_dim` and values of `value_dim` elements, in `bits`.

    Its parts lie one behind the other: codes of keys and of values, then their float16 scales and zeros. The page is a
    multiple of 64 bytes.
    """

    heads: int
    key_dim: int
    value_dim: int
    bits: int

    @property
    def value_groups(self) -> int:
        """Groups of a value's channels, each with a scale: the fewest equal ones of at most 128 channels."""
        least = -(-self.value_dim // _MOST_CHANNELS)
        return next(count for count in range(least, self.value_dim + 1) if self.value_dim % count == 0)

    @property
    def heads_per_group(self) -> int:
        """Neighbouring heads that share a value's scale: as many, in equal groups, as have 128 channels or fewer."""
        most = max(1, _MOST_CHANNELS // self.value_dim)
        return next(count for count in range(min(most, self.heads), 0, -1) if self.heads % count == 0)

    @property
    def parts(self) -> tuple[int, ...]:
        """Bytes of codes of keys, codes of values, scales of keys, zeros of keys, scales of values, zeros of values."""
        key_scales = 2 * self.heads * self.key_dim
        value_scales = 2 * self.heads // self.heads_per_group * PAGE_TOKENS * self.value_groups
        codes = self.heads * PAGE_TOKENS * self.bits // 8
        return (
            codes * self.key_dim, codes * self.value_dim, key_scales, key_scales, value_scales, value_scales
        )  # fmt: skip

    @property
    def page_bytes(self) -> int:
        """Of the whole page."""
        return -(-sum(self.parts) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class LowBitKV:
    """A low-bit KV cache: `bits` per layer, and what it takes in bytes: `token_bytes` of all layers, and besides them
    `window_bytes` of a sequence, because its last tokens are at 16 bits; `wide_token_bytes` is a token at 16 bits.
    """

    bits: tuple[int, ...]
    token_bytes: int
    window_bytes: int
    wide_token_bytes: int

    @staticmethod
    def of(bits: Sequence[int], facts: ModelFacts) -> LowBitKV:
        """Of a model whose requests share rows."""
        wide = -(-facts.kv_bytes_per_token // facts.num_layers)
        page = {few: most_page_bytes(facts.kv_shapes, few) for few in set(bits) - {16}}
        low = [page[one] for one in bits if one != 16]
        num_wide = len(bits) - len(low)
        token_bytes = -(-sum(low) // PAGE_TOKENS) + num_wide * wide
        # The window's tokens are counted as tokens already.
        window = SHORT_TOKENS * wide * len(low) - WINDOW_TOKENS * sum(low) // PAGE_TOKENS
        return LowBitKV(tuple(bits), token_bytes, window, wide * len(bits))

    def applied_to(self, facts: ModelFacts) -> ModelFacts:
        """The facts with what this cache takes."""
        return replace(facts, kv_bytes_per_token=self.token_bytes, state_bytes=self.window_bytes)

    @property
    def whole_window_bytes(self) -> int:
        """All bytes of a sequence's windows."""
        return SHORT_TOKENS * self.wide_token_bytes // len(self.bits) * sum(bits != 16 for bits in self.bits)

    @property
    def short_share(self) -> float:
        """What the window of a sequence of at most SHORT_TOKENS takes besides its tokens, as a share of them."""
        return self.wide_token_bytes / self.token_bytes - 1

    @property
    def label(self) -> str:
        """ "4 bits", or "16, 8 and 4 bits" where layers differ."""
        *others, last = sorted({str(one) for one in self.bits}, key=int, reverse=True)
        return f"{', '.join(others)} and {last} bits" if others else f"{last} bits"


def low_bit_kv(precision: KVPrecision, facts: ModelFacts) -> LowBitKV | None:
    """The KV cache that `precision` asks for; None: at 16 bits. Raises InputError for rules about layers that the model
    does not have, UnsupportedModelError for an architecture that keeps its model's own cache.
    """
    bits = precision.bits(facts.num_layers)
    if all(one == 16 for one in bits):
        return None
    if not facts.ragged:
        raise UnsupportedModelError(
            f"architecture {facts.model_type!r} keeps its model's own KV cache, which has 16 bits; leave out "
            "--kv-precision"
        )
    return LowBitKV.of(bits, facts)


def most_page_bytes(shapes: Iterable[tuple[int, int, int]], bits: int) -> int:
    """Bytes of the largest page: layers are planned as equal, as at 16 bits."""
    return max(PageLayout(*shape, bits).page_bytes for shape in shapes)
