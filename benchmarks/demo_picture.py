"""Make docs/demo.svg, the picture in the README, from real runs of what `make demo` runs, at 16 bits and at 4.

How to run (two cores: about two minutes; nothing else may be busy on the machine, or the figures mislead):

    python benchmarks/demo_picture.py [--output docs/demo.svg] [-- --ray-address local]

The command lines are those of the Makefile. What follows `--` is added to them and not shown. The model is packed into
an empty cache, as on a fresh clone.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100


def main() -> int:
    """Run the demo, write the picture. Returns the demo's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "demo.svg")
    parser.add_argument("more", nargs="*", help="options that are added to the command")
    options = parser.parse_args()
    with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory(prefix="pytest-demo-") as cache:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, highlight=False)
        console.print(Text("$ make demo", style="bold green"))
        environment = os.environ | {"PIPO_CACHE": cache, "HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH)}
        for command in demo_commands():
            # One pipe for both: the lines come in the order in which a terminal would show them.
            run = subprocess.run(
                [sys.executable, "-m", "pipo_ray.cli", *command[1:], *options.more],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            print(run.stdout, end="")
            if run.returncode:
                return run.returncode
            console.print(Text(shlex.join(command), style="dim"))
            console.print(Text(run.stdout.rstrip("\n")))
    # Without a fixed id the same text would give another file every time. The fonts are the reader's own: nothing is
    # fetched from elsewhere.
    svg = console.export_svg(title="make demo", unique_id="pipo-demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    options.output.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"wrote {options.output}", file=sys.stderr)
    return 0


def demo_commands() -> list[list[str]]:
    """What `make demo` runs, each as words that begin with "pipo". Raises ValueError if it runs nothing of ours."""
    printed = subprocess.run(
        ["make", "-s", "-n", "demo"], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    commands = [
        ["pipo", *shlex.split(found[1])] for found in re.finditer(r"^(?:\S+=\S+ )*\S+/pipo (.*)$", printed, re.M)
    ]
    if not commands:
        raise ValueError("make demo runs no pipo")
    return commands


if __name__ == "__main__":
    sys.exit(main())
