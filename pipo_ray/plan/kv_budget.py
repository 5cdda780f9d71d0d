"""What a plan gives the KV cache of its memory, and how it says so."""

from __future__ import annotations

from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.kv_pages import (
    KVPlacement,
    most_pages_per_layer,
    page_bytes,
    pages_of,
    ram_pages_for,
)
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, VISITING_BYTES, LowBitKV
from pipo_ray.store.manifest import Manifest

_KV_SHARE = 0.2
WANTED_KV_TOKENS = 16384
"""Where nobody says how many are needed."""
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


def kv_tiers(
    manifest: Manifest, facts: ModelFacts, gpu_bytes: int, spare_ram_bytes: int, context: int, pages_of_sweep: int
) -> KVPlacement | None:
    """The KV cache's two tiers: `gpu_bytes` on the GPU, and in RAM what is wanted beyond them, a full sweep's pages at
    least: of `spare_ram_bytes` a share, or what the whole model leaves. None where transformers keeps the cache
    (requests in lanes).
    """
    if not facts.ragged or not facts.kv_bytes_per_token:
        return None
    layers, nbytes = facts.num_layers, page_bytes(facts.kv_bytes_per_token, facts.num_layers)
    gpu_pages = gpu_bytes // nbytes
    beside_model = spare_ram_bytes - manifest.total_bytes
    contexts = 4 if beside_model > 0 else 1
    wanted = max(pages_of_sweep, pages_of(max(WANTED_KV_TOKENS, contexts * context)))
    wanted = min(wanted, max(gpu_pages // 2, gpu_pages // layers))
    most_ram_pages = max(0, int(spare_ram_bytes * _KV_SHARE), beside_model) // nbytes
    ram_pages = min(most_ram_pages, ram_pages_for(layers, wanted, gpu_pages))
    if most_pages_per_layer(layers, gpu_pages, ram_pages) == gpu_pages // layers:
        ram_pages = 0  # too little to hold more than the GPU does
    return KVPlacement(layers, nbytes, gpu_pages, ram_pages)


def tiers_line(facts: ModelFacts, gpu_bytes: int, kv: KVPlacement | None) -> str:
    """How many tokens move between the tiers, where any do."""
    if kv is None or not kv.ram_pages:
        return ""
    return f", of them {gpu_bytes // facts.kv_bytes_per_token} without moving to RAM and back"


def on_cpu_line(kv_on_cpu: bool, kv_tokens: int, low_bit: str) -> str:
    """What the processor attends to; `low_bit` is from `low_bit_line`."""
    return f" ({kv_tokens} tokens{low_bit}, for which the processor attends)" if kv_on_cpu else ""


def low_bit_line(kv_bytes: int, low_bit_kv: LowBitKV | None) -> str:
    """In how many bits, and what that gains."""
    if low_bit_kv is None:
        return ""
    return f" at {low_bit_kv.label}, {kv_bytes // low_bit_kv.wide_token_bytes} at 16"


def wanted_kv_bytes(
    facts: ModelFacts, context: int, max_kv_tokens: int | None, num_sequences: int, low_bit_kv: LowBitKV | None
) -> int:
    """Bytes for the tokens of `num_sequences` sequences that are wanted."""
    wanted = max(WANTED_KV_TOKENS, context) if max_kv_tokens is None else max_kv_tokens
    nbytes = wanted * facts.kv_bytes_per_token + num_sequences * facts.state_bytes
    # However short the sequences are, no token takes more than one at 16 bits.
    return nbytes if low_bit_kv is None else min(nbytes, wanted * low_bit_kv.wide_token_bytes)


def kv_room(spare_bytes: int, max_kv_tokens: int | None) -> int:
    """What the KV cache may take of what is spare: a share, or all of it for a number of tokens that the user named.
    With less, requests would wait for each other, and each wait costs sweeps over all weights.
    """
    return int(spare_bytes * _KV_SHARE) if max_kv_tokens is None else spare_bytes


def kv_tokens_of(facts: ModelFacts, kv_bytes: int) -> tuple[int, int]:
    """Tokens of KV cache that `kv_bytes` hold, and what a sequence's recurrent state takes in such tokens."""
    per_token = max(1, facts.kv_bytes_per_token)
    return max(1, kv_bytes // per_token), -(-facts.state_bytes // per_token)
