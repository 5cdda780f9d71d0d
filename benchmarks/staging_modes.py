"""How much staging memory speed needs: the sweep over sizes, and --mode memory-saver against performance.

How to run (--size of free disk, twice that while it is made; two sessions' memory; --minutes and a minute or two):

    python benchmarks/staging_modes.py [--size 3GiB] [--resident 1GiB] [--minutes 10] [--sessions 2] [--sweeps 3]
        [--settings 2x8/4,...] [--rate 1GB] [--beside 2] [--prompt 512] [--streamed 3GiB] [--real 8x8/4,...] [--modes]
        [--folder DIR] [--quick] [--json FILE]

A setting "4x8/6" is 8 reads of 4 MiB in flight into 6 slots of 16 MiB, "4x8/6@8" of 8 MiB; what differs in the slots'
size differs in its pieces, and has a session of its own. --rate holds the drive to so much (root, blkio of cgroup v1):
a virtual drive by itself differs from minute to minute by more than what is to be told apart, and then nothing is known
to better than 2 %; held to 1 GB/s to 0.4 %. All settings keep the same weights resident and
take turns, a few sweeps each, in one session and over the same memory, in an order that chance makes: two sessions
differ by 2 to 4 %, because a virtual drive's rate depends on the memory that is read into. The session has as many
slots as the largest setting; its loader is told before each turn how many of them it may use (`limited_loader.py`).
The pieces of `memory-saver` are smaller, so it has a session of its own, alive at the same time, with as much memory
for slots as the other; of that it uses no more than the mode has, and all of it in turn. Then all is begun anew with
other sessions. --real starts true sessions of these settings beside them, with the same weights resident and in the
same memory: to show that the limit measures what they do.

Printed, for each setting: staging, seconds per sweep, and the speed over that of `performance`, which `choose_transfer`
chooses here: the middle of the ratios within a round (Hodges and Lehmann's), and its standard error. With the same
weights resident, that is measured. In the same memory, as on a PC whose memory is what there is, what staging takes is
not resident but streams: that follows from it, for --streamed a sweep (what streams here, if not given). Goals:
`performance` is the smallest within 1 % of the best in the same memory; `memory-saver` 75 % less staging, at most 8 %
slower with the same weights resident.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from limited_loader import limit, limited_loaders
from streaming import options, prompt_seconds, random_store, sweep_seconds
from throttle import held_to, obstacle

from pipo_ray import LLM
from pipo_ray.plan.drive_probe import drive_profile
from pipo_ray.plan.pieces import PAGE
from pipo_ray.plan.transfer import Transfer, choose_transfer
from pipo_ray.prepare import cache_folder
from pipo_ray.session.memory import format_size, parse_size
from pipo_ray.store.manifest import Manifest

MIB = 1 << 20
SLOT_MIB = 16
SETTINGS = "2x8/2,2x8/4,2x8/5,4x8/4,4x8/5,4x8/6,8x8/6,8x8/8"
PERFORMANCE, SAVER = "performance", "memory-saver"
REAL, REAL_SAME_MEMORY = ", real", ", real, same memory"
MOST_BALLAST_MIB = 1024


def parsed(setting: str) -> Transfer:
    """Of "4x8/5": 8 reads of 4 MiB, 5 slots; "4x8/5@8": of 8 MiB."""
    reads, _, slots = setting.partition("/")
    transfer, threads = reads.split("x")
    number, _, slot_mib = slots.partition("@")
    return Transfer(
        int(float(transfer) * MIB), int(threads), int(float(slot_mib or SLOT_MIB) * MIB) + 2 * PAGE, int(number)
    )


def serve(
    connection: Connection, store: Path, resident: int, transfer: Transfer, limited: bool, prompt: int, ballast_mib: int
) -> None:
    """A session in a process of its own, because Ray allows one per process: for each transfer that comes, the seconds
    per sweep: of decoding, or with a prompt of so many tokens in it.
    """
    ballast = np.ones(ballast_mib * MIB, np.uint8)
    with limited_loaders() if limited else contextlib.nullcontext():
        llm = LLM(
            store, weight_memory=resident + transfer.staging_bytes, device="cpu", ray_address="local",
            max_kv_tokens=512 + prompt, transfer=transfer,
        )  # fmt: skip
    with llm:
        del ballast
        sweep_seconds(llm, 1)  # residents are loaded, checksums verified
        placement = llm._plan.placement
        if (placement.num_slots, placement.slot_bytes) != (transfer.num_slots, transfer.slot_bytes // PAGE * PAGE):
            raise SystemExit(f"{resident} bytes for residents are too few for staging of {transfer}; raise --resident")
        connection.send((llm._plan.streamed_bytes_per_sweep, llm.report()["resident_bytes"]))
        while (order := connection.recv()) is not None:
            mine, sweeps = order
            if limited:
                limit(llm, mine)
            # The first token's sweep uses up what was read ahead in the turn before, and is not counted.
            connection.send(prompt_seconds(llm, sweeps, prompt) if prompt else sweep_seconds(llm, sweeps))


class SessionProcess:
    """Another process with a session in it. A context manager."""

    def __init__(self, *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, *arguments))
        self._process.start()
        theirs.close()
        try:
            self.streamed_bytes, self.resident_bytes = self._connection.recv()
        except EOFError:
            raise SystemExit("a session did not start: see above") from None

    def seconds(self, transfer: Transfer, sweeps: int) -> float:
        """Per sweep."""
        self._connection.send((transfer, sweeps))
        return float(self._connection.recv())

    def __enter__(self) -> SessionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join()


@contextlib.contextmanager
def busy_programs(number: int) -> Iterator[None]:
    """So many other programs, each of which computes half of the time, 10 to 50 ms at once."""
    spawn = multiprocessing.get_context("spawn")
    programs = [spawn.Process(target=_compute_at_times, args=(seed,), daemon=True) for seed in range(number)]
    for program in programs:
        program.start()
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.join()


def _compute_at_times(seed: int) -> None:
    chance = random.Random(seed)
    while True:
        end = time.monotonic() + chance.uniform(0.01, 0.05)
        while time.monotonic() < end:
            pass
        time.sleep(chance.uniform(0.01, 0.05))


def settings(arguments: argparse.Namespace, store: Path, streamed: int) -> dict[str, Transfer]:
    """By name: the two modes, as a run chooses them of whose model so much streams, and --settings."""
    profile = drive_profile(store, cache_folder())
    sizes = {"model_bytes": streamed, "weight_bytes": 0}
    found = {mode: choose_transfer(profile, mode, **sizes) for mode in (PERFORMANCE, SAVER)}  # type: ignore[arg-type]
    if not arguments.modes:
        found |= {name: parsed(name) for name in arguments.settings.split(",") if parsed(name) != found[PERFORMANCE]}
    return found


@contextlib.contextmanager
def sessions(
    arguments: argparse.Namespace, store: Path, wanted: dict[str, Transfer], chance: random.Random
) -> Iterator[dict[str, SessionProcess]]:
    """By setting, the session that measures it; several settings have the same one."""
    resident = parse_size(arguments.resident)
    most = max(transfer.staging_bytes for transfer in wanted.values())
    with contextlib.ExitStack() as stack:

        def start(transfer: Transfer, limited: bool, kept: int = resident) -> SessionProcess:
            ballast = chance.randrange(MOST_BALLAST_MIB)
            return stack.enter_context(SessionProcess(store, kept, transfer, limited, arguments.prompt, ballast))

        by_slot = {
            slot: start(Transfer(2 * MIB, 16, slot, most // slot), True)
            for slot in sorted({transfer.slot_bytes for transfer in wanted.values()})
        }
        found = {name: by_slot[transfer.slot_bytes] for name, transfer in wanted.items()}
        for name in arguments.real.split(",") if arguments.real else ():
            more = wanted[name].staging_bytes - wanted[PERFORMANCE].staging_bytes
            found[name + REAL] = start(wanted[name], False)
            found[name + REAL_SAME_MEMORY] = start(wanted[name], False, resident - more)
        yield found


def measure(arguments: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Seconds per sweep of every setting, by sessions and rounds, and what is made of them."""
    streams = Manifest.load(store).total_bytes - parse_size(arguments.resident)
    if arguments.streamed:
        streams = parse_size(arguments.streamed)
    wanted = settings(arguments, store, streams)
    chance = random.Random(1)
    seconds: dict[str, list[list[float]]] = {}
    streamed: dict[str, int] = {}
    for number in range(arguments.sessions):
        with sessions(arguments, store, wanted, chance) as found:
            for name, session in found.items():
                seconds.setdefault(name, []).append([])
                streamed[name] = session.streamed_bytes
            end = time.monotonic() + 60 * arguments.minutes / arguments.sessions
            while time.monotonic() < end:
                names = list(found)
                chance.shuffle(names)
                for name in names:
                    transfer = wanted[name.partition(",")[0]]
                    seconds[name][-1].append(found[name].seconds(transfer, arguments.sweeps))
        print(f"session {number + 1} of {arguments.sessions}", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for name, taken in seconds.items():
        transfer = wanted[name.partition(",")[0]]
        # Residents are whole pieces, of other sizes where slots are smaller: that leaves some MiB more or less to read.
        scale = 1.0 if name.endswith(REAL_SAME_MEMORY) else streamed[PERFORMANCE] / streamed[name]
        ratios = [
            [base / (scale * mine) for base, mine in zip(one, other, strict=True)]
            for one, other in zip(seconds[PERFORMANCE], taken, strict=True)
        ]
        speed, error = middle_ratio(ratios)
        more = transfer.staging_bytes - wanted[PERFORMANCE].staging_bytes
        rows[name] = {
            "staging_bytes": transfer.staging_bytes, "slots": transfer.num_slots, "slot_bytes": transfer.slot_bytes,
            "transfer_bytes": transfer.transfer_bytes, "read_threads": transfer.read_threads, "seconds": taken,
            "streamed_bytes": streamed[name], "speed": speed, "error": error,
            "speed_same_memory": None if "," in name else speed * streams / (streams + more),
        }  # fmt: skip
    return rows


def middle_ratio(ratios: list[list[float]]) -> tuple[float, float]:
    """Of the rounds of all sessions, and its standard error: that of rounds drawn again and again (Efron's bootstrap),
    or of the sessions' if that is more. The middle is Hodges and Lehmann's, the median of the means of all pairs: a
    round that was disturbed moves it as little as a median, while all others count.
    """
    logarithms = [np.log(one) for one in ratios]
    together = np.concatenate(logarithms)
    chance = np.random.default_rng(1)
    errors = [np.std([middle(chance.choice(together, len(together))) for _ in range(500)])]
    if len(ratios) > 1:
        errors.append(np.std([middle(one) for one in logarithms], ddof=1) / math.sqrt(len(ratios)))
    speed = math.exp(middle(together))
    return speed, float(speed * max(errors))


def middle(numbers: npt.NDArray[np.float64]) -> float:
    """Median of the means of all pairs, each number with itself, too."""
    first, second = np.triu_indices(len(numbers))
    return float(np.median((numbers[first] + numbers[second]) / 2))


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=0, sweeps=3, quick="a minute, two settings")
    parser.set_defaults(size="3GiB")
    parser.add_argument("--resident", default="1GiB", help="weights that stay")
    parser.add_argument("--minutes", type=float, default=10.0, help="of sweeps, in all; default: %(default)s")
    parser.add_argument("--sessions", type=int, default=2, help="one after the other; default: %(default)s")
    parser.add_argument("--settings", default=SETTINGS, help="MiB x reads / slots; default: %(default)s")
    parser.add_argument("--streamed", help="in a sweep, of the PC that is asked about; default: as much as here")
    parser.add_argument("--rate", help="bytes per second that the drive is held to (root, blkio of cgroup v1)")
    parser.add_argument("--beside", type=int, default=0, help="so many programs that compute half of the time")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt in each sweep; default: decoding")
    parser.add_argument("--real", default="", help="settings that have a true session, too")
    parser.add_argument("--modes", action="store_true", help="nothing but the two modes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes, arguments.sessions, arguments.settings = 1.0, 1, "2x8/2,8x8/6"
    if arguments.rate and (reason := obstacle()):
        print(f"--rate {arguments.rate}: {reason}", file=sys.stderr)
        return 2
    with random_store(parse_size(arguments.size), arguments.folder) as store, contextlib.ExitStack() as stack:
        stack.enter_context(held_to(arguments.rate, store))
        stack.enter_context(busy_programs(arguments.beside))
        rows = measure(arguments, store)
    print(f"{'setting':24} {'staging':>10} {'slots':>6} {'reads':>12} {'s/sweep':>8} {'speed':>16} {'same memory':>12}")
    for name, row in sorted(rows.items(), key=lambda row: row[1]["staging_bytes"]):
        reads = f"{row['read_threads']} x {row['transfer_bytes'] / MIB:.3g} MiB"
        seconds = statistics.median(taken for one in row["seconds"] for taken in one)
        derived = row["speed_same_memory"]
        print(
            f"{name:24} {format_size(row['staging_bytes']):>10} {row['slots']:6} {reads:>12} {seconds:8.3f} "
            f"{row['speed']:7.3f} +- {row['error']:.3f} {'' if derived is None else f'{derived:12.3f}'}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
