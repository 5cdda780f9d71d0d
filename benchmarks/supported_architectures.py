"""Make the README's table of supported architectures from the tests.

How to run (with the development tools installed; two to five minutes on two cores):

    python benchmarks/supported_architectures.py [--check] [--rows FILE]

Runs `tests/model/test_architectures.py` (float32: each architecture streamed through the smallest slots that will do,
three prompts of different lengths, 64 greedy tokens, against transformers alone) with PIPO_ARCH_TABLE set, and writes
its rows between the markers in README.md. An architecture whose test fails is an error and changes nothing. With
`--check` the README is compared instead of written: exit status 1 if an architecture or its mode differs. `--rows`
takes the rows of a run of all those tests that has passed already (with PIPO_ARCH_TABLE=FILE).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- architectures:begin -->", "<!-- architectures:end -->"
TEST = "tests/model/test_architectures.py"
_ERROR = re.compile(r"\d\.\de-?\d+")


def main() -> int:
    """Run the tests, write or check the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the README is up to date")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows that the tests have written; runs no test")
    options = parser.parse_args()
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    if not after:
        print(f"README.md has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    rows = json.loads(options.rows.read_text(encoding="utf-8")) if options.rows else measure()
    table = "\n" + as_markdown(rows) + "\n"
    if options.check:
        # The error differs a little from one processor to the next; what is supported, and how, does not.
        same = _ERROR.sub("", old) == _ERROR.sub("", table)
        print("README.md is up to date" if same else "README.md differs: run this script without --check")
        return 0 if same else 1
    README.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    print(table.strip())
    return 0


def measure() -> list[dict[str, Any]]:
    """The rows that the tests write. Exits if one of them fails."""
    with tempfile.TemporaryDirectory(prefix="pytest-arch-") as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", TEST, "-k", "test_float32_is_transformers", "-q"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PIPO_ARCH_TABLE": str(rows)}, check=True)
        loaded: list[dict[str, Any]] = json.loads(rows.read_text(encoding="utf-8"))
    return loaded


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A GitHub table of `rows`."""
    lines = [
        "| architecture | `model_type` | requests in a sweep | long prompts | largest error, float32 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        chunked = "in chunks" if row["chunked_prompts"] else "whole"
        lines.append(
            f"| {row['architecture']} | `{row['model_type']}` | {row['mode']} | {chunked} | "
            f"{row['float32_max_relative_error']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
