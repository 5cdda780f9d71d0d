"""Downloading from the hub, with a stand-in for the hub: what is fetched, what is reported, what each failure says."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import errors

from pipo_ray.download import download
from pipo_ray.errors import CheckpointError, InputError, ResourceError, UnsupportedModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """A repository with these files; `snapshot_download` as huggingface_hub has it."""

    def __init__(self, cache: Path, files: dict[str, bytes]) -> None:
        self.folder, self.files = cache / COMMIT, files
        self.revisions: list[Any] = []

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: Any,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        tqdm_class: Any,
        **_: Any,
    ) -> str:
        self.revisions.append(revision)
        bar = tqdm_class(desc="bytes", total=0, unit="B", unit_scale=True, name="huggingface_hub.snapshot_download")
        for name, data in self.files.items():
            wanted = any(fnmatch.fnmatch(name, one) for one in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, one) for one in ignore_patterns):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(data)
                bar.total += len(data)
                bar.update(len(data))
        return str(self.folder)


@pytest.fixture
def files(chat_checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in chat_checkpoint.iterdir()}


def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> FakeHub:
    hub = FakeHub(tmp_path, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_only_what_is_needed_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]
) -> None:
    rest = {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x", "onnx/model.safetensors": b"x", "tf.h5": b"x"}
    hub = use(monkeypatch, tmp_path, files | rest)
    calls: list[tuple[str, int, int]] = []
    folder = download("org/name", lambda *call: calls.append(call))
    assert {path.name for path in folder.rglob("*")} == files.keys()
    assert hub.revisions == [None, COMMIT]  # the weights are those of the configuration, whatever is pushed meanwhile
    assert calls[0] == ("download", 0, 0)
    assert calls[-1][1] == calls[-1][2] == sum(map(len, files.values()))


def test_shards_are_those_of_the_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]
) -> None:
    weights = files.pop("model.safetensors")
    index = json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}).encode()
    shards = {"part-1.safetensors": weights, "part-2.safetensors": weights}
    use(monkeypatch, tmp_path, files | shards | {"model.safetensors.index.json": index, "other.safetensors": b"x"})
    folder = download("org/name")
    assert {path.name for path in folder.glob("*.safetensors")} == shards.keys()


def test_an_unsupported_architecture_is_refused_before_its_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]
) -> None:
    hub = use(monkeypatch, tmp_path, files | {"config.json": b'{"model_type": "t5"}'})
    with pytest.raises(UnsupportedModelError, match="t5"):
        download("org/name")
    assert not (hub.folder / "model.safetensors").exists()
    shutil.rmtree(hub.folder)
    hub.files = {"README.txt": b"x"}
    with pytest.raises(CheckpointError, match=r"org/name has no config\.json"):
        download("org/name")


def test_pickles_alone_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> None:
    del files["model.safetensors"]
    use(monkeypatch, tmp_path, files | {"pytorch_model.bin": b"x"})
    with pytest.raises(CheckpointError, match="org/name has no safetensors weights"):
        download("org/name")


@pytest.mark.parametrize(
    "error, kind, what",
    [
        (errors.GatedRepoError("x", response=MagicMock()), InputError, "accept them at huggingface.co/org/name"),
        (errors.RepositoryNotFoundError("x", response=MagicMock()), InputError, "does not know the model org/name"),
        (errors.LocalEntryNotFoundError("x"), ResourceError, "org/name is not a folder and not in the hub's cache"),
        (TimeoutError("slow\nhub"), ResourceError, r"org/name failed \(TimeoutError: slow hub\); run it again"),
        (OSError(28, "No space left on device"), ResourceError, "No space left on device"),
    ],
)
def test_every_failure_names_the_model(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], what: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=what) as caught:
        download("org/name")
    assert "\n" not in str(caught.value)
