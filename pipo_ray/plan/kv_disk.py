"""How many KV pages stay in RAM and which live on the drive. Pure functions; a page is one layer's of one sequence, and
`disk_pages.py` says how many tokens are in it.

Every sweep reads all of it, layer by layer: a cycle, in which a fixed subset that stays is best (least recently used
would evict exactly what comes next). The newest page of each layer of each sequence is written in every sweep, so it is
always in RAM. Of the others whichever come first stay, as many tokens in every layer: so while a layer attends to what
is here, the rest of its pages arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from pipo_ray.errors import BudgetError, UnsupportedModelError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.disk_pages import PAGE_TOKENS, DiskPages
from pipo_ray.plan.kv_pages import spread_order
from pipo_ray.plan.low_bit_pages import LowBitKV
from pipo_ray.session.memory import MIB, format_least, format_size

GROUP_PAGES = 8
"""So many pages of a layer a GPU attends to at once: by itself a page is too little work for the calls it takes."""

PASSING_PAGES = 2 * GROUP_PAGES
"""Pages on a GPU that are only read, from RAM: a group is copied while another is computed with."""

RUN_BYTES = 2 * MIB
"""Pages that are neighbours in the file are read at once, up to so many bytes: small ones by themselves keep no drive
busy.
"""

_LEAST_STAGING = 6
_STAGING_BYTES = 32 * MIB
"""Twice what is read at the same time: eight transfers of RUN_BYTES. With 10 MiB, an H200's machine read at 70 % of its
drive's rate: a batch of five transfers, all done together, and 0.7 ms without one until the next was asked for.
"""
_MOST_STAGING_BYTES = 64 * MIB
"""While a GPU computes a layer of a long prompt without asking for pages, some 15 ms, a drive reads 45 MiB."""
_STAGING_SHARE = 1 / 16
_MOST_STAGING_SHARE = 0.25
_MOST_LOADS_MORE = 1 / 16
"""Of what a sweep reads, if pages on their way have the room of pages that would stay: less than they gain."""
_PARTLY_FILLED = 16
"""Pages per layer beyond the tokens that are wanted, where nobody says how many: half a page for each of 32 requests.
"""
_MOST_WINDOWS_SHARE = 0.5
"""Of RAM: sequences that are not alone share a sweep over the weights, but pages that stay are not read in each."""


@dataclass(frozen=True)
class KVOnDisk:
    """What the user wants: `size_bytes` of the file (None: as many as the run can need) in `folder` (None: the cache
    folder), `encrypted` or as the pages are.
    """

    size_bytes: int | None = None
    folder: str | None = None
    encrypted: bool = True


@dataclass(frozen=True)
class KVDiskPlacement:
    """Pages of `page_bytes` for sequences of `num_layers` layers: `ram_pages` in RAM, of which `staging_pages` are
    those on their way, and `disk_pages` in a file in `folder`. If a GPU computes, it has `gpu_pages`: PASSING_PAGES and
    the newest ones. A page is so many `tokens` of each layer; none named: PAGE_TOKENS. Where there are layers of few
    bits, what computes has room for the windows of `num_windows` sequences, of `window_bytes` each.
    """

    num_layers: int
    page_bytes: int
    ram_pages: int
    staging_pages: int
    disk_pages: int
    folder: str
    encrypted: bool = True
    gpu_pages: int = 0
    tokens: tuple[int, ...] = ()
    window_bytes: int = 0
    num_windows: int = 0

    def page_tokens(self, layer: int) -> int:
        """Tokens of a layer in a page."""
        return self.tokens[layer] if self.tokens else PAGE_TOKENS

    @property
    def most_page_tokens(self) -> int:
        """Of the layer with the most of them: a sequence is admitted by so many at a time."""
        return max(self.tokens, default=PAGE_TOKENS)

    @property
    def ram_bytes(self) -> int:
        """Of RAM, in pages."""
        return self.ram_pages * self.page_bytes

    @property
    def windows_bytes(self) -> int:
        """Of all windows, where the computation is."""
        return self.num_windows * self.window_bytes

    @property
    def disk_bytes(self) -> int:
        """Of the file."""
        return self.disk_pages * self.page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that RAM and disk hold together, if each sequence takes `most_page_tokens` at a time."""
        return self._tokens_in(self.ram_pages - self.staging_pages + self.disk_pages)

    def _tokens_in(self, num_pages: int) -> int:
        unit = self.most_page_tokens
        return num_pages // sum(-(-unit // self.page_tokens(layer)) for layer in range(self.num_layers)) * unit

    @property
    def max_sequences(self) -> int:
        """Sequences at the same time: each has a page in every layer, in RAM, and on a GPU that computes."""
        most = (self.ram_pages - self.staging_pages) // self.num_layers
        if self.gpu_pages:
            most = min(most, (self.gpu_pages - PASSING_PAGES) // self.num_layers)
        return min(most, self.num_windows) if self.window_bytes else most

    @property
    def ahead_pages(self) -> int:
        """Pages that are read before they are needed; the rest of the staging is for pages to be written."""
        return self.staging_pages - max(2, self.staging_pages // 4)

    @property
    def run_pages(self) -> int:
        """Pages that are read at once, where they are neighbours."""
        return max(1, RUN_BYTES // self.page_bytes)

    def describe(self, low_bit: LowBitKV | None = None) -> str:
        """A line for the user."""
        in_ram = self._tokens_in(self.ram_pages - self.staging_pages)
        cipher = "encrypted" if self.encrypted else "not encrypted"
        bits = "" if low_bit is None else f" at {low_bit.label}"
        return (
            f"KV pages of up to {self.kv_tokens} tokens{bits}: {in_ram} of them in RAM, the others in a file of "
            f"{format_size(self.disk_bytes)} without a name in {self.folder} ({cipher}), "
            f"{format_size(self.staging_pages * self.page_bytes)} of RAM for those on their way"
            + (f"; windows at 16 bits: {self.num_windows}" if self.window_bytes else "")
        )


def pages_of(num_tokens: int) -> int:
    """Pages that `num_tokens` tokens of one layer take at 16 bits."""
    return -(-num_tokens // PAGE_TOKENS)


def disk_page_bytes(facts: ModelFacts) -> int:
    """Bytes of a page at 16 bits."""
    return DiskPages.of(facts).page_bytes


def least_ram_bytes(facts: ModelFacts, low_bit: LowBitKV | None = None, num_windows: int = 1) -> int:
    """The least RAM: a page in every layer of one sequence, and those on their way; and windows, if any are there.
    Raises UnsupportedModelError where transformers keeps the cache.
    """
    check_model(facts)
    sizes = DiskPages.of(facts, low_bit)
    return (_LEAST_STAGING + sizes.num_layers) * sizes.page_bytes + num_windows * sizes.window_bytes


def ram_bytes_for(facts: ModelFacts, num_tokens: int, low_bit: LowBitKV | None = None, num_windows: int = 1) -> int:
    """The RAM with which nothing of a sequence of `num_tokens` tokens is on the drive, and windows."""
    sizes = DiskPages.of(facts, low_bit)
    staging = max(_LEAST_STAGING, _MOST_STAGING_BYTES // sizes.page_bytes)
    return (sizes.pages_of(num_tokens) + staging) * sizes.page_bytes + num_windows * sizes.window_bytes


def _windows_in(sizes: DiskPages, ram_bytes: int, num_sequences: int) -> int:
    """How many of `num_sequences` sequences are to have a window in `ram_bytes`: each takes its newest pages, too."""
    room = (ram_bytes - _LEAST_STAGING * sizes.page_bytes) // _newest_bytes(sizes)
    most = min(room, int(ram_bytes * _MOST_WINDOWS_SHARE) // sizes.window_bytes)
    return max(1, min(num_sequences, most))


def gpu_bytes_for(facts: ModelFacts, num_sequences: int, low_bit: LowBitKV | None = None) -> int:
    """Of a GPU, for the newest pages of so many sequences and those that pass through, and for windows. Raises
    UnsupportedModelError where transformers keeps the cache.
    """
    check_model(facts)
    sizes = DiskPages.of(facts, low_bit)
    return PASSING_PAGES * sizes.page_bytes + num_sequences * _newest_bytes(sizes)


def _newest_bytes(sizes: DiskPages) -> int:
    """Of a sequence: what is where the computation is."""
    return sizes.num_layers * sizes.page_bytes + sizes.window_bytes


def check_model(facts: ModelFacts) -> None:
    """Raise UnsupportedModelError for an architecture whose KV cache is not in pages of ours."""
    if not facts.ragged or not facts.kv_bytes_per_token:
        raise UnsupportedModelError(
            f"--kv-on-disk: {facts.model_type} keeps its model's own cache, which has no pages that could be on a "
            "drive; leave it out"
        )


def place_kv(
    facts: ModelFacts,
    ram_bytes: int,
    wanted_tokens: int,
    wish: KVOnDisk,
    gpu_bytes: int = 0,
    low_bit: LowBitKV | None = None,
    num_sequences: int = 1,
) -> KVDiskPlacement:
    """Spend `ram_bytes` on pages in RAM, and `wish.size_bytes` of disk on others: without a size, as many as
    `wanted_tokens` need beyond RAM. A GPU that computes gives `gpu_bytes`, at least those of `gpu_bytes_for`; without
    one the windows of layers of few bits are in `ram_bytes`, of up to `num_sequences` sequences.

    Raises BudgetError for less RAM than `least_ram_bytes`, or a file of less than a page in every layer.
    """
    sizes, least = DiskPages.of(facts, low_bit), least_ram_bytes(facts, low_bit, num_windows=0 if gpu_bytes else 1)
    nbytes, layers = sizes.page_bytes, sizes.num_layers
    if ram_bytes < least:
        raise BudgetError(
            f"KV cache of {format_size(ram_bytes)} in RAM is too low for --kv-on-disk: at least {format_least(least)} "
            f"would do: {layers} pages of {format_size(nbytes)}, one in each layer of a request, and {_LEAST_STAGING} "
            f"on their way{', and its last tokens at 16 bits' if sizes.window_bytes else ''}; raise --memory"
        )
    num_windows = 0
    if sizes.window_bytes and not gpu_bytes:
        num_windows = _windows_in(sizes, ram_bytes, num_sequences)
    ram_pages = (ram_bytes - num_windows * sizes.window_bytes) // nbytes
    gpu_pages = gpu_bytes // nbytes
    if sizes.window_bytes and gpu_bytes:
        num_windows = (gpu_bytes - PASSING_PAGES * nbytes) // _newest_bytes(sizes)
        gpu_pages = PASSING_PAGES + layers * num_windows
    staging = _staging_pages(nbytes, layers, ram_pages, sizes.pages_of(wanted_tokens))
    if wish.size_bytes is None:
        unit = max(sizes.tokens)
        wanted = -(-wanted_tokens // unit) * sizes.pages_of(unit) + _PARTLY_FILLED * layers
        disk_pages = max(layers, wanted - (ram_pages - staging))
    else:
        disk_pages = wish.size_bytes // nbytes
    if disk_pages < layers:
        raise BudgetError(
            f"--kv-on-disk {format_size(wish.size_bytes or 0)} is too low: at least {format_least(layers * nbytes)} "
            f"would do: a page in each of {layers} layers"
        )
    folder = wish.folder or ""
    return KVDiskPlacement(
        layers, nbytes, ram_pages, staging, disk_pages, folder, wish.encrypted, gpu_pages, sizes.tokens,
        sizes.window_bytes, num_windows,
    )  # fmt: skip


def _staging_pages(page_bytes: int, num_layers: int, ram_pages: int, wanted_pages: int) -> int:
    """Of `ram_pages`, those for pages on their way, where all sequences together have `wanted_pages`."""
    beyond = ram_pages - num_layers  # the newest page of each layer of a sequence
    quarter = int(beyond * _MOST_STAGING_SHARE)
    wanted = int(ram_pages * page_bytes * _STAGING_SHARE)
    wanted = min(max(_STAGING_BYTES, wanted), _MOST_STAGING_BYTES) // page_bytes
    # What keeps the drive busy goes before what stays, unless it makes much more to read or leaves one sequence alone.
    on_drive = max(0, wanted_pages - (ram_pages - quarter))
    needed = min(
        _STAGING_BYTES // page_bytes,
        beyond // 2,
        ram_pages - 2 * num_layers,
        quarter + int(on_drive * _MOST_LOADS_MORE),
    )
    return max(_LEAST_STAGING, needed, min(wanted, quarter))


def kept_pages(placement: KVDiskPlacement, num_sequences: int) -> tuple[int, ...]:
    """Per layer how many full pages stay in RAM, beside the newest page of each of `num_sequences` and those on their
    way. As many tokens in every layer, and what does not divide is spread over the sweep.
    """
    layers = placement.num_layers
    room = max(0, placement.ram_pages - placement.staging_pages - layers * num_sequences)
    shares = [Fraction(1, placement.page_tokens(layer)) for layer in range(layers)]
    kept = [int(room * share / sum(shares)) for share in shares]
    one_more = set(spread_order(layers)[: room - sum(kept)])
    return tuple(pages + (layer in one_more) for layer, pages in enumerate(kept))
