"""Checkpoint tensors to graph tensors: transformers' own result, row by row and expert by expert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from store.store_helpers import NAMES, block_specs, meta_model, reference_bytes, save_random
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pipo_ray.errors import CheckpointError
from pipo_ray.model.blocks import TensorSpec
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.source import TensorSource, _largest_magnitude


def open_source(folder: Path, dtype: torch.dtype = torch.bfloat16) -> TensorSource:
    return TensorSource(meta_model(folder, dtype), Checkpoint.open(folder), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "qwen3_5_moe_text", "phimoe"])
def test_any_rows_are_those_of_from_pretrained(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    save_random(tmp_path, model_type)
    source, reference = open_source(tmp_path, dtype), reference_bytes(tmp_path, dtype)
    specs = [spec for block in block_specs(source._model, {}) for spec in block.tensors]
    assert {spec.name for spec in specs} == set(reference)
    assert not source.missing
    for spec in specs:
        wanted = reference[spec.name] if spec.expert is None else reference[spec.name][spec.expert]
        rows = spec.shape[0]
        for start, stop in [(0, rows), (rows // 3, rows // 3 + 1), (rows, rows)]:
            rows_read = source.read(spec, start, stop)
            assert rows_read.dtype == wanted.dtype
            assert rows_read.is_contiguous()
            assert torch.equal(rows_read, wanted[start:stop]), spec


def test_fused_experts_can_be_read_whole(tmp_path: Path) -> None:
    save_random(tmp_path, "mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = reference_bytes(tmp_path, torch.bfloat16)[name]
    spec = TensorSpec(name, tuple(wanted.shape), "BF16")
    assert torch.equal(open_source(tmp_path).read(spec, 1, 3), wanted[1:3])


def test_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read for a row of one expert is that expert's tensors, once."""
    save_random(tmp_path, "qwen3_moe")
    source, read = open_source(tmp_path), []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *span: read.append(name) or original(self, name, *span))
    spec = TensorSpec("model.layers.0.mlp.experts.gate_up_proj", (96, 64), "BF16", expert=2)
    for row in range(0, 96, 24):
        source.read(spec, row, row + 24)
    assert read == [f"model.layers.0.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up")]


def test_a_rename_reads_its_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path, "llama")
    source, spans = open_source(tmp_path), []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *span: spans.append(span) or original(self, name, *span))
    source.read(TensorSpec("model.embed_tokens.weight", (256, 64), "BF16"), 10, 12)
    assert spans == [(10 * 128, 12 * 128)]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_checkpoint_of_the_base_model(tmp_path: Path, model_type: str) -> None:
    """Saved without `model.` or `transformer.`; the head is tied, so that nothing is missing."""
    save_random(tmp_path / "full", model_type, tie_word_embeddings=True)
    AutoModel.from_pretrained(tmp_path / "full", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "full")
    config.save_pretrained(tmp_path / "base")
    source, reference = open_source(tmp_path / "base"), reference_bytes(tmp_path / "full", torch.bfloat16)
    assert not any(name.startswith(("model.", "transformer.")) for name in source.checkpoint.tensors)
    assert not source.missing
    for name, wanted in reference.items():
        spec = TensorSpec(name, tuple(wanted.shape), "BF16")
        assert torch.equal(source.read(spec, 0, wanted.shape[0]), wanted), name


# --- tied tensors ---

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )


@pytest.mark.parametrize("present", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]])
def test_a_tied_head_is_an_alias_whichever_is_there(tmp_path: Path, present: list[str]) -> None:
    save_random(tmp_path, "llama", tie_word_embeddings=True)
    values = safetensors.torch.load_file(tmp_path / "model.safetensors")[EMBEDDING]
    rewrite(tmp_path, lambda tensors: (tensors.pop(EMBEDDING), tensors.update({n: values.clone() for n in present})))
    source = open_source(tmp_path)
    assert source.aliases == {HEAD: EMBEDDING}
    assert not source.missing
    assert torch.equal(source.read(TensorSpec(EMBEDDING, (256, 64), "BF16"), 0, 256), values)


def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    save_random(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    source = open_source(tmp_path)
    assert source.aliases == {}
    assert (source.read(TensorSpec(HEAD, (256, 64), "BF16"), 0, 1) > 0.1).all()


# --- what is refused ---

NORM = "model.norm.weight"


def read_all(folder: Path, dtype: torch.dtype) -> None:
    source = open_source(folder, dtype)
    blocks = block_specs(source._model, source.aliases)
    source.require(blocks)
    for block in blocks:
        for spec in block.tensors:
            source.read(spec, 0, spec.shape[0])


def refused(folder: Path, *words: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Opening the source, or reading everything, raises one line with these words."""
    with pytest.raises(CheckpointError) as caught:
        read_all(folder, dtype)
    assert all(word in str(caught.value) for word in [str(folder), *words]), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("saved"), "llama")


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def test_missing_tensors(llama: Path) -> None:
    rewrite(llama, lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name or "norm" in name])
    refused(llama, "lacks 7", "layers.0.input_layernorm.weight", "and 3 more", "config.json")


def test_a_missing_head_that_is_not_tied(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop(HEAD))
    refused(llama, "lacks 1 of", HEAD)


def test_wrong_shape(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({NORM: torch.ones(63)}))
    refused(llama, NORM, "[63]", "[64]", "model.safetensors", "config.json that belongs")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_wrong_dtype(llama: Path, dtype: torch.dtype) -> None:
    rewrite(llama, lambda tensors: tensors.update({NORM: torch.ones(64).to(dtype)}))
    name = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float64: "F64"}[dtype]
    refused(llama, NORM, f"dtype {name}", "BF16, F16, F32", "unquantized", "model.safetensors")


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("sign", [1, -1])
def test_nan(llama: Path, dtype: torch.dtype, sign: int) -> None:
    bad = torch.zeros(64, dtype=dtype)
    bad[17] = torch.copysign(torch.tensor(float("nan")), torch.tensor(float(sign)))
    rewrite(llama, lambda tensors: tensors.update({NORM: bad}))
    refused(llama, NORM, "NaN", "model.safetensors", "1 of 64", "damaged")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [70000.0, -70000.0])
def test_values_that_fp16_cannot_hold(llama: Path, stored: torch.dtype, value: float) -> None:
    bad = torch.zeros(64, dtype=stored)
    bad[3], bad[4] = value, torch.inf
    rewrite(llama, lambda tensors: tensors.update({NORM: bad}))
    refused(llama, NORM, "F16 holds up to 65504", "--dtype bfloat16", dtype=torch.float16)
    open_source(llama, torch.bfloat16)


def test_infinity_is_a_value(llama: Path) -> None:
    values = torch.full((64,), -torch.inf)
    rewrite(llama, lambda tensors: tensors.update({NORM: values}))
    for dtype, name in [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")]:
        read = open_source(llama, dtype).read(TensorSpec(NORM, (64,), name), 0, 64)
        assert torch.equal(read, values.to(dtype))


def test_an_expert_without_one_of_its_tensors(tmp_path: Path) -> None:
    save_random(tmp_path, "mixtral")
    names = Checkpoint.open(tmp_path).tensors
    gone = next(name for name in names if "layers.1" in name and ".experts.3." in name)
    rewrite(tmp_path, lambda tensors: tensors.pop(gone))
    refused(tmp_path, "layers.1", "experts")


def test_tensors_without_a_place_are_told(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"vision.weight": torch.ones(2)}))
    assert open_source(llama).unexpected == ("vision.weight",)


def test_a_spec_that_is_not_the_models(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"\(64,\) in the model"):
        open_source(llama).read(TensorSpec(NORM, (65,), "BF16"), 0, 1)


def test_buffers_of_integers_are_read_as_they_are(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"steps": torch.tensor([1, 2**40])}))
    model = meta_model(llama, torch.bfloat16)
    model.register_buffer("steps", torch.empty(2, dtype=torch.int64, device="meta"))
    source = TensorSource(model, Checkpoint.open(llama), torch.bfloat16)
    assert source.read(TensorSpec("steps", (2,), "I64"), 0, 2).tolist() == [1, 2**40]


@pytest.mark.parametrize("dtype", list(NAMES))
def test_the_largest_magnitude(dtype: torch.dtype) -> None:
    for values in [[0.0], [-0.0], [1.0, -3.0], [-1.0, 2.0], [-2.0, -5.0], [torch.inf], [-torch.inf, 1.0]]:
        data = torch.tensor(values, dtype=dtype)
        assert _largest_magnitude(data.view(torch.uint8).numpy(), dtype) == data.abs().max()


def test_all_of_it_without_a_reference_model(llama: Path) -> None:
    """The graph may hold real buffers: what the checkpoint lacks but the module computed itself is not missing."""
    model = meta_model(llama, torch.bfloat16)
    model.register_buffer("scale", torch.ones(1))
    assert not TensorSource(model, Checkpoint.open(llama), torch.bfloat16).missing
    assert AutoModelForCausalLM.from_pretrained(llama).config.vocab_size == 256
