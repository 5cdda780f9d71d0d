"""Stand-ins for parameters that are never whole in memory: looked-up tables, row-split matrices, fused experts;
and for low-bit weights, which torch has no tensor for.

Each is a meta tensor with the parameter's shape and dtype that answers the one operation it is made for, so that a
model's own code needs no change; any other operation on its values fails, because a meta tensor has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F

from pipo_ray.compiled.part_run import RowsProduct
from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.cpu_linear import ProductInputs, linear_into
from pipo_ray.model.host_values import flat

LookUp = Callable[[torch.Tensor], torch.Tensor]
ExpertSlice = Callable[[int], torch.Tensor]


class LinearProduct(Protocol):
    """`F.linear` with a weight [rows, columns]."""

    def __call__(
        self, inputs: torch.Tensor | ProductInputs, bias: torch.Tensor | None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Inputs [..., columns] and a bias or None in, [..., rows] out: `output` where it is given, which may be some
        columns of a larger matrix. `ProductInputs` where parts of a matrix have the same ones.
        """
        ...


_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_PROPERTIES = (
    "shape", "dtype", "ndim", "layout", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested",
    "requires_grad",
    "grad", "grad_fn", "is_leaf", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_floating_point",
    "is_complex",
    "__len__", "__repr__",
)  # fmt: skip
_FACTS = {
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
"""What may be asked of a tensor without looking at its values."""


class _StandIn(torch.Tensor):
    what: ClassVar[str]
    _device: torch.device
    _answer: Any

    @classmethod
    def make(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, answer: Any) -> _StandIn:
        """A stand-in that claims to be on `device`."""
        tensor: _StandIn = torch.Tensor._make_subclass(cls, torch.empty(shape, dtype=dtype, device="meta"))
        tensor._device = device
        tensor._answer = answer
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DEVICE:
            return args[0]._device
        answer = cls._intercept(func, args, kwargs or {})
        if answer is not NotImplemented:
            return answer
        if func not in _FACTS:
            raise UnsupportedModelError(
                f"{cls.what} is used by {getattr(func, '__name__', func)}, which needs all of it at once; this "
                "architecture cannot be streamed"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def _intercept(cls, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class LookedUpTable(_StandIn):
    """An embedding table [rows, width] of which only the asked-for rows are read. `answer(ids)` gives their [len(ids),
    width].
    """

    what = "a table that is looked up"

    @classmethod
    def _intercept(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.embedding:
            return NotImplemented
        ids = args[0] if args else kwargs["input"]
        table = args[1] if len(args) > 1 else kwargs["weight"]
        return table._answer(flat(ids)).view(*ids.shape, -1)


def _linear_arguments(
    input: torch.Tensor, weight: _StandIn, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, _StandIn, torch.Tensor | None]:
    """What `F.linear` was called with, by place or by name."""
    return input, weight, bias


@dataclass(frozen=True)
class SplitProduct:
    """`F.linear` with a matrix that arrives in row parts: inputs [n, in], a bias [out] or None, the output [n, out]."""

    inputs: ProductInputs
    bias: torch.Tensor | None
    output: torch.Tensor
    compiled: list[RowsProduct | None] = field(default_factory=list)
    """How machine code makes it, or None where it does not; empty until that was asked."""

    def multiply(self, start: int, stop: int, part: torch.Tensor) -> None:
        """Fill the columns of rows `start:stop`, which are `part`."""
        added, columns = None if self.bias is None else self.bias[start:stop], self.output[:, start:stop]
        if type(part) is LowBitMatrix:
            part.product(self.inputs, added, columns)
        else:
            linear_into(self.inputs, part, added, columns, self.output.shape[1])


RowParts = Callable[[SplitProduct | None], Iterator[tuple[int, int, torch.Tensor]]]


class SplitMatrix(_StandIn):
    """A weight [out_features, in_features] that arrives in row parts. `answer(product)` yields (row_start, row_stop,
    part) of all that it has not multiplied by itself for `product`, which is None where nothing is to be multiplied.
    """

    what = "a matrix that is split by rows"

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Its answer."""
        yield from self._answer(None)

    @classmethod
    def _intercept(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.linear:
            return NotImplemented
        inputs, weight, bias = _linear_arguments(*args, **kwargs)
        output = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
        rows = ProductInputs(inputs.reshape(-1, inputs.shape[-1]))
        product = SplitProduct(rows, bias, output.view(-1, weight.shape[0]))
        for start, stop, part in weight._answer(product):
            product.multiply(start, stop, part)
        return output


class LowBitMatrix(_StandIn):
    """A weight [out_features, in_features] that is in memory with few bits; its answer is a `LinearProduct`."""

    what = "a matrix with low-bit weights"
    packed: Any = None
    """Its panels in memory, and what they are: (uint8 [panels, panel_bytes], Panels)."""

    @property
    def product(self) -> LinearProduct:
        """Its answer."""
        answer: LinearProduct = self._answer
        return answer

    @classmethod
    def _intercept(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not F.linear:
            return NotImplemented
        inputs, weight, bias = _linear_arguments(*args, **kwargs)
        return weight._answer(inputs, bias)


class FusedExperts(_StandIn):
    """A fused expert tensor [experts, ...] of which one expert at a time is in memory, in ascending order. `answer(e)`
    gives expert e's slice.
    """

    what = "a tensor of fused experts"

    @classmethod
    def _intercept(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is not torch.Tensor.__getitem__:
            return NotImplemented
        tensor, index = args
        if isinstance(index, torch.Tensor) and index.dim() == 0:
            index = int(index)
        if not isinstance(index, int):
            return NotImplemented
        return tensor._answer(index)


class Unbound(_StandIn):
    """A parameter while it is not bound to memory: whoever uses it is refused."""

    what = "a parameter outside the module it was traced in"

    @classmethod
    def _intercept(cls, func: Any, args: Any, kwargs: Any) -> Any:
        return NotImplemented
