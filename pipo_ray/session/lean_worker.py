"""Starts an actor's process on a lean node, in place of Ray's `setup_worker.py`.

That one imports Ray (half a second of a core, for each actor), prepares a `runtime_env`, which a lean node never has,
and then executes the worker's program, which imports Ray again. This one asks the session's fork server (`fork_server`)
for a process that runs the program, and ends; the first one starts that server. Without a server it runs the program
itself.
"""

import argparse

# The raylet runs this file by its path, without the package around it.
if __package__:
    from pipo_ray.session import fork_server
else:
    import fork_server  # type: ignore[import-not-found, no-redef]


def main() -> None:
    """Run the worker's program: the first argument that is not one of ours, with all that follow."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--serialized-runtime-env-context")
    parser.add_argument("--language")
    _, arguments = parser.parse_known_args()
    while arguments[0] in ("-S", "-s"):  # flags of the interpreter, which has them already
        del arguments[0]
    program = fork_server.obtain(arguments)
    if program is not None:
        fork_server.run(program)


if __name__ == "__main__":
    main()
