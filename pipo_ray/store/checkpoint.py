"""A Hugging Face checkpoint folder, single or sharded safetensors with a `config.json`, read in bounded pieces."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipo_ray.errors import CheckpointError
from pipo_ray.store.manifest import MANIFEST_NAME
from pipo_ray.store.read_buffers import ReadBuffers
from pipo_ray.store.safetensors_file import SafetensorsFile, TensorHeader, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What tokenizers, configurations and chat templates are made of; never weights and never pickles.
_SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".spm")
_SIDE_NAMES = ("LICENSE", "LICENSE.md", "NOTICE", "README.md", "USE_POLICY.md")
_SIDE_FOLDERS = ("additional_chat_templates",)
_SIDE_LIMIT_BYTES = 256 << 20

_PAGE = 4096
_DIRECT_BYTES = 256 << 10
"""Reads of so many bytes go past the page cache: through it a single reader gets a half to a quarter of a fast drive,
and what it reads pushes out what the PC is doing meanwhile.
"""


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: `tensors` maps a name to its header, `files` a name to the file that holds it. Any number of
    threads may read.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[SafetensorsFile, ...]
    tensors: Mapping[str, TensorHeader]
    files: Mapping[str, Path]
    _descriptors: dict[tuple[Path, bool], int] = field(default_factory=dict, repr=False, compare=False)
    _buffered: set[Path] = field(default_factory=set, repr=False, compare=False)
    _buffers: ReadBuffers = field(default_factory=ReadBuffers, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Open the checkpoint in `folder` and validate the headers of all its files; no weight is read.

        Raises CheckpointError: folder missing or unreadable, config.json missing or not JSON, no weights or only
        pickles, a shard missing, truncated or with a header that lies (see `read_header`), a tensor of the index not
        in its shard.
        """
        folder = Path(folder)
        try:
            config = _read_config(folder)
            paths, weight_map = _weight_files(folder, config)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {folder} cannot be read: {error.strerror}; check the path and its rights"
            ) from error
        shards = tuple(read_header(path) for path in paths)
        tensors: dict[str, TensorHeader] = {}
        files: dict[str, Path] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                # A name in two shards: the index decides.
                if weight_map.get(name, shard.path.name) == shard.path.name:
                    tensors[name], files[name] = tensor, shard.path
        for name, shard_name in weight_map.items():
            if name not in tensors:
                raise CheckpointError(
                    f"checkpoint {folder}: shard {shard_name} lacks tensor {name!r}, which {INDEX_NAME} says it has; "
                    "download the shard again"
                )
        if not tensors:
            raise CheckpointError(
                f"checkpoint {folder}: {paths[0].name} holds no tensor; download the checkpoint again"
            )
        return cls(folder, config, shards, tensors, files)

    @property
    def origin(self) -> Path:
        """What the user named: the folder, or the file that holds all of it."""
        return self.folder

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, or the empty string."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def model_type(self) -> str:
        """config.json's `model_type`, or the empty string."""
        model_type = self.config.get("model_type")
        return model_type if isinstance(model_type, str) else ""

    @property
    def side_files(self) -> tuple[Path, ...]:
        """Files that AutoConfig, AutoTokenizer and a reader need besides the weights, relative to the folder."""
        result = []
        for folder in ("", *_SIDE_FOLDERS):
            if not (self.folder / folder).is_dir():
                continue
            for path in sorted((self.folder / folder).iterdir()):
                wanted = path.name.endswith(_SIDE_SUFFIXES) or path.name in _SIDE_NAMES
                ours = path.name == MANIFEST_NAME or path.name.endswith(".safetensors.index.json")
                if wanted and not ours and path.is_file() and path.stat().st_size <= _SIDE_LIMIT_BYTES:
                    result.append(path.relative_to(self.folder))
        return tuple(result)

    def fingerprint(self) -> str:
        """Hex that changes with the config and with the weight files' names, sizes, times of change and headers."""
        digest = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            changed = os.stat(shard.path).st_mtime_ns
            digest.update(f"{shard.path.name} {shard.size} {changed} {list(shard.tensors.values())}".encode())
        return digest.hexdigest()

    def is_plain(self, name: str) -> bool:
        """Whether tensor `name` lies in a file as `read` gives it."""
        return name in self.tensors

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start` to `stop` of tensor `name`, as uint8 of shape (stop - start,).

        Raises CheckpointError if the file cannot be read or has become shorter.
        """
        tensor, path = self.tensors[name], self.files[name]
        if not 0 <= start <= stop <= tensor.nbytes:
            raise ValueError(f"bytes {start} to {stop} of tensor {name}, which has {tensor.nbytes}")
        offset, nbytes = tensor.offset + start, stop - start
        try:
            if nbytes >= _DIRECT_BYTES and path not in self._buffered:
                try:
                    return self._read_direct(path, name, offset, nbytes)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._buffered.add(path)  # its file system refuses O_DIRECT
            result: NDArray[np.uint8] = np.empty(nbytes, np.uint8)
            descriptor = self._descriptor(path, direct=False)
            self._fill(descriptor, result.data, offset, nbytes, path, name)
            # Every byte is read once: kept in the page cache it would only push out what the PC is doing meanwhile.
            os.posix_fadvise(descriptor, offset & -_PAGE, nbytes + 2 * _PAGE, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint file {path} cannot be read at tensor {name!r}: {error.strerror}; check the disk and rights"
            ) from error
        return result

    def _read_direct(self, path: Path, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        before = offset % _PAGE
        buffer = self._buffers.take(-(-(before + nbytes) // _PAGE) * _PAGE)
        self._fill(self._descriptor(path, direct=True), buffer.data, offset - before, before + nbytes, path, name)
        return buffer[before : before + nbytes]

    def _fill(self, descriptor: int, memory: memoryview, offset: int, wanted: int, path: Path, name: str) -> None:
        """Read into `memory`, at least its first `wanted` bytes."""
        done = 0
        while done < wanted:
            count = os.preadv(descriptor, [memory[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"checkpoint file {path} ended in tensor {name!r} at byte {offset + done}; download it again"
                )
            done += count

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _descriptor(self, path: Path, *, direct: bool) -> int:
        with self._lock:
            if (path, direct) not in self._descriptors:
                flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
                self._descriptors[path, direct] = os.open(path, flags)
            return self._descriptors[path, direct]


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {path.name} cannot be read: {error.strerror}; check path and rights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {folder}: {path.name} is not JSON ({str(error)[:100]}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"checkpoint {folder}: {path.name} is a JSON {type(value).__name__}, not an object; download it again"
        )
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise CheckpointError(f"checkpoint folder {folder} does not exist; check the path")
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} is a file, not a folder; give the folder that has its config.json")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json; check the path")
    return _read_json(folder / "config.json", folder)


def _weight_files(folder: Path, config: dict[str, Any]) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the index's map of tensor to file name (empty without an index)."""
    single = config.get("transformers_weights") or SINGLE_NAME
    if not isinstance(single, str) or single != os.path.basename(single):
        raise CheckpointError(
            f"checkpoint {folder}: config.json has transformers_weights {single!r}, which is no file name; correct it"
        )
    if single.endswith(".safetensors") and (folder / single).is_file():
        return [folder / single], {}
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder)
    names = sorted(path.name for path in folder.iterdir())
    if (folder / MANIFEST_NAME).exists():
        raise CheckpointError(f"{folder} is a block store already, not a checkpoint; use it as it is")
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise CheckpointError(
            f"checkpoint {folder} has its weights only as pickles ({pickles[0]}), and opening a pickle executes "
            "code that is "
            "in it; convert it with safetensors (transformers: save_pretrained) where you trust it"
        )
    if loose := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(
            f"checkpoint {folder} has {loose[0]} but neither {SINGLE_NAME} nor {INDEX_NAME}; download the missing file"
        )
    raise CheckpointError(
        f"checkpoint {folder} has a config.json but no weights (neither {SINGLE_NAME} nor {INDEX_NAME}); download them"
    )


def _indexed_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = _read_json(folder / INDEX_NAME, folder).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"checkpoint {folder}: {INDEX_NAME} has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"checkpoint {folder}: {INDEX_NAME} puts tensor {name!r} into {str(shard)[:80]!r}, which is no "
                "safetensors "
                "file of the folder; download it again"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"checkpoint {folder}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} are); download it"
        )
    return [folder / shard for shard in shards], weight_map
