"""Whether requests may share a row is found out, not listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_SLUG, LONGROPE_ORIGINAL_LENGTH, Architecture
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model import registry
from pipo_ray.model.graph import context_length
from pipo_ray.model.probe import probe, rebuild_length
from pipo_ray.model.registry import SpecialCase

# --- architectures that leak ------------------------------------------------------------------------------------------


class LeakyConfig(LlamaConfig):
    model_type = "pipo_leaky"


class LeakyForCausalLM(LlamaForCausalLM):
    """Its logits depend on the longest position in the row, as some RoPE does. Alone it is consistent."""

    config_class = LeakyConfig

    def forward(self, input_ids: Any, position_ids: Any = None, past_key_values: Any = None, **arguments: Any) -> Any:
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1])[None]
        output = super().forward(
            input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **arguments
        )
        if int(position_ids.max()) > 20:
            output.logits = output.logits * (1 + self.strength())
        return output

    def strength(self) -> Any:
        return 0.001


class MixingConfig(LlamaConfig):
    model_type = "pipo_mixing"


class MixingForCausalLM(LlamaForCausalLM):
    """Mixes neighbours along the row, and forgets them between forward passes: not even its own cache works."""

    config_class = MixingConfig

    def forward(self, input_ids: Any, **arguments: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        shifted = torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=embedded + 0.5 * shifted, **arguments)


class GatedConfig(LlamaConfig):
    model_type = "pipo_gated"


class GatedForCausalLM(LeakyForCausalLM):
    """Leaks through a gate that is shut at initialisation and open in a trained model."""

    config_class = GatedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.zeros(1))

    def strength(self) -> Any:
        return self.gate


class StatefulConfig(LlamaConfig):
    model_type = "pipo_stateful"


class StatefulForCausalLM(LlamaForCausalLM):
    """Mixes each token with the one before, and remembers that one itself instead of in the cache."""

    config_class = StatefulConfig
    last: torch.Tensor | None = None

    def forward(self, input_ids: Any, past_key_values: Any = None, **arguments: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        before = torch.zeros_like(embedded[:, :1]) if fresh else self.last
        self.last = embedded[:, -1:]
        mixed = embedded + 0.5 * torch.cat([before, embedded[:, :-1]], dim=1)  # type: ignore[list-item]
        return super().forward(inputs_embeds=mixed, past_key_values=past_key_values, **arguments)


OURS = {
    LeakyConfig: LeakyForCausalLM,
    MixingConfig: MixingForCausalLM,
    GatedConfig: GatedForCausalLM,
    StatefulConfig: StatefulForCausalLM,
}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    for config_class, model_class in OURS.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    yield
    for config_class in OURS:
        AutoModelForCausalLM._model_mapping._extra_content.pop(config_class, None)


def test_a_leak_between_requests_is_found() -> None:
    result = probe(LeakyConfig(**TINY))
    assert not result.ragged
    assert result.reason.startswith("requests run one by one within a sweep: in a shared row its logits differ by ")
    assert probe(LlamaConfig(**TINY)).ragged


def test_a_state_outside_the_cache_is_found() -> None:
    """Alone it works, with requests that take turns it does not."""
    with pytest.raises(UnsupportedModelError, match=r"'pipo_stateful': decoding with its cache gives other logits"):
        probe(StatefulConfig(**TINY))


def test_what_begins_at_zero_does_not_hide_a_leak() -> None:
    """A gate that is shut at initialisation and open in a trained model, as in Doge's attention."""
    assert not probe(GatedConfig(**TINY)).ragged
    assert not probe(AutoConfig.for_model("doge", **TINY, num_key_value_heads=2, head_dim=16)).ragged


def test_what_cannot_be_made_tiny_is_refused_before_it_takes_all_memory() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'xlstm': it cannot be probed: the smallest model of it"):
        probe(AutoConfig.for_model("xlstm"))


def test_an_architecture_whose_own_cache_does_not_work_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'pipo_mixing': decoding with its cache gives other logits"):
        probe(MixingConfig(**TINY))


def test_an_architecture_that_does_not_run_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"architecture 'llama': a tiny model of it does not run: "):
        probe(LlamaConfig(**TINY, hidden_act="no such thing"))


def test_the_registry_can_forbid_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SPECIAL_CASES, "llama", SpecialCase(ragged=False))
    result = probe(LlamaConfig(**TINY))
    assert not result.ragged
    assert result.chunked
    assert result.reason.endswith("declared in the registry")


# --- those that are promised ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.slug)
def test_promised_architectures(architecture: Architecture) -> None:
    result = probe(architecture.config())
    assert result.ragged == architecture.ragged, result.reason
    assert bool(result.reason) == (not result.ragged)


@pytest.mark.parametrize(
    ("slug", "layers"),
    [("qwen3-next", ["full_attention"] * 3), ("granite-hybrid", ["attention"] * 3)],
)
def test_a_hybrid_without_its_mixing_layers_may_share(slug: str, layers: list[str]) -> None:
    """It is the layers that leak, not the name."""
    architecture = BY_SLUG[slug]
    config = Architecture(slug, slug, architecture.model_type, {**architecture.options, "layer_types": layers}).config()
    assert probe(config).ragged


def test_a_mixing_layer_far_down_is_probed() -> None:
    architecture = BY_SLUG["qwen3-next"]
    layers = ["full_attention"] * 9 + ["linear_attention"]
    options = {**architecture.options, "layer_types": layers, "num_hidden_layers": 10}
    assert not probe(Architecture("deep", "deep", "qwen3_next", options).config()).ragged


def test_the_probe_leaves_random_numbers_and_the_configuration_alone() -> None:
    config = BY_SLUG["gemma3"].config()
    before = config.to_dict()
    state = torch.random.get_rng_state()
    probe(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert config.to_dict() == before


def test_rebuild_length() -> None:
    assert rebuild_length(BY_SLUG["phi3-longrope"].config()) == LONGROPE_ORIGINAL_LENGTH
    assert rebuild_length(BY_SLUG["phi3"].config()) is None
    assert rebuild_length(BY_SLUG["gemma3"].config()) is None


def test_dynamic_rope_does_not_change_within_the_context() -> None:
    """Its frequencies change behind `max_position_embeddings`, and no prompt may be longer: so it may share rows."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = LlamaConfig(**TINY, max_position_embeddings=40, rope_parameters=rope)
    assert rebuild_length(dynamic) == context_length(dynamic) == 40
