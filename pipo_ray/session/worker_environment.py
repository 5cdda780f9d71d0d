"""The environment that Ray's workers get: threads, and libraries that keep to themselves."""

from __future__ import annotations

import os


def num_threads() -> int:
    """Threads that compute: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


LEAST_KEPT_PRODUCTS = 32


def worker_environment(num_matrix_shapes: int) -> dict[str, str]:
    """Variables by name, for a sweep with so many shapes of matrices.

    For each shape of inputs and matrix torch's bf16 products keep compiled code, 0.7 MB on a processor with a matrix
    unit, in two caches of 1,024 if nothing else is said; and prompts have ever other numbers of rows, so it was
    80 MiB after 1,000 sweeps of the bundled model (`benchmarks/soak.py --join`). Two sweeps' are kept: with less than
    one's each would be compiled anew in every sweep.
    """
    threads, kept = str(num_threads()), str(max(LEAST_KEPT_PRODUCTS, 2 * num_matrix_shapes))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # A thread that spins while it waits takes a core from the loader, and from whatever else runs on the PC.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "2",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", kept),
        "LRU_CACHE_CAPACITY": os.environ.get("LRU_CACHE_CAPACITY", kept),
        "TRANSFORMERS_VERBOSITY": "error",
        # The GPU budget is planned to the last buffer; of it, ordinary segments left 1.6 of 5.2 GiB unusable in pieces.
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }
