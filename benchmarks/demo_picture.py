"""Make docs/demo.svg, the picture in the README, from a real run of what `make demo` runs.

How to run (two cores: about a minute; nothing else may be busy on the machine, or the figures in the picture mislead):

    python benchmarks/demo_picture.py [--output docs/demo.svg] [-- --ray-address local]

The command line comes from the Makefile's own variables. What follows `--` is added to it and not shown. The model is
packed into an empty cache, as on a fresh clone.
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
    command = demo_command()
    with tempfile.TemporaryDirectory(prefix="pytest-demo-") as cache:
        environment = os.environ | {"PIPO_CACHE": cache, "HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH)}
        # One pipe for both: the lines come in the order in which a terminal would show them.
        run = subprocess.run(
            [sys.executable, "-m", "pipo_ray.cli", *command[1:], *options.more],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    print(run.stdout, end="")
    if run.returncode:
        return run.returncode
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, highlight=False)
        console.print(Text("$ make demo", style="bold green"))
        console.print(Text(shlex.join(command), style="dim"))
        console.print(Text(run.stdout.rstrip("\n")))
    # Without a fixed id the same text would give another file every time. The fonts are the reader's own: nothing is
    # fetched from elsewhere.
    svg = console.export_svg(title="make demo", unique_id="pipo-demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    options.output.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"wrote {options.output}", file=sys.stderr)
    return 0


def demo_command() -> list[str]:
    """What `make demo` runs, as words."""
    printed = subprocess.run(
        ["make", "-s", "-n", "-f", "Makefile", "-f", "-", "words"],
        input="words:\n\t@echo $(DEMO_MODEL) --weight-memory $(DEMO_WEIGHT_MEMORY) -p '$(DEMO_PROMPT)' $(DEMO_FLAGS)\n",
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return ["pipo", "run", *shlex.split(re.sub(r"^echo ", "", printed.strip()))]


if __name__ == "__main__":
    sys.exit(main())
