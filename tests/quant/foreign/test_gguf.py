"""GGUF files, packed, against what transformers and the gguf library read out of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from quant.foreign.gguf_writer import random_k_blocks, write_gguf
from quant.foreign.test_models import check_store, stored
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pipo_ray.errors import CheckpointError, InputError, ResourceError
from pipo_ray.model.graph import load_config
from pipo_ray.packing import pack_checkpoint
from pipo_ray.prepare import find_model
from pipo_ray.quant.foreign.detect import SOURCE_KEY
from pipo_ray.quant.foreign.gguf_blocks import FORMATS, GgufWeight, dequantized
from pipo_ray.quant.foreign.gguf_model import _locked, _scratch_folder, llama3_frequencies
from pipo_ray.quant.foreign.reading import TensorFiles
from pipo_ray.quant.rounding import values_of
from pipo_ray.quant.summary import describe_precision
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.gguf_file import GgufFile
from pipo_ray.store.safetensors_file import TensorHeader

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def q4_k_m(name: str) -> Kind:
    """As llama.cpp mixes types."""
    if name in ("token_embd.weight", "output.weight") or "attn_v" in name or "ffn_down" in name:
        return Kind.Q6_K
    return Kind.F32 if "ffn_gate_inp" in name else Kind.Q4_K


def theirs(file: Path, config: Any = None) -> Any:
    """transformers' model of the file, float32. By the function that `from_pretrained` calls: itself it wants
    accelerate.
    """
    config = config or AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


def weight_of(blocks: np.ndarray, kind: Kind, folder: Path) -> GgufWeight:
    """A weight whose rows are `blocks`, uint8."""
    file = folder / "blocks"
    file.write_bytes(blocks.tobytes())
    raw = Checkpoint(folder, {}, (), {"w": TensorHeader("w", "U8", blocks.shape, 0, blocks.nbytes)}, {"w": file})
    size, bytes_per = gguf.GGML_QUANT_SIZES[kind]
    shape = (len(blocks), blocks.shape[1] // bytes_per * size)
    return GgufWeight("w", shape, file, FORMATS.get(kind), TensorFiles(raw), "w", kind)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_blocks(kind: Kind, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((48, 512)).astype(np.float32)
    random = kind in (Kind.Q4_K, Kind.Q6_K)
    blocks = random_k_blocks(values.shape, kind, rng) if random else gguf.quants.quantize(values, kind)
    truth = torch.from_numpy(gguf.dequantize(blocks, kind))
    weight = weight_of(blocks.view(np.uint8).reshape(48, -1), kind, tmp_path)
    assert torch.equal(weight.rows(3, 40).values(), truth[3:40])
    if weight.low_bit is None:
        assert kind not in (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)
        return
    rounded = weight.rows(3, 40).rounded(weight.low_bit)
    scales, zeros = (part.double().repeat_interleave(32, 1) for part in rounded[1:])
    bound = truth[3:40].abs().double()
    if not weight.low_bit.symmetric:
        bound = (rounded.codes.double() - 8).abs() * scales.abs() + zeros.abs()
    error = (values_of(rounded, weight.low_bit).double() - truth[3:40]).abs()
    assert bool((error <= bound * 2.0**-8 * (1 + 2**-7)).all())
    # The codes are the file's: as many different values in a group, in the same order.
    group = slice(0, 32)
    assert torch.equal(
        torch.argsort(truth[3, group], stable=True),
        torch.argsort(values_of(rounded, weight.low_bit)[0, group], stable=True),
    )


def test_a_scale_that_bf16_holds_is_kept(tmp_path: Path) -> None:
    blocks = gguf.quants.quantize(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32), Kind.Q4_0)
    scales = blocks.reshape(-1, 18)[:, :2].copy().view(np.float16)
    blocks.reshape(-1, 18)[:, :2] = torch.from_numpy(scales).bfloat16().half().numpy().view(np.uint8)
    weight = weight_of(blocks, Kind.Q4_0, tmp_path)
    assert weight.low_bit is not None
    got = values_of(weight.rows(0, 8).rounded(weight.low_bit), weight.low_bit)
    assert torch.equal(got, torch.from_numpy(gguf.dequantize(blocks, Kind.Q4_0)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("kind", "place"),
    [(Kind.Q4_0, 0), (Kind.Q4_1, 2), (Kind.Q4_K, 0), (Kind.Q5_K, 2), (Kind.Q6_K, 208), (Kind.Q8_0, 0)],
)
def test_a_scale_that_is_not_finite(kind: Kind, place: int, value: float, tmp_path: Path) -> None:
    """`place` is that of a float16 in a block; also of the types that are dequantized."""
    rng = np.random.default_rng(0)
    random = kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
    ones = np.ones((8, 512), np.float32)
    blocks = random_k_blocks(ones.shape, kind, rng) if random else gguf.quants.quantize(ones, kind)
    blocks = blocks.view(np.uint8).reshape(8, -1)
    blocks[5, place : place + 2] = np.array([value], np.float16).view(np.uint8)
    weight = weight_of(blocks, kind, tmp_path)
    with pytest.raises(CheckpointError, match=r"'w' in .* holds a scale that is not finite"):
        weight.rows(0, 8).values()
    if weight.low_bit is not None:
        with pytest.raises(CheckpointError, match=r"'w' in .* holds a scale that is not finite"):
            weight.rows(0, 8).rounded(weight.low_bit)
    assert bool(weight.rows(0, 5).values().isfinite().all())


ROUNDED = "(codes as they are; scales and zeros rounded to bf16, by 2^-8 at most)"
MODELS = [
    ("LlamaConfig", q4_k_m, {"head_dim": 64}, f"GGUF Q4_K, Q6_K: 10 matrices repacked {ROUNDED}, 6 dequantized"),
    (
        "LlamaConfig",
        lambda name: Kind.Q4_0,
        {"tie_word_embeddings": True},
        f"GGUF Q4_0: 14 matrices repacked {ROUNDED}, 1 dequantized",
    ),
    ("Qwen2Config", lambda name: Kind.F16, {}, None),
    ("Qwen3MoeConfig", q4_k_m, {"moe_intermediate_size": 256, "head_dim": 64}, None),
    ("Gemma2Config", lambda name: Kind.BF16, {"head_dim": 64, "query_pre_attn_scalar": 64}, None),
    ("Qwen3Config", lambda name: Kind.Q8_0, {"head_dim": 32}, "GGUF Q8_0: 16 dequantized"),
]


@pytest.mark.parametrize("config, kind_of, more, line", MODELS)
def test_a_model(
    config: str, kind_of: Callable[[str], Kind], more: dict[str, Any], line: str | None, tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
) -> None:  # fmt: skip
    plain = tiny_checkpoint(config, dtype="bfloat16", **(SIZES | more))
    file = write_gguf(plain, tmp_path / "model.gguf", kind_of)
    manifest = pack_checkpoint(file, tmp_path / "store")
    assert (manifest.source, manifest.precision) == (str(file), "bfloat16")
    if config in ("Qwen3MoeConfig", "Qwen3Config"):
        # transformers takes the width of an expert, or of a head, from its defaults, and cannot load the file.
        reference = None
    else:
        reference = theirs(file)
        check_store(tmp_path / "store", manifest, reference)
    lines = describe_precision(manifest)
    if line is not None:
        assert lines[0].startswith(line)
    kept = load_config(tmp_path / "store")
    original = load_config(plain)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rope_parameters",
    ):
        assert getattr(kept, name, None) == getattr(original, name, None), name
    if config == "Qwen3Config":
        check_store(tmp_path / "store", manifest, theirs(file, load_config(tmp_path / "store")))
    elif reference is None:
        check_experts(file, tmp_path / "store", manifest)


def check_experts(file: Path, store: Path, manifest: Any) -> None:
    assert manifest.extra[SOURCE_KEY]["repacked"] == 2 * (3 + 4)  # q, k, o; gate and up of each expert
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for (name, expert), got in stored(store, manifest).items():
        if expert is None:
            continue
        layer, what = name.split(".")[2], name.split(".")[-1]
        parts = ("down",) if what == "down_proj" else ("gate", "up")
        found = [tensors[f"blk.{layer}.ffn_{part}_exps.weight"] for part in parts]
        truth = torch.cat([torch.from_numpy(gguf.dequantize(one.data, one.tensor_type)[expert]) for one in found])
        assert float((got - truth).abs().max()) <= 2**-7 * float(truth.abs().max()) * 4


def test_llama_3s_rope(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    """transformers forgets it; the file has the frequencies' divisors."""
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", **SIZES)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    frequencies = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    factors = (frequencies / llama3_frequencies(frequencies, scaling)).astype(np.float32)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    file = write_gguf(plain, tmp_path / "model.gguf", lambda name: Kind.F16, edit=edit)
    manifest = pack_checkpoint(file, tmp_path / "store")
    assert manifest.total_bytes
    got = load_config(tmp_path / "store").rope_parameters
    assert got == {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}
    factors[3] *= 1.5
    file = write_gguf(plain, tmp_path / "other.gguf", lambda name: Kind.F16, edit=edit)
    with pytest.raises(InputError, match=r"its RoPE factors are not Llama 3's"):
        pack_checkpoint(file, tmp_path / "other")


def test_scaled_positions_are_not_ignored(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", **SIZES)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    file = write_gguf(plain, tmp_path / "model.gguf", lambda name: Kind.F16, edit=edit)
    with pytest.raises(InputError, match=r"its positions are scaled .'yarn'."):
        pack_checkpoint(file, tmp_path / "store")


def test_nothing_in_the_file_is_ignored(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    """transformers' Llama out of GGUF never has biases, and would leave them out."""
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", attention_bias=True, **SIZES)
    file = write_gguf(plain, tmp_path / "model.gguf", lambda name: Kind.F16)
    with pytest.raises(InputError, match=r"has no place for tensor 'blk\.0\.attn_.*\.bias'"):
        pack_checkpoint(file, tmp_path / "store")
    writer = gguf.GGUFWriter(tmp_path / "bloom.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"of architecture 'bloom' cannot be read, only llama, qwen2"):
        pack_checkpoint(tmp_path / "bloom.gguf", tmp_path / "store")
    mixtral = write_gguf(
        tiny_checkpoint("LlamaConfig", dtype="bfloat16", **SIZES), tmp_path / "mixtral.gguf", lambda name: Kind.F16,
        edit=lambda writer: writer.add_expert_count(8),
    )  # fmt: skip
    with pytest.raises(InputError, match="files of Mixtral cannot be read"):
        pack_checkpoint(mixtral, tmp_path / "store")


def test_what_is_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    for content, said in (
        (b"PK\3\4 and so on", "is no GGUF file"),
        (b"GGUF", "is no GGUF file"),
        (b"GGUF\1\0\0\0 and so on", "is GGUF version 1, 2 and 3 can be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            GgufFile.open(file)
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(InputError, match=r"one of 3 files of a model; join them"):
        GgufFile.open(part)
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files .*name one of them"):
        find_model(tmp_path)
    part.unlink()
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    assert find_model(tmp_path) == find_model(file) == file
    with pytest.raises(CheckpointError, match=r"cannot be read .*truncated or damaged"):
        pack_checkpoint(file, tmp_path / "store")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs the gguf library: pip install 'pipo_ray\[gguf\]'"):
        GgufFile.open(file)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("old", "used", "new"):
        (tmp_path / f"pipo-gguf-{name}").mkdir()
        (tmp_path / f"pipo-gguf-{name}" / "config.json").write_text("{}")
        os.utime(tmp_path / f"pipo-gguf-{name}", (0, 0 if name != "new" else time.time()))
    with _locked(tmp_path / "pipo-gguf-used"), _scratch_folder() as folder:
        assert Path(folder).parent == tmp_path
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"pipo-gguf-used", "pipo-gguf-new", Path(folder).name}
    assert not Path(folder).exists()


def test_a_truncated_file(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    plain = tiny_checkpoint("LlamaConfig", dtype="bfloat16", **SIZES)
    file = write_gguf(plain, tmp_path / "model.gguf", lambda name: Kind.F16)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"truncated or damaged: download it again"):
        pack_checkpoint(file, tmp_path / "store")


def test_dequantized_has_the_librarys_values() -> None:
    blocks = gguf.quants.quantize(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), Kind.Q8_0)
    assert np.array_equal(dequantized(torch.from_numpy(blocks), Kind.Q8_0), gguf.dequantize(blocks, Kind.Q8_0))
