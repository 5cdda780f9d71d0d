"""`pipo pack`: checkpoint to block store."""

from __future__ import annotations

import argparse
import os
from itertools import combinations
from pathlib import Path
from typing import Any

from pipo_ray.cli.options import DTYPES, add_calibrate_option, add_precision_option, find_folder, writable
from pipo_ray.cli.terminal import progress_bar, say
from pipo_ray.errors import InputError
from pipo_ray.quant.calibration_text import can_calibrate
from pipo_ray.quant.policy import POLICY_KEY, Precision
from pipo_ray.quant.target import Target
from pipo_ray.session.memory import format_size


def add_command(commands: Any) -> None:
    """Declare `pipo pack`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pack",
        help="turn a checkpoint into a block store",
        description="Turn a checkpoint into a block store: safetensors files in the order in which they are used. "
        "`pipo run` does it by itself, into a cache. What was interrupted goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, GGUF file, or hub id (org/name)")
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="precision to store; default: the checkpoint's own"
    )
    add_precision_option(parser, "default: what a quantized checkpoint has, else 16bit")
    add_calibrate_option(parser)
    parser.add_argument("--memory", metavar="SIZE", help="with --calibrate or --precision auto: what it may take "
                        "from RAM; default: available RAM minus the larger of 2 GiB and 25 %%")  # fmt: skip
    parser.add_argument("--measure-on", metavar="FILE", help="for --precision auto: a text like those that the model "
                        "will see; default: text that comes with pipo_ray")  # fmt: skip
    parser.add_argument("--save-policy", metavar="FILE", help="write which tensor has how many bits, to read, to edit "
                        "and to give to --precision again")  # fmt: skip
    parser.add_argument(
        "--stripe", metavar="FOLDER", action="append", default=[],
        help="a folder to make on another drive, which then reads its share of the weights at the same time as that of "
        "DST; may be repeated",
    )  # fmt: skip
    parser.set_defaults(command=pack)


def pack(options: argparse.Namespace) -> int:
    """Do it. Returns the exit status."""
    from pipo_ray.auto_precision import choose_precision
    from pipo_ray.budgets import memory_budget
    from pipo_ray.prepare import cache_folder, pack_store
    from pipo_ray.quant.summary import describe_precision
    from pipo_ray.store.manifest import require_free_place

    target = Target.parse(options.precision, options.max_loss, options.max_size)
    measures = options.calibrate is not False or target is not None
    if options.memory is not None and not measures:
        raise InputError(
            "--memory is for --calibrate and --precision auto: packing alone needs no budget; leave it out"
        )
    memory = memory_budget(options.memory)[0] if measures else None
    if options.measure_on is not None and target is None:
        raise InputError("--measure-on is the text for --precision auto; give that, too, or leave --measure-on out")
    policy_file = None if options.save_policy is None else writable(Path(options.save_policy), "--save-policy")
    precision: str | Precision | None = options.precision
    calibrate: bool | str = options.calibrate
    if target is not None:
        require_free_place(Path(options.destination).absolute())
        folder = find_folder(options.source)
        with progress_bar() as progress:
            chosen = choose_precision(
                folder,
                target,
                cache=cache_folder(),
                dtype=options.dtype,
                text=options.measure_on,
                on_progress=progress,
                memory=memory,
            )
        say(str(chosen))
        precision = chosen.policy
        if calibrate is not False and not can_calibrate(precision):
            say("no weight became int4: there is nothing to calibrate")
            calibrate = False
    with progress_bar() as progress:
        manifest = pack_store(
            options.source,
            options.destination,
            dtype=options.dtype,
            precision=precision,
            on_progress=progress,
            stripes=options.stripe,
            calibrate=calibrate,
            memory=memory,
        )
    say(
        f"{options.destination}: {manifest.architecture or manifest.model_type} in {manifest.precision}, "
        f"{len(manifest.blocks)} blocks, {format_size(manifest.total_bytes)}"
    )
    for line in describe_precision(manifest):
        say(line)
    if policy_file is not None:
        Precision.from_json(manifest.extra.get(POLICY_KEY, Precision().to_json())).save(policy_file)
    folders = manifest.folders(options.destination)
    if len(folders) > 1:
        for number, folder in enumerate(folders):
            say(f"  {folder}: {format_size(sum(b.nbytes for b in manifest.blocks if b.folder == number))}")
    for first, second in combinations(folders, 2):
        if os.stat(first).st_dev == os.stat(second).st_dev:
            say(f"{first} and {second} are on the same drive: it is not read faster for being asked twice")
    return 0
