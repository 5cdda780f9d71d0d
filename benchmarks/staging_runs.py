"""How much staging memory speed needs, in runs by themselves: each reads into the same few slots for ever.

How to run (twice --size of free disk while the model is made; a quarter of a minute for each setting and round):

    python benchmarks/staging_runs.py [--size 2GiB] [--resident 860MiB] [--settings 2x8/2,2x2/2@4,...] [--rounds 8]
        [--sweeps 6] [--prompt 256] [--prompt-sweeps 3] [--answer 32] [--modes] [--rate 1GB] [--precision int4]
        [--folder DIR] [--quick] [--json FILE]

Settings are written as for `staging_modes.py`, which compares them in turns within one session and over all of its
memory, because a virtual drive's rate depends on the memory that is read into. A run by itself reads into its slots
again and again; if they are few enough, the processor's cache still has them when they are computed with. So
here every setting has a session of its own, one after the other in an order that chance makes, and then all again.

Printed, for each setting: staging, seconds per sweep of decoding and of a prompt (medians), with --answer those of a
whole answer, from the prompt to the last of so many tokens; and the speed over that of `performance`, which
`choose_transfer` chooses here: the middle of the ratios within a round (Hodges and Lehmann's) and its standard error.
All keep the same weights resident. --sweeps 0 and --prompt-sweeps 0 leave theirs out, --modes all settings but the two
modes.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from staging_modes import MIB, PERFORMANCE, middle_ratio, settings
from streaming import answer_seconds, options, prompt_seconds, random_store, sweep_seconds
from throttle import held_to, obstacle

from pipo_ray import LLM
from pipo_ray.plan.transfer import Transfer
from pipo_ray.session.memory import format_size, parse_size
from pipo_ray.store.manifest import Manifest

SETTINGS = "2x8/2,2x4/3@8,2x2/2@4,2x1/2@2"
DECODING, PROMPT, ANSWER = "decoding", "prompt", "answer"


def run(store: Path, transfer: Transfer, arguments: Any) -> tuple[dict[str, float], int]:
    """Seconds per sweep of decoding and of a prompt, and of an answer, in a session of its own; and the bytes that a
    sweep streams.
    """
    with LLM(
        store, weight_memory=parse_size(arguments.resident) + transfer.staging_bytes, transfer=transfer, device="cpu",
        ray_address="local", max_kv_tokens=512 + arguments.prompt, max_batch_tokens=max(64, arguments.prompt),
    ) as llm:  # fmt: skip
        placement = llm._plan.placement
        if placement.num_slots != transfer.num_slots:
            raise SystemExit(f"{arguments.resident} for residents are too few for {transfer}; raise --resident")
        sweep_seconds(llm, 1)  # residents are loaded, checksums verified
        seconds: dict[str, float] = {}
        if arguments.sweeps:
            seconds[DECODING] = sweep_seconds(llm, arguments.sweeps)
        if arguments.prompt_sweeps:
            seconds[PROMPT] = prompt_seconds(llm, arguments.prompt_sweeps, arguments.prompt)
        if arguments.answer:
            seconds[ANSWER] = answer_seconds(llm, arguments.prompt, arguments.answer)
        return seconds, llm._plan.streamed_bytes_per_sweep


def measure(store: Path, arguments: Any) -> dict[str, Any]:
    """A row per setting."""
    wanted = settings(arguments, store, Manifest.load(store).total_bytes - parse_size(arguments.resident))
    rows: dict[str, Any] = {
        name: {
            "staging_bytes": one.staging_bytes, "slots": one.num_slots, "read_threads": one.read_threads,
            "transfer_bytes": one.transfer_bytes, "seconds": {},
        } for name, one in wanted.items()
    }  # fmt: skip
    chance = random.Random(1)
    for number in range(arguments.rounds):
        names = list(wanted)
        chance.shuffle(names)
        for name in names:
            taken, rows[name]["streamed_bytes"] = run(store, wanted[name], arguments)
            for what, seconds in taken.items():
                rows[name]["seconds"].setdefault(what, []).append(seconds)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    base = rows[PERFORMANCE]
    for row in rows.values():
        scale = base["streamed_bytes"] / row["streamed_bytes"]  # residents are whole pieces, of different sizes
        row["speed"] = {
            what: middle_ratio([[b / (scale * m) for b, m in zip(base["seconds"][what], mine, strict=True)]])
            for what, mine in row["seconds"].items()
        }
    return rows


def main() -> int:
    """The command line."""
    parser = options(__doc__, rounds=8, sweeps=6, quick="two rounds of two settings")
    parser.set_defaults(size="2GiB")
    parser.add_argument("--resident", default="860MiB", help="weights that stay")
    parser.add_argument("--settings", default=SETTINGS, help="MiB x reads / slots @ MiB; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt; default: %(default)s")
    parser.add_argument("--prompt-sweeps", type=int, default=3, help="in a round; 0: no prompts; default: %(default)s")
    parser.add_argument("--answer", type=int, default=0, help="tokens behind a prompt, timed as a whole; 0: none")
    parser.add_argument("--modes", action="store_true", help="nothing but the two modes")
    parser.add_argument("--precision", help="of the weights, for example int4 (default: 16 bits); --size is without it")
    parser.add_argument("--rate", help="bytes per second that the drive is held to (root, blkio of cgroup v1)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.settings = 2, "2x8/2"
    if arguments.rate and (reason := obstacle()):
        print(f"--rate {arguments.rate}: {reason}", file=sys.stderr)
        return 2
    with (
        random_store(parse_size(arguments.size), arguments.folder, arguments.precision) as store,
        held_to(arguments.rate, store),
    ):
        rows = measure(store, arguments)
    kinds = list(rows[PERFORMANCE]["seconds"])
    head = "".join(f"{f'{kind}, s':>12} {'speed':>16} " for kind in kinds)
    print(f"{'setting':14} {'staging':>10} {'slots':>6} {'reads':>12}{head}")
    for name, row in sorted(rows.items(), key=lambda row: -row[1]["staging_bytes"]):
        reads = f"{row['read_threads']} x {row['transfer_bytes'] / MIB:.3g} MiB"
        figures = ""
        for kind in kinds:
            speed, error = row["speed"][kind]
            figures += f"{statistics.median(row['seconds'][kind]):12.3f} {speed:7.3f} +- {error:.3f} "
        print(f"{name:14} {format_size(row['staging_bytes']):>10} {row['slots']:6} {reads:>12}{figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
