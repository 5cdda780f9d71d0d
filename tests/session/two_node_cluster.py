"""Somebody else's Ray cluster of two nodes on one machine, of which the second has more room. Ends when stdin does."""

import os
import sys

import ray
from ray.cluster_utils import Cluster


def main() -> None:
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
