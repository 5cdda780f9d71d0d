"""How weights move from the drive to the slots: the knobs of the transfer, and the choice of them from what was
measured.

The choice is one pure function, `choose_transfer`; a planner that knows more can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipo_ray.errors import InputError
from pipo_ray.plan.pieces import PAGE
from pipo_ray.session.memory import MIB

Mode = Literal["performance", "memory-saver"]
"""performance: the least staging that reads at the drive's best speed. memory-saver: a quarter of it."""


@dataclass(frozen=True)
class Transfer:
    """`transfer_bytes` are read at once, by each of `read_threads` threads, so many are in flight; a slot holds
    `slot_bytes` at most, and there are `num_slots` where the budget allows.
    """

    transfer_bytes: int = 8 * MIB
    read_threads: int = 4
    slot_bytes: int = 32 * MIB + 2 * PAGE
    num_slots: int = 6

    @property
    def staging_bytes(self) -> int:
        """Memory of all slots."""
        return self.slot_bytes * self.num_slots


@dataclass(frozen=True)
class ReadRate:
    """A point of a drive's profile: bytes per second with `threads` reads of `transfer_bytes` in flight."""

    transfer_bytes: int
    threads: int
    bytes_per_s: float

    @property
    def in_flight_bytes(self) -> int:
        """What the drive is asked for at the same time."""
        return self.transfer_bytes * self.threads


WITHOUT_PROFILE = Transfer()
"""For a drive that was not measured."""

_WITHIN = {"performance": 0.98, "memory-saver": 0.93}
# Behind the reads in flight there are the pieces that are computed with, and those that wait because a computation
# took longer than its reading.
_STAGING_PER_FLIGHT = 3
_LEAST_SLOT_BYTES = 8 * MIB  # smaller ones cost more for the pieces' sake than they save
_SAVED = 4
_HELD_SLOTS = 2


def check_mode(mode: str) -> Mode:
    """`mode` if it is one. Raises InputError."""
    if mode not in get_args(Mode):
        raise InputError(f"--mode {mode!r} is not known; give one of {', '.join(get_args(Mode))}")
    return mode  # type: ignore[return-value]


def choose_transfer(profile: Sequence[ReadRate], mode: Mode = "performance") -> Transfer:
    """The transfer for a drive with this profile (empty: not measured).

    Of the points that are nearly as fast as the best, the one with the least in flight, and of those with equally much
    the one with the fewest threads. Slots hold several transfers, because large ones cut fewer matrices.
    """
    if not profile:
        chosen = WITHOUT_PROFILE
        return chosen if mode == "performance" else _saving(chosen)
    best = max(rate.bytes_per_s for rate in profile)
    good = [rate for rate in profile if rate.bytes_per_s >= _WITHIN["performance"] * best]
    point = min(good, key=lambda rate: (rate.in_flight_bytes, rate.threads))
    staging = _STAGING_PER_FLIGHT * point.in_flight_bytes
    slot = max(point.transfer_bytes, _LEAST_SLOT_BYTES, min(32 * MIB, _power_of_two(staging // 4)))
    chosen = Transfer(point.transfer_bytes, point.threads, slot + 2 * PAGE, -(-staging // slot) + _HELD_SLOTS)
    return chosen if mode == "performance" else _saving(chosen, profile)


def _saving(full: Transfer, profile: Sequence[ReadRate] = ()) -> Transfer:
    """A quarter of the staging of `full`, with the reads that are fastest of those that fit into it."""
    staging = full.staging_bytes // _SAVED
    slots = _HELD_SLOTS + 3
    slot = max(256 * 1024, staging // slots // PAGE * PAGE)
    in_flight = (slots - _HELD_SLOTS) * slot
    fitting = [r for r in profile if r.in_flight_bytes <= in_flight and r.transfer_bytes <= slot]
    good = [r for r in fitting if r.bytes_per_s >= _WITHIN["memory-saver"] * max(f.bytes_per_s for f in fitting)]
    if not good:
        return Transfer(slot // 2 // PAGE * PAGE, full.read_threads, slot, slots)
    point = min(good, key=lambda rate: (rate.threads, -rate.transfer_bytes))
    return Transfer(point.transfer_bytes, point.threads, slot, slots)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << max(0, number.bit_length() - 1)
