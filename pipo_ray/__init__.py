"""PIPO on Ray: run a large language model on a machine it does not fit in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from pipo_ray.llm import LLM
    from pipo_ray.outputs import CompletionOutput, RequestOutput
    from pipo_ray.params import SamplingParams

_HOMES = {
    "LLM": "pipo_ray.llm",
    "SamplingParams": "pipo_ray.params",
    "RequestOutput": "pipo_ray.outputs",
    "CompletionOutput": "pipo_ray.outputs",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `pipo --help` needs neither Ray nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipo_ray' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
