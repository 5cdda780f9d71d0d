"""What the meta graph says that a token takes is what it takes when the model runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_SLUG, VOCAB_SIZE, Architecture
from fake_device import FakeDevice
from harness import PackedModel, Pipeline, pack_checkpoint, random_prompts
from transformers import LlamaForCausalLM

from pipo_ray.model.batch import PrefixPart, SweepEntry
from pipo_ray.model.cpu_linear import CpuProducts, always
from pipo_ray.model.layer_replay import layer_kinds
from pipo_ray.model.live_bytes import LiveBytes
from pipo_ray.model.low_bit import LowBitProducts, always_low_bit
from pipo_ray.model.token_bytes import token_bytes
from pipo_ray.model.trace import trace_config
from pipo_ray.plan.activations import Place, activation_bytes
from pipo_ray.plan.kv_pages import pages_of
from pipo_ray.quant.panels import machine_layout
from pipo_ray.quant.policy import Precision

HIDDEN, LAYERS, LONGEST = 256, 2, 4096


def enlarged(slug: str) -> Architecture:
    """So large that what a sweep takes for each token is nearly all that it takes."""
    one = BY_SLUG[slug]
    options = dict(one.options) | {
        "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": LONGEST,
    }  # fmt: skip
    if slug == "opt":
        options |= {"ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN}
    if slug == "gpt2":
        options |= {"n_embd": HIDDEN, "n_head": 8, "n_layer": LAYERS, "n_positions": LONGEST}
    return replace(one, options=options)


@pytest.fixture(scope="module")
def packed_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PackedModel]:
    """packed_as(slug, dtype, precision): made once each, and read only."""

    @cache
    def pack(slug: str, dtype: str, precision: Precision | None = None) -> PackedModel:
        folder = tmp_path_factory.mktemp(slug)
        checkpoint = enlarged(slug).save(folder / "checkpoint", dtype=dtype)
        return pack_checkpoint(checkpoint, folder / "store", getattr(torch, dtype), precision)

    return pack


def peak_of_sweep(pipeline: Pipeline, lengths: tuple[int, ...]) -> int:
    """Bytes of a sweep over whole prompts of these lengths."""
    prompts = random_prompts(VOCAB_SIZE, lengths)
    entries = [SweepEntry(str(i), tuple(ids), 0, len(ids), logits="last") for i, ids in enumerate(prompts)]
    with LiveBytes() as live:
        pipeline.runner.run(entries)
    return live.peak


def planned_bytes(packed: PackedModel, tokens: int, place: Place = "gpu") -> int:
    """What the plan has for so many tokens; what does not depend on their number is left out."""
    itemsize = 4 if packed.dtype == torch.float32 else 2
    with_tokens, without = (
        activation_bytes(packed.facts, count, 1, itemsize, LONGEST, place=place) for count in (tokens, 0)
    )
    return with_tokens - without


ONE, SEVERAL = (1024,), (500, 24, 500)


@pytest.mark.parametrize(
    ("slug", "dtype", "lengths"),
    [
        ("llama", "bfloat16", ONE),
        ("llama", "float32", SEVERAL),
        ("opt", "bfloat16", SEVERAL),
        ("phi3", "bfloat16", ONE),
        ("gpt2", "float32", ONE),
    ],
)
@pytest.mark.parametrize("slot_bytes", [200 << 10, 4 << 20], ids=["in-parts", "whole"])
def test_a_sweep_takes_no_more_than_planned_and_not_much_less(
    slug: str, dtype: str, lengths: tuple[int, ...], slot_bytes: int, packed_as: Callable[..., PackedModel]
) -> None:
    packed = packed_as(slug, dtype)
    assert packed.facts.token_bytes is not None
    with Pipeline(packed, slot_bytes=max(slot_bytes, packed.least_slot_bytes), chunk=None) as pipeline:
        peak = peak_of_sweep(pipeline, lengths)
    planned = planned_bytes(packed, sum(lengths))
    assert 1.1 * peak < planned < 1.75 * peak
    assert planned_bytes(packed, sum(lengths), "cpu") >= planned


@pytest.mark.parametrize("kernel", ["native", "wide"])
def test_so_does_one_with_low_bit_weights(kernel: Any, packed_as: Callable[..., PackedModel]) -> None:
    packed = packed_as("llama", "bfloat16", Precision.parse("int8"))
    products = LowBitProducts(always_low_bit(kernel), machine_layout())
    with Pipeline(packed, chunk=None, low_bit=products) as pipeline:
        peak_of_sweep(pipeline, (40,))  # makes what weights are unpacked to, which stays
        peak = peak_of_sweep(pipeline, ONE)
    planned = planned_bytes(packed, sum(ONE))
    assert 1.1 * peak < planned < 2 * peak


@pytest.mark.parametrize("slug", ["llama", "opt"])
@pytest.mark.parametrize("lengths", [ONE, SEVERAL], ids=["one", "several"])
def test_a_device_with_16_bit_weights_takes_less(
    slug: str, lengths: tuple[int, ...], packed_as: Callable[..., PackedModel]
) -> None:
    packed, device = packed_as(slug, "bfloat16"), FakeDevice()
    pages = LAYERS * sum(pages_of(length) for length in lengths)
    with Pipeline(
        packed, slot_bytes=200 << 10, chunk=None, ops=device, kv_pages=(pages, 0),
        products=CpuProducts(always("native")),
    ) as pipeline, device.watching():  # fmt: skip
        peak = peak_of_sweep(pipeline, lengths)
    planned = planned_bytes(packed, sum(lengths), "lean gpu")
    assert 1.1 * peak < planned < 1.6 * peak
    assert planned < planned_bytes(packed, sum(lengths))


def test_a_prompt_behind_a_shared_prefix_stays_within_the_plan(packed_as: Callable[..., PackedModel]) -> None:
    """Its attention is merged in float32."""
    packed = packed_as("opt", "bfloat16")
    (prompt,) = random_prompts(VOCAB_SIZE, (2048,))
    with Pipeline(packed, chunk=None) as pipeline:
        pipeline.runner.run([SweepEntry("first", tuple(prompt[:1024]), 0, 1024, logits="none")])
        prefix = (PrefixPart("first", 1024, "share"),)
        entry = SweepEntry("second", tuple(prompt[1024:]), 1024, 2048, logits="last", prefix=prefix)
        with LiveBytes() as live:
            pipeline.runner.run([entry])
    assert 1.1 * live.peak < planned_bytes(packed, 1024) < 2 * live.peak


@pytest.mark.parametrize("slug", ["mixtral", "falcon"])
def test_where_the_graph_cannot_tell_nothing_is_said(slug: str) -> None:
    """Experts: how many tokens each has is a matter of values. Falcon makes scores of all pairs."""
    model, _ = trace_config(enlarged(slug).config(), torch.bfloat16)
    assert token_bytes(model) is None


@pytest.mark.parametrize("one", ARCHITECTURES, ids=lambda one: one.slug)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_of_one_kind_stand_for_each_other(
    one: Architecture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, and only some of them are run: of any architecture no more than there are kinds."""
    depth = 4
    deep = {"num_hidden_layers": depth, "n_layer": depth, "max_position_embeddings": LONGEST, "n_positions": LONGEST}
    if "layer_types" in one.options:
        deep["layer_types"] = one.options["layer_types"][:2] * (depth // 2)
    model, _ = trace_config(replace(one, options=dict(one.options) | deep).config(), dtype)
    assert len(set(layer_kinds(model).values())) <= 2
    shortened = token_bytes(model)
    monkeypatch.setattr("pipo_ray.model.token_bytes.replayed_layers", lambda *_: nullcontext())
    assert shortened == token_bytes(model)


def test_nor_where_it_cannot_be_run_with_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trace_config(enlarged("llama").config(), torch.bfloat16)
    assert token_bytes(model) is not None

    def broken(self: object, *_: object, **__: object) -> None:
        raise RuntimeError("data dependent")

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    assert token_bytes(model) is None
