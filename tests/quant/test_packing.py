"""Packing with low-bit weights: resumable, the same however often it was begun, and a safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import pipo_ray.store.pack as pack_module
from pipo_ray.errors import CheckpointError
from pipo_ray.packing import pack_checkpoint
from pipo_ray.prepare import pack_store
from pipo_ray.quant.policy import POLICY_KEY, Precision
from pipo_ray.store.layout import plan_files
from pipo_ray.store.manifest import PLAIN_VERSION, Manifest

INT4 = Precision.parse("int4")


class StoppedError(Exception):
    """Packing is interrupted."""


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "plan_files", lambda blocks, _: plan_files(blocks, 60_000))


@pytest.mark.usefixtures("small_files")
def test_it_goes_on_where_it_stopped(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = tiny_checkpoint("LlamaConfig", dtype="bfloat16")
    whole = pack_checkpoint(checkpoint, tmp_path / "whole", quantization=INT4)
    assert len(whole.files) > 2

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "pack" and done > total / 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack_checkpoint(checkpoint, tmp_path / "resumed", quantization=INT4, progress=stop)
    finished = [path.stat().st_mtime_ns for path in (tmp_path / "resumed.partial").glob("*.safetensors")]
    assert finished
    resumed = pack_checkpoint(checkpoint, tmp_path / "resumed", quantization=INT4)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "resumed").glob("*.safetensors")].count(finished[0]) == 1
    assert resumed == whole
    for name in whole.files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_a_store_is_a_safetensors_file_and_says_what_it_holds(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = tiny_checkpoint("LlamaConfig", dtype="bfloat16")
    manifest = pack_checkpoint(checkpoint, tmp_path / "store", quantization=INT4)
    assert manifest.format_version == PLAIN_VERSION + 1
    assert Precision.from_json(manifest.extra[POLICY_KEY]) == INT4
    _, tensor = manifest.find("model.layers.0.mlp.up_proj.weight")
    with safe_open(tmp_path / "store" / manifest.blocks[0].file, "pt") as file:
        stored = file.get_tensor(tensor.key)
    assert stored.dtype == torch.uint8
    assert tensor.panels is not None
    assert tuple(stored.shape) == tensor.panels.shape
    plain = pack_checkpoint(checkpoint, tmp_path / "plain")
    assert plain.format_version == PLAIN_VERSION
    assert POLICY_KEY not in plain.extra


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_process_that_reads_ahead_packs_the_same_bytes(
    precision: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = tiny_checkpoint("LlamaConfig", dtype="bfloat16", hidden_size=64, intermediate_size=128)
    pack_checkpoint(checkpoint, tmp_path / "ours", quantization=Precision.parse(precision))
    ours = Manifest.load(tmp_path / "ours")
    assert pack_store(checkpoint, tmp_path / "theirs", precision=precision) == ours
    for name in ours.files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_an_infinite_weight_leaves_nothing_behind(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint("LlamaConfig", dtype="bfloat16")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight' holds an infinite value"):
        pack_checkpoint(broken, tmp_path / "store", quantization=INT4)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    assert isinstance(pack_checkpoint(broken, tmp_path / "store"), Manifest)  # at 16 bits it is what the model is
