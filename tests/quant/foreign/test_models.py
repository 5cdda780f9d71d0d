"""Whole checkpoints in foreign formats, packed: what the store holds, and what the model computes with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import PackedModel, Pipeline, random_prompts
from quant.foreign.writers import Quantized, awq_parts, gptq_parts, is_linear, quantize, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipo_ray.errors import InputError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.graph import load_config
from pipo_ray.packing import pack_checkpoint
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.foreign.detect import SOURCE_KEY, source_format
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.rounding import values_of
from pipo_ray.quant.summary import describe_precision
from pipo_ray.store.manifest import Manifest

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


class Truth:
    """What a written checkpoint's weights are, by plain name: float32."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def gptq(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """As GPTQModel writes it: o_proj with columns in another order, v_proj symmetric."""
        if not is_linear(module):
            return None
        made = quantize(weight, 4, 32, symmetric="v_proj" in module)
        order = torch.arange(weight.shape[1]) // 32
        if "o_proj" in module:
            order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
        self.values[f"{module}.weight"] = made.values(order).float()
        return gptq_parts(made, 4, order)

    def awq(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """As AutoAWQ writes it."""
        if not is_linear(module):
            return None
        made: Quantized = quantize(weight, 4, 32, symmetric=False)
        self.values[f"{module}.weight"] = made.values().float()
        return awq_parts(made)


def stored(folder: Path, manifest: Manifest) -> dict[tuple[str, int | None], torch.Tensor]:
    """Every tensor of a store, float32, panels as the values that they stand for."""
    result = {}
    for block in manifest.blocks:
        with safe_open(folder / block.file, "pt") as file:
            for tensor in block.tensors:
                data = file.get_tensor(tensor.key)
                if (panels := tensor.panels) is not None:
                    rows = [values_of(read_rows(views_of(panel, panels), panels), panels.low_bit) for panel in data]
                    data = torch.cat(rows)[: panels.rows]
                result[tensor.name, tensor.expert] = data.float()
    return result


def reference(plain: Path, truth: dict[str, torch.Tensor], tmp_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the weights as the foreign checkpoint has them."""
    from safetensors.torch import save_file

    folder = tmp_path / "reference"
    if not folder.exists():
        folder.mkdir()
        tensors = {name: tensor.float() for name, tensor in load_file(plain / "model.safetensors").items()}
        save_file(tensors | truth, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def check_store(folder: Path, manifest: Manifest, model: Any) -> None:
    """16-bit tensors are the true values in bf16, exactly; those of panels are as near as `test_integers.py` says."""
    state = model.state_dict()
    panels = {(t.name, t.expert): t.panels for block in manifest.blocks for t in block.tensors}
    for (name, expert), got in stored(folder, manifest).items():
        want = state[name] if expert is None else state[name][expert]
        if panels[name, expert] is None:
            assert torch.equal(got, want.bfloat16().float()), name
        else:
            assert float((got - want).abs().max()) <= 2**-7 * float(want.abs().max()), name


@pytest.mark.parametrize("method, repacked, dequantized", [("gptq", 6 * 2, 2), ("awq", 7 * 2, 0)])
def test_the_store_has_the_checkpoints_codes(
    method: str, repacked: int, dequantized: int, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", num_hidden_layers=2)
    truth = Truth()
    settings = {"gptq": GPTQ, "awq": AWQ}[method]
    folder = write_checkpoint(plain, tmp_path / "foreign", settings, getattr(truth, method), dtype="float16")
    manifest = pack_checkpoint(folder, tmp_path / "store")
    assert manifest.precision == "bfloat16"
    source = manifest.extra[SOURCE_KEY]
    assert [source[key] for key in ("repacked", "dequantized", "rounded_again")] == [repacked, dequantized, 0]
    exact = reference(plain, truth.values, tmp_path)
    check_store(tmp_path / "store", manifest, exact)
    line, _ = describe_precision(manifest)
    assert line.startswith(
        f"{source['label']}: {repacked} matrices repacked (codes as they are; scales and zeros rounded"
    )
    formats = {t.name: t.panels.format for block in manifest.blocks for t in block.tensors if t.panels is not None}
    assert formats["model.layers.1.mlp.up_proj.weight"] == "int4-g32"
    if method == "gptq":
        assert formats["model.layers.1.self_attn.v_proj.weight"] == "int4-g32-sym"
        assert "model.layers.1.self_attn.o_proj.weight" not in formats
    config = load_config(tmp_path / "store")
    assert not hasattr(config, "quantization_config")
    store = PackedModel(
        tmp_path / "store", config, torch.bfloat16, manifest, ModelFacts.from_json(manifest.extra["facts"])
    )
    (tokens,) = random_prompts(256, (30,))
    with Pipeline(store) as pipeline:
        (ours,) = pipeline.follow([tokens], [20])
    with torch.inference_mode():
        want = exact(input_ids=torch.tensor([tokens])).logits[0].double()
    assert float((ours.logits.double() - want).abs().max()) <= 0.04 * float(want.abs().max())


def test_codes_of_experts_are_put_together(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    """The checkpoint has gate and up of each expert, the model both in one tensor."""
    plain = tiny_checkpoint("Qwen3MoeConfig", dtype="bfloat16", num_hidden_layers=2, moe_intermediate_size=64)
    truth = Truth()
    folder = write_checkpoint(plain, tmp_path / "foreign", AWQ, truth.awq)
    assert any(".experts.3.gate_proj" in name for name in truth.values)
    manifest = pack_checkpoint(folder, tmp_path / "store")
    source = manifest.extra[SOURCE_KEY]
    assert [source[key] for key in ("repacked", "dequantized")] == [2 * (4 + 2 * 4), 0]
    check_store(tmp_path / "store", manifest, reference(plain, truth.values, tmp_path))


def test_another_precision_is_rounded_again_and_the_same_is_not(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", num_hidden_layers=1)
    truth = Truth()
    folder = write_checkpoint(plain, tmp_path / "foreign", AWQ, truth.awq)
    own = pack_checkpoint(folder, tmp_path / "own")
    same = pack_checkpoint(folder, tmp_path / "same", quantization=Precision.parse("int4-g32"))
    got = stored(tmp_path / "same", same)
    for key, tensor in stored(tmp_path / "own", own).items():
        if key[0] in truth.values:
            assert torch.equal(got[key], tensor)
    eight = pack_checkpoint(folder, tmp_path / "eight", quantization=Precision.parse("int8"))
    assert [eight.extra[SOURCE_KEY][key] for key in ("repacked", "dequantized", "rounded_again")] == [0, 0, 7]
    assert "7 dequantized and rounded again, so that accuracy is lost twice" in describe_precision(eight)[0]
    plain16 = pack_checkpoint(folder, tmp_path / "16", quantization=Precision())
    assert describe_precision(plain16) == ["AWQ int4, groups of 32: 7 dequantized"]
    check_store(tmp_path / "16", plain16, reference(plain, truth.values, tmp_path))


def test_float16_with_codes_is_refused(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", num_hidden_layers=1)
    folder = write_checkpoint(plain, tmp_path / "foreign", AWQ, Truth().awq)
    with pytest.raises(InputError, match="leave --dtype out, or add --precision 16bit"):
        pack_checkpoint(folder, tmp_path / "store", dtype="float16")
    manifest = pack_checkpoint(folder, tmp_path / "store", dtype="float16", quantization=Precision())
    assert manifest.precision == "float16"


def test_exceptions_that_change_nothing_here_are_no_obstacle() -> None:
    dynamic = {"-:.*o_proj": {"bits": 8}, "+:.*v_proj": {"bits": 4, "desc_act": False, "group_size": 32}}
    for settings in (GPTQ, AWQ):
        assert source_format({"quantization_config": settings | {"dynamic": dynamic}}, "here") is not None


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' cannot be read; known are GPTQ, AWQ"),
        ({"bits": 4}, "weights quantized with None"),
        ("gptq", "is 'gptq', not an object"),
        (GPTQ | {"bits": 5}, "GPTQ with 5 bits cannot be read, only 2, 3, 4 and 8"),
        (GPTQ | {"bits": "four"}, "bits 'four', a whole number"),
        (GPTQ | {"group_size": 0}, "group_size 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "stored as 'marlin'"),
        (AWQ | {"bits": 3}, "AWQ with 3 bits"),
        (AWQ | {"version": "gemv"}, "stored for 'gemv'"),
        (GPTQ | {"dynamic": {"-:.*k_proj": {}, "+:.*v_proj": {"bits": 8}}}, "here '+:.*v_proj' of `dynamic`"),
        (GPTQ | {"dynamic": {".*": {"group_size": 64}}}, "other bits or groups for some modules"),
        (AWQ | {"dynamic": {".*": {"group_size": 64}}}, "other bits or groups for some modules"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {}}, "transform_config": {"R1": {}}},
            "with transforms of the activations",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"0": {"weights": {"num_bits": 3, "type": "int", "strategy": "channel"}}},
            },
            "compressed-tensors int3 stored as 'pack-quantized' cannot be read",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"0": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}},
            },
            "stored as 'nvfp4-pack-quantized'",
        ),
    ],
)
def test_what_cannot_be_read_is_named(settings: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    with pytest.raises(InputError) as raised:
        load_config(tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
