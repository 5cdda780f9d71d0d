"""The traced order of use is the order in which a real forward pass uses the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from transformers import AutoModelForCausalLM

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.graph import stored_tensors, tied_aliases
from pipo_ray.model.inspect import find_facts, trace_of
from pipo_ray.model.layout import block_layout
from pipo_ray.model.trace import layer_prefixes, trace_config

by_slug: dict[str, Any] = {"ids": lambda architecture: architecture.slug}


@pytest.mark.parametrize("architecture", ARCHITECTURES, **by_slug)
def test_the_trace_is_what_really_happens(architecture: Architecture) -> None:
    _, trace = trace_config(architecture.config(), torch.float32)
    names = {unit.module for unit in trace.units}
    model = AutoModelForCausalLM.from_config(
        architecture.config(), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    seen: list[tuple[str, bool]] = []
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, True)))
            module.register_forward_hook(lambda *_, name=name: seen.append((name, False)))
    with torch.inference_mode():
        model(input_ids=torch.randint(3, 100, (1, 9)), use_cache=False)
    assert [(trace.units[unit].module, enters) for unit, enters in trace.events] == seen


@pytest.mark.parametrize("architecture", ARCHITECTURES, **by_slug)
def test_every_parameter_has_a_unit(architecture: Architecture) -> None:
    model, trace = trace_config(architecture.config(), torch.float32)
    owned = [name for unit in trace.units for name in unit.tensors]
    assert len(owned) == len(set(owned))
    assert set(owned) == set(model.state_dict())
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("architecture", ARCHITECTURES, **by_slug)
def test_every_stored_tensor_is_in_one_block(architecture: Architecture) -> None:
    config = architecture.config()
    model, trace = trace_config(config, torch.bfloat16)
    aliases = tied_aliases(model)
    blocks = block_layout(model, trace, aliases)
    stored = stored_tensors(model)
    placed: dict[str, list[int | None]] = {}
    for block in blocks:
        for spec in block.tensors:
            placed.setdefault(spec.name, []).append(spec.expert)
            wanted = stored[spec.name] if spec.expert is None else stored[spec.name][spec.expert]
            assert spec.shape == tuple(wanted.shape)
            assert (spec.expert is not None) == (block.kind == "expert")
    assert set(placed) == set(stored)
    for name, experts in placed.items():
        assert experts in ([None], list(range(stored[name].shape[0]))), name
    # Attention and MLP of each layer, its experts, and outside the layers embeddings, rest, and the head once.
    layers = len(layer_prefixes(model))
    kinds = [block.kind for block in blocks]
    assert layers == config.num_hidden_layers
    assert (kinds.count("head"), kinds.count("rest")) == (1, 1)
    assert len({block.name for block in blocks}) == len(blocks)
    for layer in range(layers):
        mine = [block.kind for block in blocks if block.layer == layer]
        assert set(mine) == {"attention", "mlp"} | ({"expert"} if architecture.experts else set())
        assert mine.count("attention") == 1
    assert all(block.layer is None for block in blocks if block.kind in ("embedding", "rest", "head"))
    if config.tie_word_embeddings:
        (head,) = (block for block in blocks if block.kind == "head")
        assert {aliases["lm_head.weight"]} == {spec.name for spec in head.tensors}
        assert not any(aliases["lm_head.weight"] in block.name for block in blocks if block.kind == "embedding")


@pytest.mark.parametrize("architecture", ARCHITECTURES, **by_slug)
def test_blocks_are_in_the_order_of_use(architecture: Architecture) -> None:
    """Apart from looked-up tables and "rest", a block begins where the one before it ends."""
    model, trace = trace_config(architecture.config(), torch.float32)
    aliases = tied_aliases(model)
    first_use: dict[str, int] = {}
    for call, unit in enumerate(trace.calls):
        if trace.units[unit].kind != "lookup":
            for name in trace.units[unit].tensors:
                first_use.setdefault(aliases.get(name, name), call)
    order = [
        first_use[spec.name]
        for block in block_layout(model, trace, aliases)
        if block.kind not in ("embedding", "rest")
        for spec in block.tensors
    ]
    starts = [
        first_use[block.tensors[0].name]
        for block in block_layout(model, trace, aliases)
        if block.kind not in ("embedding", "rest", "expert")
    ]
    assert starts == sorted(starts)
    assert min(order) >= 0


def test_facts_survive_the_manifest(tmp_path: object) -> None:
    import json

    architecture = ARCHITECTURES[0]
    _, trace, facts = find_facts(architecture.config(), torch.float32, str(tmp_path))
    again = ModelFacts.from_json(json.loads(json.dumps(facts.to_json())))
    assert again == facts
    assert trace_of(again) == trace
    assert facts.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, bytes
    assert facts.kv_shapes == ((2, 16, 16),)
    assert (facts.vocab_size, facts.hidden_size, facts.intermediate_size, facts.num_layers) == (128, 64, 128, 3)
    assert (facts.context_length, facts.eos_token_ids, facts.rebuild_length) == (256, (2,), None)
    assert facts.token_bytes is not None
    earlier = {name: value for name, value in facts.to_json().items() if name != "token_bytes"}
    with pytest.raises(KeyError):  # then they are found anew
        ModelFacts.from_json(earlier)


def test_a_forward_pass_that_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    def broken(self: object, *_: object, **__: object) -> None:
        raise RuntimeError("data dependent")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    with pytest.raises(
        UnsupportedModelError, match=r"'llama': its forward pass cannot be traced: RuntimeError: data dependent"
    ):
        trace_config(ARCHITECTURES[0].config(), torch.float32)


def test_kv_bytes_are_those_of_the_heads_that_are_cached(tmp_path: object) -> None:
    """OPT's configuration here has `num_key_value_heads` 2, of which its attention knows nothing: it caches all 4."""
    opt = next(architecture for architecture in ARCHITECTURES if architecture.slug == "opt").config()
    assert opt.num_key_value_heads == 2
    _, _, facts = find_facts(opt, torch.bfloat16, str(tmp_path))
    assert facts.kv_bytes_per_token == 3 * 2 * 4 * 16 * 2
