"""Starts an actor's process on a lean node, in place of Ray's `setup_worker.py`.

That one imports Ray (half a second of a core, for each actor), prepares a `runtime_env`, which a lean node never has,
and then executes the worker's program, which imports Ray again. This one runs the program at once, in this process. And
it keeps pyarrow out, which Ray imports if it can, only to be ready for tables: 10 MiB for each actor.
"""

import argparse
import os
import runpy
import sys


def main() -> None:
    """Run the worker's program: the first argument that is not one of ours, with all that follow."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    _, arguments = parser.parse_known_args()
    while arguments[0] in ("-S", "-s"):  # flags of the interpreter, which has them already
        del arguments[0]
    sys.modules["pyarrow"] = None  # type: ignore[assignment]  # so that importing it fails as if it were not installed
    sys.argv[:] = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
