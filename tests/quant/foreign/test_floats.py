"""FP8 and MXFP4 checkpoints, packed, against transformers' own dequantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.foreign.test_models import check_store, reference, stored
from quant.foreign.writers import is_linear, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipo_ray.errors import CheckpointError
from pipo_ray.packing import pack_checkpoint
from pipo_ray.quant.foreign.checkpoint import open_foreign
from pipo_ray.quant.summary import describe_precision
from pipo_ray.store.checkpoint import Checkpoint

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 64], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def fp8_parts(weight: torch.Tensor, height: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Codes and a scale for each block, those at the edges smaller."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for (row, column), _ in ((place, 0) for place in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist()):
        part = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
        scales[row, column] = part.abs().max() / 448
    if dtype == torch.float8_e8m0fnu:
        scales = scales.log2().ceil().exp2()
    scales = scales.to(dtype)
    grid = scales.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return {"weight": (weight.float() / grid).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu])
def test_fp8(dtype: torch.dtype, tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", num_hidden_layers=2)
    truth: dict[str, torch.Tensor] = {}

    def parts(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_linear(module):
            return None
        made = fp8_parts(weight, 32, 64, dtype)
        scales: Any = made["weight_scale_inv"].float()
        truth[f"{module}.weight"] = Fp8Dequantize(None)._dequantize_one(made["weight"], scales, torch.float32)
        return made

    folder = write_checkpoint(plain, tmp_path / "foreign", FP8, parts)
    manifest = pack_checkpoint(folder, tmp_path / "store")
    check_store(tmp_path / "store", manifest, reference(plain, truth, tmp_path))
    assert describe_precision(manifest) == ["FP8, blocks of 32 x 64: 14 dequantized"]


def test_fp8_blocks_at_the_edges_are_smaller(tmp_path: Path) -> None:
    weight = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    made = fp8_parts(weight, 32, 64)
    found = one_weight(tmp_path, FP8, {f"up.{name}": tensor for name, tensor in made.items()})
    assert torch.equal(found.rows(30, 40).values(), found.rows(0, 50).values()[30:40])
    grid = made["weight_scale_inv"].repeat_interleave(32, 0)[:50].repeat_interleave(64, 1)[:, :100]
    assert torch.equal(found.rows(0, 50).values(), made["weight"].float() * grid)


def one_weight(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    import json

    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    found = open_foreign(Checkpoint.open(folder))
    assert found is not None
    (weight,) = found.weights.values()
    return weight


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda parts: parts.pop("weight_scale_inv"), r"weight 'up\.weight' lacks 'up\.weight_scale_inv'"),
        (lambda parts: parts["weight_scale_inv"].__setitem__((0, 0), torch.inf), "holds the scale inf"),
        (lambda parts: parts["weight_scale_inv"].__setitem__((0, 0), 0), "holds the scale 0 "),
        (lambda parts: parts.update(weight_scale_inv=torch.ones(1, 2)), r"shape \[1, 2\], blocks of 32 x 64"),
    ],
)
def test_damaged_fp8(damage: Callable[[dict[str, Any]], object], said: str, tmp_path: Path) -> None:
    parts = fp8_parts(torch.ones(64, 128), 32, 64)
    damage(parts)
    with pytest.raises(CheckpointError, match=said):
        one_weight(tmp_path, FP8, {f"up.{name}": tensor for name, tensor in parts.items()})


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_compressed_tensors_fp8(strategy: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        arguments["block_structure"] = [32, 64]
    scale = {"channel": weight.abs().amax(1, keepdim=True), "tensor": weight.abs().max().view(1)}.get(strategy)
    if scale is None:
        scale = weight.view(2, 32, 2, 64).abs().amax((1, 3))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor: Any = BaseCompressor.get_value_from_registry("float-quantized")
    made = compressor.compress({"weight": weight, "weight_scale": scale / 448}, scheme)
    want = compressor.decompress(made, scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }
    found = one_weight(tmp_path, settings, {f"up.{name}": tensor for name, tensor in made.items()})
    assert torch.equal(found.rows(0, 64).values(), want.float())


def mxfp4_checkpoint(plain: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Random blocks for the experts of a gpt-oss checkpoint; what transformers makes of them."""
    generator = torch.Generator().manual_seed(0)
    tensors, truth = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
            scales = torch.randint(118, 124, (experts, outputs, inputs // 32), generator=generator).to(torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            truth[name] = convert_moe_packed_tensors(blocks, scales).float()
        else:
            tensors[name] = tensor
    write_checkpoint(plain, folder, MXFP4, lambda module, weight: None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return truth


@pytest.fixture
def gpt_oss(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> tuple[Path, dict[str, torch.Tensor]]:
    plain = tiny_checkpoint("GptOssConfig", dtype="bfloat16", num_hidden_layers=2, intermediate_size=96)
    return plain, mxfp4_checkpoint(plain, tmp_path / "foreign")


def test_mxfp4(gpt_oss: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    plain, truth = gpt_oss
    manifest = pack_checkpoint(tmp_path / "foreign", tmp_path / "store", slot_bytes=1 << 17)
    check_store(tmp_path / "store", manifest, reference(plain, truth, tmp_path))
    for (name, expert), got in stored(tmp_path / "store", manifest).items():
        if expert is not None and name in truth:
            assert torch.equal(got, truth[name][expert]), "bf16 holds all of it"
    assert describe_precision(manifest) == ["MXFP4, groups of 32: 16 dequantized"]


def test_any_rows_of_mxfp4(gpt_oss: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    found = open_foreign(Checkpoint.open(tmp_path / "foreign"))
    assert found is not None
    name = "model.layers.1.mlp.experts.down_proj"
    whole = gpt_oss[1][name].flatten(0, 1)
    for start, stop in ((0, 96), (5, 40), (90, 200), (96 * 4 - 1, 96 * 4)):
        assert torch.equal(found.weights[name].rows(start, stop).values(), whole[start:stop])


def test_damaged_mxfp4(gpt_oss: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    file = tmp_path / "foreign" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_scales"][1, 2, 0] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{name}_scales' .* holds the scale 255, .* 255 is NaN"):
        pack_checkpoint(tmp_path / "foreign", tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()
    del tensors[f"{name}_scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"weight '{name}' lacks '{name}_scales'"):
        pack_checkpoint(tmp_path / "foreign", tmp_path / "store")
