"""Opening checkpoint folders, good ones and bad ones."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pipo_ray.errors import CheckpointError
from pipo_ray.store.checkpoint import INDEX_NAME, Checkpoint

ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.int64)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    weight_map = {}
    for number, (name, array) in enumerate(ARRAYS.items()):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({name: array}, tmp_path / file)
        weight_map[name] = file
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_any_bytes_of_any_tensor(kind: str, request: pytest.FixtureRequest) -> None:
    with Checkpoint.open(request.getfixturevalue(kind)) as checkpoint:
        assert set(checkpoint.tensors) == set(ARRAYS)
        for name, array in ARRAYS.items():
            raw = array.tobytes()
            for start, stop in [(0, len(raw)), (4, 11), (len(raw), len(raw))]:
                assert checkpoint.read(name, start, stop).tobytes() == raw[start:stop]
        with pytest.raises(ValueError, match="which has 48"):
            checkpoint.read("a", 0, 49)


def test_names_what_it_is(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    assert (checkpoint.architecture, checkpoint.model_type) == ("LlamaForCausalLM", "llama")


def test_fingerprint_follows_the_weights(single: Path) -> None:
    before = Checkpoint.open(single).fingerprint()
    assert Checkpoint.open(single).fingerprint() == before
    os.utime(single / "model.safetensors", ns=(1, 1))
    assert Checkpoint.open(single).fingerprint() != before


def test_side_files_are_small_and_harmless(single: Path) -> None:
    for name in ["tokenizer.json", "chat_template.jinja", "tokenizer.model", "pytorch_model.bin", "x.py", "a.pt"]:
        (single / name).write_text("")
    (single / "additional_chat_templates").mkdir()
    (single / "additional_chat_templates" / "tools.jinja").write_text("")
    assert [str(path) for path in Checkpoint.open(single).side_files] == [
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "additional_chat_templates/tools.jinja",
    ]


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "does not exist", "check the path")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file", "config.json")
    refused(tmp_path, "no config.json", "check the path")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json is a JSON list")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refused(tmp_path, "config.json is not JSON")


def test_config_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no weights", "download them")
    (tmp_path / "pytorch_model.bin").write_text("")
    refused(tmp_path, "pytorch_model.bin", "executes code", "convert it with safetensors")
    (tmp_path / "part-7.safetensors").write_text("")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "part-7.safetensors", INDEX_NAME)
    (tmp_path / "manifest.json").write_text("{}")
    refused(tmp_path, "block store already", "use it as it is")


@contextlib.contextmanager
def not_root(folders: Sequence[Path]) -> Iterator[None]:
    """Root may read everything: be nobody for a while, who may enter `folders`."""
    if os.geteuid() != 0:
        yield
        return
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


@pytest.mark.parametrize("forbidden", [".", "config.json", "model.safetensors"])
def test_unreadable(single: Path, forbidden: str) -> None:
    (single / forbidden).chmod(0)
    with not_root(single.parents[:-1] if forbidden == "." else [single, *single.parents[:-1]]):
        refused(single, "Permission denied", "rights")
    (single / forbidden).chmod(0o700)


def test_shards_missing_truncated_or_without_their_tensor(sharded: Path) -> None:
    second = sharded / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    refused(sharded, second.name, "truncated", "'b'")
    safetensors.numpy.save_file({"c": np.zeros(2)}, second)
    refused(sharded, second.name, "lacks tensor 'b'")
    second.unlink()
    refused(sharded, second.name, "1 of 2", "download it")


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_bad_index(sharded: Path, index: str) -> None:
    (sharded / INDEX_NAME).write_text(index)
    refused(sharded, INDEX_NAME, "download it again")


def test_a_file_that_shrinks_while_it_is_read(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    os.truncate(single / "model.safetensors", checkpoint.tensors["b"].offset + 3)
    with pytest.raises(CheckpointError, match="ended in tensor 'b'"):
        checkpoint.read("b", 0, 40)
