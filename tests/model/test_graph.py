"""Building the module graph, and refusing by name what cannot be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_SLUG, Architecture
from transformers import AutoModelForCausalLM, LlamaConfig

from pipo_ray.errors import CheckpointError, InputError, UnsupportedModelError
from pipo_ray.model import registry
from pipo_ray.model.graph import build_graph, context_length, load_config, resolve_dtype, tied_aliases
from pipo_ray.model.registry import SpecialCase

CPU = torch.device("cpu")


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["frobnicate", "t5", "vit", "clip", "whisper_x"])
def test_what_is_no_decoder_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"architecture '{model_type}' is not a decoder-only language model"
    ):
        load_config(write_config(tmp_path, {"model_type": model_type}))


@pytest.mark.parametrize("model_type", ["bart", "mbart", "pegasus", "blenderbot"])
def test_encoder_decoders_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{model_type} is an encoder-decoder"):
        load_config(write_config(tmp_path, {"model_type": model_type, "is_encoder_decoder": True}))


def test_quantized_checkpoints_are_refused_by_method(tmp_path: Path) -> None:
    raw = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(UnsupportedModelError, match="weights quantized with 'hqq' cannot be read"):
        load_config(write_config(tmp_path, raw))


def test_the_registry_can_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SPECIAL_CASES, "llama", SpecialCase(refused="it is Tuesday"))
    with pytest.raises(UnsupportedModelError, match="architecture 'llama' cannot be run: it is Tuesday"):
        load_config(write_config(tmp_path, {"model_type": "llama"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "has no model_type"),
        ("{}", "has no model_type"),
        ({"model_type": 3}, "has no model_type"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama configuration"),
        ({"model_type": "llama", "quantization_config": "gptq"}, "quantiz"),
    ],
)
def test_a_bad_config_is_one_line(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write_config(tmp_path, content))
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read \(No such file or directory\)"):
        load_config(tmp_path)


def test_a_config_that_transformers_cannot_build_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="architecture 'llama': transformers cannot build it"):
        build_graph(LlamaConfig(hidden_act="no such thing"), torch.float32, attention="eager")


@pytest.mark.parametrize(
    ("name", "own", "wanted"),
    [("auto", "bfloat16", torch.bfloat16), ("auto", None, torch.float32), ("float16", "bfloat16", torch.float16)],
)
def test_dtypes(name: str, own: str | None, wanted: torch.dtype) -> None:
    assert resolve_dtype(name, LlamaConfig(dtype=own)) == wanted


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="dtype 'int4' is not known; one of auto, bfloat16, float16, float32"):
        resolve_dtype("int4", LlamaConfig())


def test_context_lengths() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(BY_SLUG["gpt2"].config()) == 256


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.slug)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_the_model_without_its_weights(
    architecture: Architecture, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its buffers have the values, and its parameters the dtypes, that `from_pretrained` gives."""
    checkpoint = architecture.save(tmp_path)
    config = load_config(checkpoint)
    graph = build_graph(config, dtype, attention="eager", device=CPU)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager")
    assert not graph.training
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in graph.state_dict().items()} == wanted
    assert all(tensor.is_meta for tensor in graph.state_dict().values())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in wanted}
    ours = {name: buffer for name, buffer in graph.named_buffers() if name not in wanted}
    assert set(ours) == set(buffers)
    for name, buffer in buffers.items():
        assert ours[name].dtype == buffer.dtype, name
        assert torch.equal(ours[name], buffer), name
    assert set(tied_aliases(graph)) == {"lm_head.weight"} & (set(wanted) if config.tie_word_embeddings else set())


def test_a_config_that_needs_the_meta_kernels_is_built_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("mixed devices")

    monkeypatch.setattr("pipo_ray.model.graph._NativeKernels.__torch_function__", refuse)
    model = build_graph(
        LlamaConfig(num_hidden_layers=1, vocab_size=64, hidden_size=64, intermediate_size=64),
        torch.float32,
        attention="eager",
        device=torch.device("cpu"),
    )
    assert all(parameter.is_meta for parameter in model.parameters())
