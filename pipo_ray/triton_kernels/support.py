"""Whether Triton's kernels can run on a CUDA device, and where what it compiles is kept. Imports no triton."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

LEAST_CAPABILITY = (8, 0)
"""Of the device: from Ampere on tensor cores multiply bf16."""


def obstacle(capability: tuple[int, int]) -> str | None:
    """Why there can be no kernels for a device of this compute capability, in words for the user; None if nothing is
    known that is in the way. Whether they compile is seen only when they are compiled.
    """
    if capability < LEAST_CAPABILITY:
        wanted = ".".join(map(str, LEAST_CAPABILITY))
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton's bf16 needs {wanted}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def keep_compiled_in(folder: Path | None) -> None:
    """Have Triton keep what it compiles in `folder`, for its user alone to read. A TRITON_CACHE_DIR that is set stays.
    To be called before anything is compiled.
    """
    if folder is not None and "TRITON_CACHE_DIR" not in os.environ:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TRITON_CACHE_DIR"] = str(folder)
