"""Stands in for Ray's dashboard agent and runtime environment agent on a lean node: 4 MiB instead of 83 and 50.

The raylet starts both, waits for the files in which they name their ports, and ends with them. This program writes
the files ("-1": not in use, as Ray's own minimal agents do) and then waits for the raylet's end. It runs without
site-packages.
"""

import os
import sys
import time

_PORT_FILES = {
    "--runtime-env-agent-port": ("runtime_env_agent_port",),
    "--metrics-export-port": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"),
}


def main() -> None:
    """Write the port files for the agent whose options are in sys.argv, then wait until the parent is gone."""
    parent = os.getppid()
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if argument.startswith("--") and "=" in argument)
    for option, names in _PORT_FILES.items():
        if option not in options:
            continue
        for name in names:
            path = os.path.join(options["--session-dir"], f"{name}_{options['--node-id']}")
            with open(path + ".new", "w") as file:
                file.write("-1")
            os.rename(path + ".new", path)
    while os.getppid() == parent:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
