"""Somebody else's Ray cluster of two nodes on one machine, of which the second has more room. Ends when stdin does."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

RAYS_FOLDER = Path("/tmp/ray")


def main() -> None:
    with rays_folder():
        run()


@contextlib.contextmanager
def rays_folder() -> Iterator[None]:
    """Ray notes the cluster's address there wherever its other files are, and takes for granted that there is one."""
    there = RAYS_FOLDER.exists()
    RAYS_FOLDER.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if not there:
            shutil.rmtree(RAYS_FOLDER, ignore_errors=True)


def run() -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # or Ray would write a token into ~/.ray
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 100 << 20,
            "include_dashboard": False,
            "temp_dir": sys.argv[1],
        },
    )
    cluster.add_node(num_cpus=8, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
