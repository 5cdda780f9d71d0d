"""Which pieces are nothing but rows of a bf16 matrix, and their products, one after the other in machine code."""

from __future__ import annotations

import torch

from pipo_ray.compiled.part_run import RESIDENT, Part, PartRun, RowsProduct
from pipo_ray.model.cpu_linear import CpuProducts
from pipo_ray.model.piece_views import view_of
from pipo_ray.model.streamed import SplitProduct
from pipo_ray.pipeline.weight_stream import HostStream
from pipo_ray.plan.pieces import PieceTensor, SweepPlan


class PartRuns:
    """Runs of parts in the sweeps over `plan`, fed by `stream`, which is not traced; see `compiled/part_run.py`."""

    def __init__(self, plan: SweepPlan, stream: HostStream, products: CpuProducts) -> None:
        self._plan, self._stream, self._products = plan, stream, products
        self._stops: dict[tuple[int, int], int] = {}

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
        """Take the parts at positions `start:stop`, multiply with each, and release it. Returns the position behind the
        last one that machine code multiplies: none, perhaps. Raises as `HostStream.acquire`.
        """
        parts: list[Part] = []
        for position in range(start, stop):
            (tensor,) = self._plan.pieces[self._plan.order[position]].tensors
            place = self._stream.place(position)
            of_rows = self._rows_product(product, tensor, place.memory)
            if of_rows is None:
                break
            row_bytes = tensor.nbytes // tensor.shape[0]
            steps = of_rows.steps(tensor.row_start, tensor.row_stop, place.address + tensor.offset, row_bytes)
            parts.append(Part(place.row, RESIDENT if place.load is None else place.load, steps))
        if not parts:
            return start
        run = PartRun(self._products.part_runner, self._stream.header_address, parts)
        behind = start + len(parts)
        try:
            while start + run.done < behind:
                run.run()
                if start + run.done < behind:
                    self._stream.wait(start + run.done)
        finally:
            self._stream.passed(start, start + run.done)
        return behind

    def _only_tensor(self, piece: int) -> PieceTensor | None:
        """The rows of a bf16 matrix that are all that a piece has."""
        tensor, *others = self._plan.pieces[piece].tensors
        is_rows = not tensor.whole and tensor.expert is None and tensor.panels is None and len(tensor.shape) == 2
        return tensor if is_rows and not others and tensor.dtype == "BF16" else None

    def _rows_product(self, product: SplitProduct, tensor: PieceTensor, memory: torch.Tensor) -> RowsProduct | None:
        """The same for all parts with as many rows."""
        rows = tensor.shape[0]
        if rows not in product.rows_products:
            made = self._products.rows_product(product.inputs, view_of(memory, tensor), product.bias, product.output)
            product.rows_products[rows] = made
        return product.rows_products[rows]
