"""A GGUF file, as the driver sees it: that it is one, and when it has changed. Imports neither torch nor `gguf`.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipo_ray.errors import CheckpointError, ResourceError, UnsupportedModelError
from pipo_ray.store.checkpoint import Checkpoint

GGUF_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HASHED_BYTES = 1 << 20
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufFile(Checkpoint):
    """A Checkpoint without tensors, whose `folder` is the file: what is known before `gguf` and torch are imported."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> GgufFile:
        """The file `folder`.

        Raises CheckpointError for one that cannot be read or is something else, UnsupportedModelError for one of a
        model's several files or another version, ResourceError if the library that reads it is not installed.
        """
        path = Path(folder)
        try:
            with open(path, "rb", buffering=0) as file:
                head = file.read(8)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from error
        if head[:4] != _MAGIC or len(head) < 8:
            raise CheckpointError(
                f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()}; download it again"
            )
        if (version := int.from_bytes(head[4:8], "little")) not in _VERSIONS:
            raise UnsupportedModelError(
                f"{path} is GGUF version {version}, 2 and 3 can be read; convert the model again"
            )
        if (split := _SPLIT.search(path.name)) is not None and int(split[1]) > 1:
            raise UnsupportedModelError(
                f"{path} is one of {int(split[1])} files of a model; join them with llama.cpp's `llama-gguf-split "
                "--merge`"
            )
        if importlib.util.find_spec("gguf") is None:
            raise ResourceError(f"{path} needs the gguf library: pip install 'pipo_ray[gguf]', or pip install gguf")
        return cls(path, {"model_type": "gguf", "quantization_config": {"quant_method": "gguf"}}, (), {}, {})

    @property
    def side_files(self) -> tuple[Path, ...]:
        """None: they are in the file."""
        return ()

    def fingerprint(self) -> str:
        """Hex that changes with the file's name, size, time of change and first megabyte, which has the header."""
        status = os.stat(self.folder)
        digest = xxhash.xxh3_128(f"{self.folder.name} {status.st_size} {status.st_mtime_ns}".encode())
        with open(self.folder, "rb", buffering=0) as file:
            digest.update(file.read(_HASHED_BYTES))
        return digest.hexdigest()


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` names: itself, or the only one in a folder that has nothing else of a checkpoint.

    Raises CheckpointError where there are several.
    """
    if path.is_file():
        return path if path.name.endswith(GGUF_SUFFIX) else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(f"folder {path} has {len(found)} GGUF files ({found[0].name}, ...); name one of them")
    return found[0] if found else None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint folder or GGUF file `path`. Raises as `Checkpoint.open` and `GgufFile.open` do."""
    return GgufFile.open(path) if path.is_file() else Checkpoint.open(path)
