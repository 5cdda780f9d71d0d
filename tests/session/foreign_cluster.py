"""Somebody else's Ray cluster, as `ray.init()` starts it: spilling on, a store of 100 MiB. Ends when stdin does."""

import os
import sys

import ray


def main() -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # or Ray would write a token into ~/.ray
    context = ray.init(
        address="local",
        _temp_dir=sys.argv[1],
        object_store_memory=100 << 20,
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
