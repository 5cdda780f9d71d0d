"""What is known of a model before it runs: the traced order of use, the probe's answers, sizes. Kept in the store's
manifest as JSON.

Importing this needs no torch; finding the facts does (`find_facts` in `model/inspect.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

FACTS_KEY = "facts"
RAGGED_ATTENTION = "pipo_ragged"
"""Our own attention function (`model/attention.py`), under the name that transformers knows it by."""


@dataclass(frozen=True)
class UnitFacts:
    """A unit in JSON's terms; see `model/trace.py`."""

    module: str
    tensors: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class ModelFacts:
    """`units` and `events` are the trace; `ragged`, `chunked` and `probe_reason` the probe's answers.

    `kv_bytes_per_token` counts keys and values of all layers in the run-time dtype, `state_bytes` what a sequence's
    cache takes however short it is (a recurrent state); `context_length` is in tokens; `attention` is the
    implementation that runs, RAGGED_ATTENTION or transformers' "sdpa" or "eager";
    `rebuild_length` is the sequence length at which the KV cache must be rebuilt (RoPE that changes with the length),
    or None; `kv_shapes` are the different (heads, elements of a key, elements of a value) that attention layers cache
    per token; `token_bytes` is what a sweep takes per token besides weights and KV cache (see `model/token_bytes.py`),
    None where it cannot be measured: then the sizes give an estimate. `transformers_version` is the one that the facts
    were found with: with another they are found again.
    """

    transformers_version: str
    model_type: str
    units: tuple[UnitFacts, ...]
    events: tuple[tuple[int, bool], ...]
    ragged: bool
    chunked: bool
    probe_reason: str
    rebuild_length: int | None
    kv_bytes_per_token: int
    context_length: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    attention: str
    state_bytes: int
    eos_token_ids: tuple[int, ...]
    kv_shapes: tuple[tuple[int, int, int], ...] = ()
    token_bytes: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @staticmethod
    def from_json(raw: dict[str, Any]) -> ModelFacts:
        """From the manifest. Raises KeyError or TypeError for something else, facts of earlier versions of pipo_ray
        too.
        """
        fields = dict(raw)
        fields["units"] = tuple(UnitFacts(u["module"], tuple(u["tensors"]), u["kind"]) for u in raw["units"])
        fields["events"] = tuple((int(u), bool(enters)) for u, enters in raw["events"])
        fields["eos_token_ids"] = tuple(raw["eos_token_ids"])
        fields["kv_shapes"] = tuple((int(h), int(k), int(v)) for h, k, v in raw["kv_shapes"])
        if (measured := raw["token_bytes"]) is not None:
            fields["token_bytes"] = int(measured[0]), int(measured[1])
        return ModelFacts(**fields)


def installed_transformers() -> str:
    """Version of the installed transformers, without importing it."""
    return version("transformers")
