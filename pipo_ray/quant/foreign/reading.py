"""Reading the tensors that foreign formats are made of: whole, rows, or columns of a checkpoint's tensors."""

from __future__ import annotations

import math
import threading

import torch

from pipo_ray.errors import CheckpointError
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.safetensors_file import TensorHeader

TORCH_DTYPES: dict[str, torch.dtype] = {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32")

_STRIP_BYTES = 64 << 20
"""What is kept of a tensor whose columns are asked for: whole, most of the time."""


class TensorFiles:
    """The tensors of a checkpoint, by name, with a memory of the last columns and rows read. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint, strip_bytes: int = _STRIP_BYTES) -> None:
        self.checkpoint = checkpoint
        self._strip_bytes = strip_bytes
        self._lock = threading.Lock()
        self._kept_rows: dict[str, tuple[int, torch.Tensor]] = {}
        self._strips: dict[str, tuple[int, torch.Tensor]] = {}

    def header(
        self, weight: str, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None
    ) -> TensorHeader:
        """The tensor `name` that the weight `weight` needs, of one of `dtypes` and of `shape`.

        Raises CheckpointError: it is not there, or is something else.
        """
        found = self.checkpoint.tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"checkpoint {self.checkpoint.folder}: weight {weight!r} lacks {name!r}; the shard that has it is "
                "damaged or of another checkpoint: download it again"
            )
        if found.dtype not in dtypes or (shape is not None and found.shape != shape):
            wanted = f"{' or '.join(dtypes)}{'' if shape is None else f' of shape {list(shape)}'}"
            raise CheckpointError(
                f"tensor {name!r} in {self.checkpoint.files[name]} is {found.dtype} of shape {list(found.shape)}, "
                f"weight {weight!r} needs {wanted}; use the config.json that belongs to these weights"
            )
        return found

    def matrix(self, weight: str, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """Rows and columns of the tensor `name`, see `header`. Raises CheckpointError also if it is no matrix."""
        shape = self.header(weight, name, dtypes).shape
        if len(shape) != 2 or not all(shape):
            raise CheckpointError(
                f"tensor {name!r} in {self.checkpoint.files[name]} has shape {list(shape)}, not a matrix's"
            )
        return shape[0], shape[1]

    def whole(self, name: str) -> torch.Tensor:
        """All of a tensor."""
        header = self.checkpoint.tensors[name]
        data = torch.from_numpy(self.checkpoint.read(name, 0, header.nbytes))
        return data.view(TORCH_DTYPES[header.dtype]).view(header.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows (dim 0) of a tensor."""
        header = self.checkpoint.tensors[name]
        dtype = TORCH_DTYPES[header.dtype]
        row = math.prod(header.shape[1:]) * dtype.itemsize
        data = torch.from_numpy(self.checkpoint.read(name, start * row, stop * row))
        return data.view(dtype).view(stop - start, *header.shape[1:])

    def kept_row(self, name: str, row: int) -> torch.Tensor:
        """Row `row` (dim 0) of a tensor, which is kept until another one is asked for."""
        with self._lock:
            kept = self._kept_rows.get(name)
            if kept is None or kept[0] != row:
                # Those of a weight's other tensors are kept, and those of the weight before let go.
                owner = name.rpartition("_")[0]
                self._kept_rows = {
                    other: one for other, one in self._kept_rows.items() if other.startswith(f"{owner}_")
                }
                self._kept_rows.pop(name, None)
                kept = self._kept_rows[name] = (row, self.rows(name, row, row + 1)[0])
            return kept[1]

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns of a matrix: a view of what is kept, [rows, stop - start].

        They lie apart in the file. So as many are read as may be kept, and the next ones come from there.
        """
        with self._lock:
            first, strip = self._strips.get(name, (0, None))
            if strip is None or start < first or stop > first + strip.shape[1]:
                first, strip = self._read_strip(name, start, stop)
        return strip[:, start - first : stop - first]

    def _read_strip(self, name: str, start: int, stop: int) -> tuple[int, torch.Tensor]:
        header = self.checkpoint.tensors[name]
        (rows, columns), dtype = header.shape, TORCH_DTYPES[header.dtype]
        # Those of a weight's other tensors are kept, and those of the weight before let go.
        owner = name.rpartition(".")[0]
        self._strips = {
            other: kept for other, kept in self._strips.items() if other.startswith(owner + ".") and other != name
        }
        if header.nbytes <= self._strip_bytes:
            result = 0, self.whole(name)
        else:
            stop = min(columns, max(stop, start + self._strip_bytes // (rows * dtype.itemsize)))
            strip = torch.empty(rows, stop - start, dtype=dtype)
            for row in range(rows):
                begin = row * columns
                data = self.checkpoint.read(name, (begin + start) * dtype.itemsize, (begin + stop) * dtype.itemsize)
                strip[row] = torch.from_numpy(data).view(dtype)
            result = start, strip
        self._strips[name] = result
        return result
