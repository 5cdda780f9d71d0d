"""What a plan gives the KV cache of its memory, and how it says so."""

from __future__ import annotations

from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.kv_pages import (
    PAGE_TOKENS,
    KVPlacement,
    in_flight_units,
    most_pages_per_layer,
    page_bytes,
    pages_of,
    ram_units_for,
)
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, VISITING_BYTES, LowBitKV, most_page_bytes
from pipo_ray.store.manifest import Manifest

_KV_SHARE = 0.2
WANTED_KV_TOKENS = 16384
"""Where nobody says how many are needed."""
_UNIT_BYTES = 1024  # a multiple of it, so that tokens in a unit begin on multiples of 16 bytes

LEAST_KV_TOKENS = 256
"""A plan without room for so many is refused."""


def earlier_bytes(
    facts: ModelFacts, context: int, max_kv_tokens: int | None, low_bit_kv: LowBitKV | None = None
) -> int:
    """Of a layer's keys and values that a chunk of a prompt attends to on the GPU, and which are in RAM otherwise: at
    16 bits all of them, of fewer the window, and some pages at a time.
    """
    wide = facts.kv_bytes_per_token if low_bit_kv is None else low_bit_kv.wide_token_bytes
    all_tokens = min(context, max_kv_tokens or context) if low_bit_kv is None or 16 in low_bit_kv.bits else 0
    visiting = 0 if low_bit_kv is None else VISITING_BYTES
    tokens = all_tokens if low_bit_kv is None else max(all_tokens, SHORT_TOKENS)
    return -(-wide // facts.num_layers) * tokens + visiting


def tier_units(facts: ModelFacts, low_bit_kv: LowBitKV | None = None) -> tuple[int, tuple[int, ...]]:
    """Bytes of a unit of two tiers, and how many units a page of each layer takes. At 16 bits a page is a unit. With
    few bits the smallest page is, and a larger one takes several: at 16 bits a power of two, so that a unit has whole
    tokens.
    """
    wide = page_bytes(facts.kv_bytes_per_token if low_bit_kv is None else low_bit_kv.wide_token_bytes, facts.num_layers)
    if low_bit_kv is None:
        return wide, (1,) * facts.num_layers
    packed = {bits: most_page_bytes(facts.kv_shapes, bits) for bits in set(low_bit_kv.bits) - {16}}
    unit = -(-min(packed.values()) // _UNIT_BYTES) * _UNIT_BYTES
    sizes = {bits: -(-nbytes // unit) for bits, nbytes in packed.items()}
    sizes[16] = 1 << (-(-wide // unit) - 1).bit_length()
    return unit, tuple(sizes[one] for one in low_bit_kv.bits)


def least_tier_bytes(facts: ModelFacts, low_bit_kv: LowBitKV | None) -> int:
    """The least of a GPU for its tier: LEAST_KV_TOKENS of a sequence, and its windows."""
    nbytes, units = tier_units(facts, low_bit_kv)
    windows = 0 if low_bit_kv is None else low_bit_kv.whole_window_bytes
    return pages_of(LEAST_KV_TOKENS) * sum(units) * nbytes + windows


def kv_tiers(
    manifest: Manifest, facts: ModelFacts, gpu_bytes: int, spare_ram_bytes: int, context: int, pages_of_sweep: int,
    low_bit_kv: LowBitKV | None, num_sequences: int, tokens_each: int, max_kv_tokens: int | None = None,
) -> KVPlacement | None:  # fmt: skip
    """The KV cache's two tiers: `gpu_bytes` on the GPU, and in RAM what is wanted beyond them, a full sweep's pages at
    least, or those of `max_kv_tokens` of `num_sequences` sequences: of `spare_ram_bytes` a share, or what the whole
    model leaves. None where transformers keeps the cache
    (requests in lanes). With few bits the GPU has windows for at most `num_sequences` sequences, for as many as can
    pass through it if each has `tokens_each` tokens.
    """
    if not facts.ragged or not facts.kv_bytes_per_token:
        return None
    nbytes, units = tier_units(facts, low_bit_kv)
    bits, window_bytes, windows = None, 0, None
    if low_bit_kv is not None:
        bits, window_bytes = low_bit_kv.bits, low_bit_kv.whole_window_bytes
        beyond = gpu_bytes - least_tier_bytes(facts, low_bit_kv) + window_bytes
        passing = in_flight_units(units, pages_of(tokens_each)) * nbytes
        windows = max(1, min(num_sequences, gpu_bytes // (window_bytes + passing), beyond // window_bytes))
        gpu_bytes -= windows * window_bytes
    gpu_units, all_units = gpu_bytes // nbytes, sum(units)
    beside_model = spare_ram_bytes - manifest.total_bytes
    contexts = 4 if beside_model > 0 else 1
    wanted = max(pages_of_sweep, pages_of(max(WANTED_KV_TOKENS, contexts * context)))
    if max_kv_tokens is not None:
        wanted = max(pages_of_sweep, wanted_pages(max_kv_tokens, num_sequences))
    wanted = min(wanted, max(gpu_units // in_flight_units(units, 1), gpu_units // all_units))
    most_ram_units = max(0, int(spare_ram_bytes * _KV_SHARE), beside_model) // nbytes
    ram_units = min(most_ram_units, ram_units_for(units, wanted, gpu_units))
    if most_pages_per_layer(units, gpu_units, ram_units) == gpu_units // all_units:
        ram_units = 0  # too little to hold more than the GPU does
    return KVPlacement(units, nbytes, gpu_units, ram_units, bits, window_bytes, windows)


def wanted_pages(max_kv_tokens: int | None, num_sequences: int) -> int:
    """Pages of a layer for so many tokens of so many sequences, of whose last pages a part is not used; 0 if nobody
    says how many.
    """
    return 0 if max_kv_tokens is None else pages_of(max_kv_tokens) + num_sequences


def tiers_line(kv: KVPlacement | None) -> str:
    """How many tokens move between the tiers, where any do, and what is beside them."""
    if kv is None:
        return ""
    windows = "" if kv.max_sequences is None else f"; windows at 16 bits of {kv.max_sequences} sequences beside them"
    if not kv.ram_units:
        return windows
    stay = kv.gpu_units // sum(kv.units) * PAGE_TOKENS
    return f", of them {stay} without moving to RAM and back{windows}"


def in_ram_line(kv_on_cpu: bool, kv_tokens: int, low_bit: str, in_tier: LowBitKV | None) -> str:
    """What of a GPU's KV cache is in RAM; `low_bit` is from `low_bit_line`, `in_tier` what pages of a tier are in."""
    if kv_on_cpu:
        return f" ({kv_tokens} tokens{low_bit}, for which the processor attends)"
    return "" if in_tier is None else f" of pages at {in_tier.label}"


def low_bit_line(kv_bytes: int, low_bit_kv: LowBitKV | None) -> str:
    """In how many bits, and what that gains."""
    if low_bit_kv is None:
        return ""
    return f" at {low_bit_kv.label}, {kv_bytes // low_bit_kv.wide_token_bytes} at 16"


def wanted_kv_tokens(context: int, max_kv_tokens: int | None) -> int:
    """Tokens of KV cache that are wanted: those that the user named, or what is usual."""
    return max(WANTED_KV_TOKENS, context) if max_kv_tokens is None else max_kv_tokens


def wanted_kv_bytes(
    facts: ModelFacts, context: int, max_kv_tokens: int | None, num_sequences: int, low_bit_kv: LowBitKV | None
) -> int:
    """Bytes for the tokens of `num_sequences` sequences that are wanted."""
    wanted = wanted_kv_tokens(context, max_kv_tokens)
    _, state_tokens = kv_tokens_of(facts, 0)
    nbytes = (wanted + num_sequences * state_tokens) * max(1, facts.kv_bytes_per_token)
    # However short the sequences are, no token takes more than one at 16 bits.
    return nbytes if low_bit_kv is None else min(nbytes, wanted * low_bit_kv.wide_token_bytes)


def kv_room(spare_bytes: int, max_kv_tokens: int | None, staging_bytes: int = 0) -> int:
    """What the KV cache may take of what is spare: a share, or for a number of tokens that the user named all but the
    staging of weights. With less, requests would wait for each other, and each wait costs sweeps over all weights;
    without staging every sweep would take many times as long. Where that is short itself, it has a fourth.
    """
    if max_kv_tokens is None:
        return int(spare_bytes * _KV_SHARE)
    return spare_bytes - min(staging_bytes, spare_bytes // 4)


def kv_tokens_of(facts: ModelFacts, kv_bytes: int) -> tuple[int, int]:
    """Tokens of KV cache that `kv_bytes` hold, and what a sequence's recurrent state takes in such tokens."""
    per_token = max(1, facts.kv_bytes_per_token)
    return max(1, kv_bytes // per_token), -(-facts.state_bytes // per_token)
