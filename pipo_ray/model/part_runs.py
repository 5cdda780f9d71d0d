"""Which pieces are nothing but rows of a bf16 matrix, and their products, one after the other in machine code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipo_ray.compiled.part_run import PartRun, Parts, RowsProduct
from pipo_ray.model.cpu_linear import CpuProducts
from pipo_ray.model.piece_views import view_of
from pipo_ray.model.streamed import SplitProduct
from pipo_ray.pipeline.weight_stream import HostStream
from pipo_ray.plan.pieces import PieceTensor, SweepPlan


class _Rows(NamedTuple):
    """Of parts of a matrix: the first row of each, how many it has, and where they begin in its piece, int64 [parts];
    and the bytes of a row.
    """

    first: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    row_bytes: int


class PartRuns:
    """Runs of parts in the sweeps over `plan`, fed by `stream`, which is not traced; see `compiled/part_run.py`."""

    def __init__(self, plan: SweepPlan, stream: HostStream, products: CpuProducts) -> None:
        self._plan, self._stream, self._products = plan, stream, products
        self._stops: dict[tuple[int, int], int] = {}
        self._kept_rows: dict[int, _Rows] = {}

    def stop(self, call: int, index: int, name: str) -> int:
        """Of call number `call`, the index behind the last of the streamed pieces from `index` on that each have rows
        of the bf16 matrix `name` and nothing else; `index` if there is none.
        """
        stop = self._stops.get((call, index))
        pieces = self._plan.calls[call].streamed
        if stop is None:
            stop, first = index, self._only_tensor(pieces[index])
            if first is not None:
                while stop < len(pieces):
                    tensor = self._only_tensor(pieces[stop])
                    if tensor is None or tensor.name != first.name:
                        break
                    stop += 1
            self._stops[call, index] = stop
        return stop if self._plan.pieces[pieces[index]].tensors[0].name == name else index

    def multiply(self, start: int, stop: int, product: SplitProduct) -> int:
        """Take the parts at positions `start:stop`, multiply with each, and release it. Returns `stop`, or `start`
        where machine code does not multiply them. Raises as `HostStream.acquire`.
        """
        rows_product = self._rows_product(product, start)
        if rows_product is None:
            return start
        of_parts, places = self._rows_of(start, stop), self._stream.places(start, stop)
        parts = Parts(places.row, places.load, of_parts.first, of_parts.rows, places.address + of_parts.offset)
        run = PartRun(self._products.part_runner, self._stream.header_address, parts, rows_product, of_parts.row_bytes)
        try:
            while start + run.done < stop:
                run.run()
                if start + run.done < stop:
                    self._stream.wait(start + run.done)
        finally:
            self._stream.passed(start, start + run.done, run.waited_s)
        return stop

    def _rows_of(self, start: int, stop: int) -> _Rows:
        kept = self._kept_rows.get(start)
        if kept is None:
            tensors = [self._tensor(position) for position in range(start, stop)]
            rows = [tensor.shape[0] for tensor in tensors]
            kept = self._kept_rows[start] = _Rows(
                np.array([tensor.row_start for tensor in tensors]), np.array(rows),
                np.array([tensor.offset for tensor in tensors]), tensors[0].nbytes // rows[0],
            )  # fmt: skip
        return kept

    def _tensor(self, position: int) -> PieceTensor:
        return self._plan.pieces[self._plan.order[position]].tensors[0]

    def _only_tensor(self, piece: int) -> PieceTensor | None:
        """The rows of a bf16 matrix that are all that a piece has."""
        tensor, *others = self._plan.pieces[piece].tensors
        is_rows = not tensor.whole and tensor.expert is None and tensor.panels is None and len(tensor.shape) == 2
        return tensor if is_rows and not others and tensor.dtype == "BF16" else None

    def _rows_product(self, product: SplitProduct, position: int) -> RowsProduct | None:
        """The same for all parts."""
        if not product.compiled:
            part = view_of(self._stream.memory(position), self._tensor(position))
            product.compiled.append(self._products.rows_product(product.inputs, part, product.bias, product.output))
        return product.compiled[0]
