"""The environment that Ray's workers get: threads, and libraries that keep to themselves."""

from __future__ import annotations

import os


def num_threads() -> int:
    """Threads that compute: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_environment() -> dict[str, str]:
    """Variables by name."""
    threads = str(num_threads())
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # A thread that spins while it waits takes a core from the loader, and from whatever else runs on the PC.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "2",
        "TRANSFORMERS_VERBOSITY": "error",
        # The GPU budget is planned to the last buffer; of it, ordinary segments left 1.6 of 5.2 GiB unusable in pieces.
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }
