"""The manifest: what comes back is what was saved, and a damaged or foreign one is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipo_ray.errors import StoreError
from pipo_ray.quant.panels import Panels
from pipo_ray.store.manifest import FORMAT_VERSION, Manifest, StoredBlock, StoredTensor, is_store

MANIFEST = Manifest(
    format_version=FORMAT_VERSION,
    source="/somewhere",
    architecture="LlamaForCausalLM",
    model_type="llama",
    precision="bfloat16",
    aliases={"lm_head.weight": "embed"},
    blocks=(
        StoredBlock(
            "a",
            "embedding",
            None,
            "one.safetensors",
            4096,
            4096,
            "0" * 32,
            (StoredTensor("embed", "BF16", (8, 4), None, "rows", 4096, 64),),
        ),
        StoredBlock(
            "b",
            "expert",
            3,
            "one.safetensors",
            8192,
            4096,
            "f" * 32,
            (StoredTensor("experts", "F32", (2,), 5, "none", 8192, 8),),
        ),
    ),
    total_bytes=8192,
    fingerprint="abc",
    extra={"probe": [1, 2]},
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "one.safetensors").write_bytes(bytes(12288))
    MANIFEST.save(tmp_path)
    return tmp_path


def test_what_was_saved_comes_back(store: Path) -> None:
    assert Manifest.load(store) == MANIFEST
    assert MANIFEST.files == {"one.safetensors": 12288}
    assert is_store(store)
    assert sorted(path.name for path in store.iterdir()) == ["manifest.json", "one.safetensors"]


def test_find_goes_through_aliases() -> None:
    assert MANIFEST.find("lm_head.weight") == (MANIFEST.blocks[0], MANIFEST.blocks[0].tensors[0])
    assert MANIFEST.find("experts", 5)[0].name == "b"
    with pytest.raises(KeyError):
        MANIFEST.find("experts")


def refused(store: Path, *words: str) -> None:
    with pytest.raises(StoreError) as caught:
        Manifest.load(store)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert ("not JSON" in str(caught.value)) == ("not JSON" in words)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "gone", "not a folder", "check the path")
    refused(tmp_path, "manifest.json", "check the path")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "is a checkpoint", "pipo pack")
    (tmp_path / "manifest.json").write_text('{"format_ver')
    refused(tmp_path, "not JSON", "pack the checkpoint again")


def test_half_packed(store: Path) -> None:
    (store / "packing.journal").write_text("")
    refused(store, "half packed", "pipo pack")
    assert not is_store(store)


def test_newer_format(store: Path) -> None:
    replace(MANIFEST, format_version=FORMAT_VERSION + 1).save(store)
    refused(store, f"version {FORMAT_VERSION + 1}", f"up to {FORMAT_VERSION}", "update pipo_ray")


def test_missing_and_truncated_files(store: Path) -> None:
    (store / "one.safetensors").write_bytes(bytes(12287))
    refused(store, "one.safetensors", "12287", "'b'", "12288", "truncated")
    (store / "one.safetensors").unlink()
    refused(store, "one.safetensors", "'b'", "No such file")


def change(*path: Any, to: Any) -> Callable[[Any], None]:
    def apply(raw: Any) -> None:
        for step in path[:-1]:
            raw = raw[step]
        raw[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    "edit, words",
    [
        (change("format_version", to=True), ["format_version", "True"]),
        (change("format_version", to=0), ["format version 0"]),
        (change("blocks", to={}), ["blocks", "list"]),
        (change("total_bytes", to=5), ["total_bytes is 5", "8192"]),
        (change("precision", to=None), ["precision", "None"]),
        (change("aliases", "x", to="nobody"), ["'x'", "'nobody'"]),
        (change("aliases", "embed", to="experts"), ["'embed'"]),
        (change("blocks", 0, to=7), ["a block", "name"]),
        (change("blocks", 1, "name", to="a"), ["block 'a' comes twice"]),
        (change("blocks", 0, "kind", to="odd"), ["block 'a'", "'odd'"]),
        (change("blocks", 0, "file", to="../one.safetensors"), ["block 'a'", "../one"]),
        (change("blocks", 0, "file", to="one.bin"), ["block 'a'", "one.bin"]),
        (change("blocks", 0, "checksum", to="12"), ["block 'a'", "'12'"]),
        (change("blocks", 0, "offset", to=-4096), ["block 'a'", "-4096"]),
        (change("blocks", 1, "offset", to=1 << 40), ["'experts.expert.5'", "block 'b'"]),
        (change("blocks", 1, "nbytes", to=1 << 40), ["one.safetensors", "12288", "'b'"]),
        (change("blocks", 0, "nbytes", to=8192), ["'a' and 'b' overlap"]),
        (change("blocks", 0, "tensors", 0, "offset", to=4090), ["'embed'", "leaves block 'a'"]),
        (change("blocks", 0, "tensors", 0, "nbytes", to=63), ["'embed'", "63", "takes 64"]),
        (change("blocks", 0, "tensors", 0, "shape", to=[-8, -4]), ["'embed'", "-8"]),
        (change("blocks", 0, "tensors", 0, "dtype", to="Q"), ["'embed'", "'Q'"]),
        (change("blocks", 0, "tensors", 0, "cut", to="half"), ["'embed'", "'half'"]),
        (change("blocks", 1, "tensors", 0, "expert", to="5"), ["'experts'", "'5'"]),
    ],
)
def test_entries_that_contradict_themselves(store: Path, edit: Callable[[Any], None], words: list[str]) -> None:
    raw = copy.deepcopy(json.loads((store / "manifest.json").read_text()))
    edit(raw)
    (store / "manifest.json").write_text(json.dumps(raw))
    refused(store, str(store), "again", *words)


PANELS = Panels("int4-g64", "avx512", 100, 128, 64)
PACKED = StoredTensor("w", "U8", PANELS.shape, None, "rows", 12288, 2 * PANELS.panel_bytes, PANELS)


def low_bit(tensor: StoredTensor) -> Manifest:
    block = StoredBlock("c", "mlp", 3, "one.safetensors", 12288, 12288, "e" * 32, (tensor,))
    return replace(MANIFEST, blocks=(*MANIFEST.blocks, block), total_bytes=20480)


def test_panels_come_back(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(bytes(24576))
    low_bit(PACKED).save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == low_bit(PACKED)
    assert loaded.find("w")[1].weight_shape == (100, 128)
    assert loaded.find("embed")[1].weight_shape == (8, 4)


@pytest.mark.parametrize(
    "panels, said",
    [
        (replace(PANELS, rows=300), "its panels are U8 of"),
        (replace(PANELS, columns=96), "96 columns"),
        (replace(PANELS, panel_rows=32), "32 rows each"),
        (replace(PANELS, panel_rows=0), "0 rows each"),
        (replace(PANELS, format="int2"), "2 bits"),
        (replace(PANELS, layout="neon"), "known are avx512, avx2, plain"),
        (replace(PANELS, format="int8"), "known are rows"),
    ],
)
def test_panels_that_lie_are_refused(panels: Panels, said: str, tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(bytes(24576))
    low_bit(replace(PACKED, panels=panels)).save(tmp_path)
    refused(tmp_path, said, "pack the checkpoint again")
