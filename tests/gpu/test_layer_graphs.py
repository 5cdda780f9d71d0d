"""CUDA graphs of layers: the same logits as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_SLUG
from harness import Followed, PackedModel, Pipeline, pack_checkpoint, random_prompts, relative_errors
from pipeline.pages_on_disk import pages_on_disk

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import instruction_set
from pipo_ray.model.kv_host import HostKV
from pipo_ray.pipeline.cuda_graph import CudaGraphs
from pipo_ray.pipeline.host_functions import HostFunctions
from pipo_ray.quant.policy import Precision

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
PROMPT_LENGTHS = (3, 9, 6)
LENGTHS = (40, 30, 25)
JOINS = (0, 2, 9)


def packed(slug: str, folder: Path, dtype: torch.dtype, precision: str | None = None) -> PackedModel:
    BY_SLUG[slug].save(folder / "checkpoint")
    few = None if precision is None else Precision.parse(precision)
    return pack_checkpoint(folder / "checkpoint", folder / "store", dtype, few, panel_bytes=1)


def follow(model: PackedModel, graphs: bool, **options: Any) -> tuple[list[Followed], Pipeline]:
    sequences = random_prompts(model.facts.vocab_size, LENGTHS)
    made = CudaGraphs(DEVICE, 1 << 30) if graphs else None
    with Pipeline(model, device=DEVICE, gpu_resident_pieces=None, graphs=made, **options) as pipeline:
        return pipeline.follow(sequences, PROMPT_LENGTHS, JOINS), pipeline


def worst(found: list[Followed], wanted: list[Followed]) -> float:
    return max(
        max(relative_errors(ours.logits.cpu(), theirs.logits.cpu())) for ours, theirs in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("slug", ["llama", "gemma2", "opt", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"kv_pool": 150}, {}, {"kv_pages": (12, 12)}, {"kv_bits": (4, 4, 4)}],
    ids=["pool", "apart", "tiers", "4-bits"],
)
def test_logits_are_those_without(slug: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    if "kv_bits" in options:
        options = {"kv_bits": (4,) * BY_SLUG[slug].config().num_hidden_layers}
    model = packed(slug, tmp_path, dtype)
    wanted, _ = follow(model, False, **options)
    found, pipeline = follow(model, True, **options)
    assert worst(found, wanted) <= (1e-5 if dtype is torch.float32 else 0.02)
    assert pipeline.graphs is not None
    assert pipeline.graphs.sweeps >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_in_ram(dtype: torch.dtype, tmp_path: Path) -> None:
    """The processor attends, in 16 bits by its kernel."""
    model = packed("llama", tmp_path, dtype)
    kernel = None if dtype is torch.float32 or instruction_set() is None else CompiledAttention(tmp_path / "code")
    calls = HostFunctions(DEVICE)
    options = {"kv_store": lambda *_: HostKV(DEVICE, kernel, calls)}
    wanted, _ = follow(model, False, **options)
    found, pipeline = follow(model, True, **options)
    assert worst(found, wanted) <= (1e-5 if dtype is torch.float32 else 0.02)
    assert pipeline.graphs is not None
    assert pipeline.graphs.sweeps >= 8


def test_keys_and_values_on_the_drive(tmp_path: Path) -> None:
    model = packed("llama", tmp_path, torch.float32)
    prompts = random_prompts(model.facts.vocab_size, (900, 300))
    found = []
    for graphs in (None, CudaGraphs(DEVICE, 1 << 30)):
        with (
            pages_on_disk(model.facts, tmp_path, 15) as kv_store,
            Pipeline(
                model, device=DEVICE, gpu_resident_pieces=None, chunk=200, kv_store=kv_store, graphs=graphs
            ) as pipeline,
        ):
            found.append(pipeline.greedy(prompts, 40))
    assert found[1] == found[0]
    assert pipeline.graphs is not None
    assert pipeline.graphs.sweeps >= 30


def test_places_that_no_token_has_change_nothing(tmp_path: Path) -> None:
    """Five sequences take the graphs of six; then they end one by one."""
    model = packed("llama", tmp_path, torch.float32)
    sequences = random_prompts(model.facts.vocab_size, (40, 36, 32, 28, 24))
    found = []
    for graphs in (None, CudaGraphs(DEVICE, 1 << 30)):
        with Pipeline(model, device=DEVICE, gpu_resident_pieces=None, kv_pool=200, graphs=graphs) as pipeline:
            found.append(pipeline.follow(sequences, (4, 4, 4, 4, 4)))
    assert worst(*found) <= 1e-5
    assert pipeline.graphs is not None
    assert pipeline.graphs.sweeps >= 20


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_low_bit_weights(precision: str, tmp_path: Path) -> None:
    model = packed("llama", tmp_path, torch.bfloat16, precision)
    found, pipeline = follow(model, True, kv_pool=150)
    assert worst(found, follow(model, False, kv_pool=150)[0]) <= 0.02
    assert pipeline.graphs is not None
    assert pipeline.graphs.sweeps >= 8


def test_a_layer_that_asks_the_device_stays_a_module(tmp_path: Path) -> None:
    model = packed("mixtral", tmp_path, torch.float32)
    found, _ = follow(model, True, kv_pool=150)
    assert worst(found, follow(model, False, kv_pool=150)[0]) <= 1e-5


def test_a_capture_that_fails_leaves_the_device_as_it_was(tmp_path: Path) -> None:
    """What only a capture finds out: copying from memory that is not pinned."""
    model = packed("llama", tmp_path, torch.float32)
    sequences = random_prompts(model.facts.vocab_size, LENGTHS)
    wanted, _ = follow(model, False, kv_pool=150)
    graphs = CudaGraphs(DEVICE, 1 << 30)
    with Pipeline(model, device=DEVICE, gpu_resident_pieces=None, graphs=graphs, kv_pool=150) as pipeline:
        layer = pipeline.model.model.layers[1].mlp
        layer.register_forward_pre_hook(_wait_in_capture)
        found = pipeline.follow(sequences, PROMPT_LENGTHS, JOINS)
        assert pipeline.graphs is not None
        assert pipeline.graphs.sweeps >= 8
    assert worst(found, wanted) <= 1e-5
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    memory = torch.empty(1 << 20, device=DEVICE)
    assert torch.cuda.memory_allocated() >= before + memory.nbytes


def _wait_in_capture(*_: object) -> None:
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream().synchronize()
