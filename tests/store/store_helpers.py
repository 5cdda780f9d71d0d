"""Tiny random checkpoints, and the block list for them, as straightforward as can be."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.manifest import Manifest
from pipo_ray.store.pack import pack
from pipo_ray.store.source import TensorSource

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SLOT_BYTES = 1 << 20

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = BASE | {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "num_local_experts": 4}


def save_random(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **options: object
) -> Path:
    """A checkpoint with random weights, norms and biases included, made by save_pretrained."""
    base = MOE if "moe" in model_type or model_type in ("mixtral", "gpt_oss") else BASE
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(base | options))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def meta_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def block_specs(model: PreTrainedModel, aliases: dict[str, str]) -> list[BlockSpec]:
    """One block per layer and one per expert; everything else, tensor by tensor, is a "rest" block."""
    tensors: dict[tuple[str, str], list[TensorSpec]] = {}
    for name, tensor in model.state_dict().items():
        if name in aliases:
            continue
        shape, dtype = tuple(tensor.shape), NAMES[tensor.dtype]
        layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if ".experts." in name and layer:
            for expert in range(shape[0]):
                key = ("expert", f"layer {layer[1]} expert {expert}")
                tensors.setdefault(key, []).append(TensorSpec(name, shape[1:], dtype, expert, "none"))
        else:
            key = ("layer", f"layer {layer[1]}") if layer else ("rest", name)
            tensors.setdefault(key, []).append(TensorSpec(name, shape, dtype, None, "rows"))
    result = []
    for (kind, name), specs in tensors.items():
        number = re.match(r"layer (\d+)", name)
        result.append(BlockSpec(name, kind, int(number[1]) if number else None, tuple(specs)))  # type: ignore[arg-type]
    return result


def pack_folder(folder: Path, destination: Path, dtype: torch.dtype = torch.bfloat16, **options: object) -> Manifest:
    model = meta_model(folder, dtype)
    with Checkpoint.open(folder) as checkpoint:
        source = TensorSource(model, checkpoint, dtype)
        arguments = {
            "checkpoint": checkpoint,
            "aliases": source.aliases,
            "architecture": checkpoint.architecture,
            "model_type": checkpoint.model_type,
            "precision": source.precision,
            "slot_bytes": SLOT_BYTES,
        }
        return pack(block_specs(model, source.aliases), source, destination, **(arguments | options))  # type: ignore[arg-type]


def stored_bytes(folder: Path, manifest: Manifest) -> dict[tuple[str, int | None], bytes]:
    """Every stored tensor's bytes, by the manifest alone."""
    return {
        (tensor.name, tensor.expert): (folder / block.file).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        for block in manifest.blocks
        for tensor in block.tensors
    }


def reference_bytes(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `from_pretrained` makes of the checkpoint."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict())


def assert_same_as_transformers(folder: Path, store: Path, dtype: torch.dtype) -> None:
    """Bit for bit, every tensor, none missing."""
    manifest = Manifest.load(store)
    reference = reference_bytes(folder, dtype)
    stored = stored_bytes(store, manifest)
    for (name, expert), data in stored.items():
        tensor = reference[name] if expert is None else reference[name][expert]
        assert data == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), (name, expert)
    assert {name for name, _ in stored} | set(manifest.aliases) == set(reference)
    for alias, name in manifest.aliases.items():
        assert torch.equal(reference[alias], reference[name])


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked child; its exit status, negative for the signal that killed it."""

    def child() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode
