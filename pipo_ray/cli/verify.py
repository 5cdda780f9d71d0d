"""`pipo verify`: is a block store what its manifest says?"""

from __future__ import annotations

import argparse
from typing import Any

from pipo_ray.cli.terminal import progress_bar, say
from pipo_ray.session.memory import format_size


def add_command(commands: Any) -> None:
    """Declare `pipo verify`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="check every checksum of a block store",
        description="Read a block store completely and compare it with the checksums in its manifest.",
        allow_abbrev=False,
    )
    parser.add_argument("store", metavar="STORE", help="block store folder")
    parser.set_defaults(command=verify)


def verify(options: argparse.Namespace) -> int:
    """Do it. Returns the exit status; a damaged store raises StoreError."""
    from pipo_ray.store.verify import verify as verify_store

    with progress_bar() as progress:
        manifest = verify_store(options.store, lambda done, total: progress("verify", done, total))
    say(
        f"{options.store}: all checksums match: {len(manifest.blocks)} blocks in {len(manifest.files)} files, "
        f"{format_size(manifest.total_bytes)}"
    )
    return 0
