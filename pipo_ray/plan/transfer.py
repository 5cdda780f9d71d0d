"""How weights move from the drive to the slots: the knobs of the transfer, and the choice of them from what was
measured.

The choice is one pure function, `choose_transfer`; a planner that knows more can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipo_ray.errors import InputError
from pipo_ray.plan.drive_curve import fit_curve
from pipo_ray.plan.pieces import PAGE
from pipo_ray.session.memory import MIB

Mode = Literal["performance", "memory-saver"]
"""performance: the least staging that reads at the drive's best speed. memory-saver: a quarter of it."""


@dataclass(frozen=True)
class Transfer:
    """`transfer_bytes` are read at once, by each of `read_threads` threads, so many are in flight on each drive; a slot
    holds `slot_bytes` at most, and there are `num_slots`, for all drives together, where the budget allows; and
    `num_gpu_slots` on a GPU.
    """

    transfer_bytes: int = 8 * MIB
    read_threads: int = 4
    slot_bytes: int = 32 * MIB + 2 * PAGE
    num_slots: int = 6
    num_gpu_slots: int = 3

    @property
    def staging_bytes(self) -> int:
        """Memory of all slots."""
        return self.slot_bytes * self.num_slots

    def in_fewer_slots(self, times: int) -> Transfer:
        """The same memory in slots `times` as large, or a little more for want of a whole one."""
        num_slots = min(self.num_slots, max(2, -(-self.num_slots // times)))
        return replace(self, slot_bytes=times * self.slot_bytes, num_slots=num_slots)


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

    @property
    def keeps_busy(self) -> bool:
        """Whether so much in flight keeps a drive busy beside products, which `choose_transfer` asks for."""
        return _ONE_DRIVE.met_by(self)

    @property
    def staging_bytes(self) -> int:
        """Of a run that has so much in flight, with one drive and without a GPU."""
        return _staged(self, 1, _ONE_DRIVE).staging_bytes


WITHOUT_PROFILE = Transfer()
"""For a drive that was not measured."""
WITHOUT_PROFILE_IN_PARTS = ReadRate(2 * MIB, 8, 1.0)
"""The reads of each of several such drives, on which weights lie in parts of 16 MiB (`store/striping.py`)."""

# Of the best sweep: what less staging may cost.
_WITHIN = 0.01


@dataclass(frozen=True)
class _Need:
    """What staging has in flight at least: reads, and bytes, which a slot holds; and what a slot holds at least."""

    reads: int
    in_flight_bytes: int
    slot_bytes: int = 0

    def met_by(self, point: ReadRate) -> bool:
        return point.threads >= self.reads and point.in_flight_bytes >= self.in_flight_bytes


# An idle machine reads as fast with less, as the probe sees it; while products keep the cores busy, a read that has
# ended waits until its thread gets one, and the others must last as long. More than that is slower: what a run reads
# into again and again stays in the processor's cache if it is little. 16 MiB of staging decode 15 % faster than 32 at
# full speed and prompts of 256 tokens take as long; with 8 MiB those take up to 15 % longer
# (`benchmarks/staging_runs.py`).
_ONE_DRIVE = _Need(reads=4, in_flight_bytes=8 * MIB)
# Of several drives each has parts of 16 MiB (`store/striping.py`).
_SEVERAL_DRIVES = _Need(reads=8, in_flight_bytes=16 * MIB)
# A GPU's host gives orders for each piece, however large, and is held up at times. Three slots of 32 MiB there have
# 97.4 % of the link's rate where four of 16 have 84.8 to 93.1, and an int4 model's 93.6 instead of 87.4; eight of 16
# have less than four (`benchmarks/gpu_stream.py`, one H200 each; docs/architecture.md, "On a GPU").
_GPU = _Need(reads=8, in_flight_bytes=16 * MIB, slot_bytes=32 * MIB)
# The one that is computed with. One more, or more in flight, made no prompt and no token faster
# (`benchmarks/staging_modes.py`, `benchmarks/staging_runs.py`).
_HELD_SLOTS = 1
# Of a slot, where more is in flight.
_MOST_SLOT_BYTES = 16 * MIB
_SAVED = 4
_LEAST_SLOT_BYTES = 256 * 1024


def check_mode(mode: str) -> Mode:
    """`mode` if it is one. Raises InputError."""
    if mode not in get_args(Mode):
        raise InputError(f"--mode {mode!r} is not known; give one of {', '.join(get_args(Mode))}")
    return mode  # type: ignore[return-value]


def choose_transfer(
    profile: Sequence[ReadRate],
    mode: Mode = "performance",
    *,
    model_bytes: int = 0,
    weight_bytes: int = 0,
    num_drives: int = 1,
    on_gpu: bool = False,
) -> Transfer:
    """The transfer for `num_drives` drives, each with this profile (empty: not measured), and for a model of
    `model_bytes`, of which `weight_bytes` may be in memory, slots included; `on_gpu` if a GPU computes.

    Staging takes memory from what could be resident: of the points with which a sweep's reading is within 1 % of the
    shortest, the one with the least staging. Rates are those of the drive's curve (`drive_curve.py`): two measurements
    of one point differ by more than 1 %. Slots hold several transfers, because large ones cut fewer matrices. All
    drives share the slots, of which each needs as many as it would by itself.
    """
    need = _GPU if on_gpu else _SEVERAL_DRIVES if num_drives > 1 else _ONE_DRIVE
    if not profile:
        chosen = WITHOUT_PROFILE
        if num_drives > 1:
            chosen = _staged(WITHOUT_PROFILE_IN_PARTS, num_drives, need)
        return _in_mode(chosen, mode, num_drives, on_gpu)
    curve = fit_curve((point.in_flight_bytes, point.bytes_per_s) for point in profile)
    points = [point for point in profile if need.met_by(point)] or profile
    candidates = [(point, _staged(point, num_drives, need)) for point in points]

    def seconds(point: ReadRate, staged: Transfer) -> float:
        streamed = max(model_bytes + staged.staging_bytes - weight_bytes, 0) if model_bytes else 1
        return streamed / num_drives / curve.bytes_per_s(point.in_flight_bytes)

    best = min(seconds(*one) for one in candidates)
    good = [staged for point, staged in candidates if seconds(point, staged) <= (1 + _WITHIN) * best]
    chosen = min(good, key=lambda staged: (staged.staging_bytes, staged.read_threads))
    return _in_mode(chosen, mode, num_drives, on_gpu)


def slowest(profiles: Sequence[Sequence[ReadRate]]) -> tuple[ReadRate, ...]:
    """The profile that each of several drives has at least: every drive has as much to read in a sweep, so it ends when
    the slowest does. Empty if one was not measured.
    """
    rates: dict[tuple[int, int], list[float]] = {}
    for profile in profiles:
        for point in profile:
            rates.setdefault((point.transfer_bytes, point.threads), []).append(point.bytes_per_s)
    return tuple(ReadRate(*point, min(found)) for point, found in rates.items() if len(found) == len(profiles))


def _staged(point: ReadRate, num_drives: int, need: _Need) -> Transfer:
    """The slots behind a point."""
    in_flight = min(point.in_flight_bytes, _MOST_SLOT_BYTES)
    slot = max(point.transfer_bytes, need.in_flight_bytes, need.slot_bytes, in_flight)
    num_slots = -(-num_drives * point.in_flight_bytes // slot) + _HELD_SLOTS
    return Transfer(point.transfer_bytes, point.threads, slot + 2 * PAGE, num_slots)


def _in_mode(full: Transfer, mode: Mode, num_drives: int, on_gpu: bool) -> Transfer:
    """`full` itself, or a quarter of its staging: as many slots, a quarter as large, or with a GPU one in RAM and two
    there, so larger.

    On a GPU the host gives orders for each piece, however large: with slots a quarter as large a sweep took twice as
    long (`benchmarks/gpu_stream.py --mode memory-saver`). One slot in RAM does, because it is free again as soon as it
    was copied, which takes a twentieth of the time that a drive reads into it.
    """
    if mode == "performance":
        return full
    if not on_gpu:
        return _saving(full, full.slot_bytes // _SAVED, full.num_slots, num_drives)
    num_slots, num_gpu_slots = 1, 2
    slot = (full.num_slots + full.num_gpu_slots) * full.slot_bytes // (_SAVED * (num_slots + num_gpu_slots))
    return replace(_saving(full, slot, num_slots, num_drives), num_gpu_slots=num_gpu_slots)


def _saving(full: Transfer, slot_bytes: int, num_slots: int, num_drives: int) -> Transfer:
    """`full` with other slots, half of which are asked for at a time.

    Half of them, because a drive may answer several reads at once when the last of them is done (a virtual one did): if
    all free slots were asked for together, it would have nothing to do until a product has freed the first of them. Not
    more and smaller ones: a piece is a product, and one with few rows of a weight is slow for a prompt.
    """
    slot = max(_LEAST_SLOT_BYTES, slot_bytes // PAGE * PAGE)
    in_flight = -(-num_slots // 2) * slot
    # Two reads at least: with a single one a drive has nothing to do between them.
    transfer = min(full.transfer_bytes, slot, max(PAGE, in_flight // num_drives // 2 // PAGE * PAGE))
    return Transfer(transfer, max(1, in_flight // transfer // num_drives), slot, num_slots)
