"""Finding a model's facts: trace it, probe it, add up its sizes. Needs torch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from pipo_ray.model.facts import ModelFacts, UnitFacts, installed_transformers
from pipo_ray.model.graph import context_length, load_config, resolve_dtype
from pipo_ray.model.layout import block_layout
from pipo_ray.model.probe import probe, rebuild_length
from pipo_ray.model.token_bytes import token_bytes
from pipo_ray.model.trace import Trace, Unit, recorded_kv_shapes, state_bytes, trace_config
from pipo_ray.store.manifest import Manifest


def find_facts(
    config: PretrainedConfig, dtype: torch.dtype, folder: str | Path
) -> tuple[PreTrainedModel, Trace, ModelFacts]:
    """The meta graph, its trace and the facts of the model in `folder` (for its generation config).

    Raises UnsupportedModelError for a model that cannot be run.
    """
    with recorded_kv_shapes() as kv_shapes:
        model, trace = trace_config(config, dtype)
    answers = probe(config)
    text: Any = config.get_text_config()
    facts = ModelFacts(
        transformers_version=installed_transformers(),
        model_type=config.model_type,
        units=tuple(UnitFacts(unit.module, unit.tensors, unit.kind) for unit in trace.units),
        events=trace.events,
        ragged=answers.ragged,
        # A cache that is rebuilt beyond a length is rebuilt as a whole.
        chunked=answers.chunked and rebuild_length(config) is None,
        probe_reason=answers.reason,
        rebuild_length=rebuild_length(config),
        # Of equal parts for all layers: a page must hold the widest one's tokens.
        kv_bytes_per_token=text.num_hidden_layers
        * max(heads * (key + value) for heads, key, value in kv_shapes)
        * dtype.itemsize
        if kv_shapes and answers.ragged
        else _kv_bytes_per_token(text, dtype),
        context_length=context_length(config),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=_intermediate_size(text),
        num_layers=text.num_hidden_layers,
        num_attention_heads=_num_heads(text),
        attention=answers.attention,
        state_bytes=0 if answers.ragged else state_bytes(model),
        eos_token_ids=_eos_token_ids(config, folder),
        kv_shapes=tuple(sorted(set(kv_shapes))),
        # Where each request walks alone, transformers' own cache and attention take memory, too.
        token_bytes=token_bytes(model) if answers.ragged else None,
    )
    return model, trace, facts


def trace_of(facts: ModelFacts) -> Trace:
    """The trace that the facts were found with."""
    return Trace(tuple(Unit(unit.module, unit.tensors, unit.kind) for unit in facts.units), facts.events)


def facts_of_store(folder: str | Path, manifest: Manifest) -> ModelFacts:
    """Find the facts of a packed store anew (another version of transformers).

    Raises StoreError's sibling UnsupportedModelError when this version uses the weights in another shape than they were
    packed in.
    """
    from pipo_ray.errors import StoreError

    config = load_config(folder)
    model, trace, facts = find_facts(config, resolve_dtype(manifest.precision, config), folder)
    stored = {(t.name, t.expert): t.weight_shape for block in manifest.blocks for t in block.tensors}
    for block in block_layout(model, trace, manifest.aliases):
        for spec in block.tensors:
            if stored.get((spec.name, spec.expert)) != spec.shape:
                raise StoreError(
                    f"block store {folder} was packed for another version of transformers: tensor {spec.name} is not "
                    f"there as transformers {facts.transformers_version} uses it; pack the checkpoint again"
                )
    return facts


def _kv_bytes_per_token(text: Any, dtype: torch.dtype) -> int:
    heads = _num_heads(text)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = 2 * kv_heads * head_dim
    if getattr(text, "kv_lora_rank", None):  # latent attention: transformers caches the expanded heads
        width = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    return int(text.num_hidden_layers * width * dtype.itemsize)


def _num_heads(text: Any) -> int:
    return int(getattr(text, "num_attention_heads", None) or getattr(text, "num_heads", None) or 1)


def _intermediate_size(text: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 4 * int(text.hidden_size)


def _eos_token_ids(config: PretrainedConfig, folder: str | Path) -> tuple[int, ...]:
    ids: list[int] = []
    sources: list[Any] = [config.get_text_config()]
    if (Path(folder) / "generation_config.json").exists():
        sources.insert(0, GenerationConfig.from_pretrained(str(folder), local_files_only=True))
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(token, int) and token not in ids:
                ids.append(token)
    return tuple(ids)
