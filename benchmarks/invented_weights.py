"""Block stores of random models whose 16-bit checkpoint has no place on the drive: its bits are made up as they are
read. A checkpoint of Llama-3-70B's shape has 141 GB, the store made from it in int4 40.

Of each shape of a weight one panel is rounded, and all panels of such weights are that one: rounding 70 billion weights
would take longer than what is to be measured.

`gpu_stream.py` starts it; by hand, SHAPE is a name from there:

    python benchmarks/invented_weights.py SHAPE STORE [int4]

Everything else is as in `pipo pack`: looking at the model, layout, checksums.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from random_llama import Shape, make_checkpoint

from pipo_ray.model.blocks import TensorSpec
from pipo_ray.packing import pack_checkpoint
from pipo_ray.quant.panels import Panels
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.source import QuantizedSource
from pipo_ray.store.checkpoint import Checkpoint

_ONE = 0x3F80
"""1.0 in bfloat16."""


class _Noise:
    """Normal numbers in bfloat16; a tensor's begin at a place of its own, and repeat after 64 MiB."""

    def __init__(self) -> None:
        normal = np.random.default_rng(0).normal(0, 0.02, 32 << 20).astype(np.float32)
        self._bits = (normal.view(np.uint32) >> 16).astype(np.uint16)

    def read(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """In place of `Checkpoint.read`."""
        assert start % 2 == stop % 2 == 0
        if "norm" in name and name.endswith("weight"):
            return np.full((stop - start) // 2, _ONE, np.uint16).view(np.uint8)
        found = np.empty((stop - start) // 2, np.uint16)
        at = (zlib.crc32(name.encode()) + start // 2) % len(self._bits)
        done = 0
        while done < len(found):
            part = self._bits[at : at + len(found) - done]
            found[done : done + len(part)] = part
            done += len(part)
            at = 0
        return found.view(np.uint8)


class _Repeated:
    """Panels, each the first one of its shape."""

    def __init__(self) -> None:
        self._first: dict[Panels, torch.Tensor] = {}
        self._read = QuantizedSource.read

    def read(self, source: QuantizedSource, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        """In place of `QuantizedSource.read`."""
        if spec.panels is None:
            return self._read(source, spec, row_start, row_stop)
        if spec.panels not in self._first:
            self._first[spec.panels] = self._read(source, spec, 0, 1).clone()
        return self._first[spec.panels].expand(row_stop - row_start, -1).contiguous()


def pack_invented(shape: Shape, store: Path, precision: str) -> None:
    """Pack a random model of `shape`; imports torch, and changes how checkpoints are read in this process."""
    noise, repeated = _Noise(), _Repeated()
    QuantizedSource.read = lambda self, *place: repeated.read(self, *place)  # type: ignore[method-assign]
    Checkpoint.read = lambda self, *place: noise.read(self, *place)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="pipo-bench-", dir=store.parent) as folder:
        make_checkpoint(Path(folder) / "checkpoint", shape, sparse=True)
        pack_checkpoint(Path(folder) / "checkpoint", store, quantization=Precision.parse(precision))


def main() -> None:
    """The command line."""
    from gpu_stream import SHAPES

    store = Path(sys.argv[2])
    if store.exists():
        shutil.rmtree(store)
    pack_invented(SHAPES[sys.argv[1]], store, sys.argv[3] if len(sys.argv) > 3 else "int4")


if __name__ == "__main__":
    main()
