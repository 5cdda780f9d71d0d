"""Products with 16-bit weights on the CPU, by the kernel that was measured to be fastest on this machine.

Where the processor multiplies bf16, a kernel of our own takes few rows of inputs (`pipo_ray/compiled/bf16.py`): torch's
reads the weight at little more than half of the memory's bandwidth. Where it has a unit for products of matrices,
another of ours takes many rows (`pipo_ray/compiled/amx.py`): torch's puts the weight in order first, every time. A
processor without 16-bit arithmetic has to widen each weight, which torch's own kernel does again for every row; ours
do it once, for few rows at the memory's bandwidth (`pipo_ray/compiled/float_dots.py`, `float_outer.py`). Where nothing
can be compiled, a chunk of weights is widened into a buffer that stays in the cache, and multiplied by torch in
float32. Sums are rounded once, at the end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from pipo_ray.compiled.amx_inputs import PackedInputs
from pipo_ray.compiled.amx_low_bit_products import CompiledAmxLowBit
from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.float_inputs import GroupedInputs, PaddedInputs
from pipo_ray.compiled.float_low_bit import FloatLowBit
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.part_run import PartRunner, RowsProduct
from pipo_ray.compiled.word_inputs import WordInputs
from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.kept_profiles import Measurable, ProfilePlaces, kept_profile
from pipo_ray.model.kernel_profile import (
    KERNELS,
    SCRATCH_BYTES,
    SIXTEEN_BIT_LAYOUTS,
    Cost,
    Kernel,
    KernelProfile,
    Layout,
    cleaned,
)

HALF_DTYPES = (torch.bfloat16, torch.float16)

_MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 128)
_MEASURED_SHAPE = (512, 2048)
_MEASURED_TIMES = 5
_UNCACHED_BYTES = 32 << 20  # in a run, weights come from memory
HOPELESS = 2.0  # times slower than the best with so many rows, and no better than with fewer: not measured with more
_NO_BETTER = 0.75
_FOR_MANY = {"tall", "outer", "amx"}
"""Kernels that take as long for one row as for sixteen: measured with many rows whatever they took for few. On a busy
machine "outer" once looked hopeless at four rows, and a prompt of 512 took 34 s instead of 26.
"""
_REMEMBERED_SHAPES = 4096
_ROWS_IN_PLACE = 32  # with fewer, a copy of the result is nothing beside the product
# torch writes narrow columns of a long prompt at half the speed (512 rows: 60 to 210 columns 130 - 190 GFLOP/s, in a
# matrix of their own, then copied, 250 - 430; 512 columns and more alike; AMX, 2 cores Intel Xeon, by hand).
_COLUMNS_IN_PLACE = 512
# Float32 products with fewer columns, or an odd number, take as long as with many more: zeros fill them up.
_COLUMNS = 16
_INTO = {"amx", "dots", "outer"}
"""Kernels that write where the result is wanted."""
_RUN_PARTS, _RUN_PARTS_OF_A_ROW = {"amx", "outer"}, {"compiled", "dots"}
"""Those that multiply the parts of a matrix in one call (`part_run.py`), the latter with one row of inputs."""
_NO_KERNELS = OwnKernels()
_Made = TypeVar("_Made", PackedInputs, PaddedInputs, GroupedInputs, WordInputs)
_MATMULS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


class CpuProducts:
    """Multiplies inputs with 16-bit weights as `profile` chooses, of our own kernels by those in `own`.

    One caller at a time.

    Takes at most SCRATCH_BYTES for widened weights, and per call 4 bytes for each element of the input and for each
    element of the output that one chunk makes.
    """

    def __init__(
        self,
        profile: KernelProfile,
        own: OwnKernels = _NO_KERNELS,
        code_folder: Path | None = None,
    ) -> None:
        self._profile, self._own = profile, own
        with torch.inference_mode(False):  # written to in and out of inference mode
            self._scratch = torch.empty(SCRATCH_BYTES // 4)
        self._chosen: dict[tuple[Any, ...], Kernel] = {}
        self._runner: PartRunner | None = None
        self._code_folder = code_folder

    @classmethod
    def for_run(cls, dtype: torch.dtype, places: ProfilePlaces, code_folder: Path | None = None) -> CpuProducts:
        """With the profile in `places`; measured (and kept there) if there is none for this dtype and this number of
        threads. It takes about 0.2 s. Machine code is kept in `code_folder`.
        """
        own = OwnKernels.of(dtype, code_folder)
        wanted = {layout: Measurable(own.of_layout(layout)) for layout in SIXTEEN_BIT_LAYOUTS}
        profile = kept_profile(places, dtype, wanted, lambda layouts: measure_costs(layouts, dtype, own))
        return cls(profile, own, code_folder)

    @property
    def compiles(self) -> bool:
        """Whether kernels for bf16 are compiled here, and so what lies between products can be."""
        own = self._own
        return own.compiled is not None or (own.floats is not None and own.floats.dtype is torch.bfloat16)

    def compiled_for(self, weight: torch.Tensor) -> CompiledBf16 | CompiledFloats | None:
        """What multiplies one row of inputs with `weight` [out, in], if that is our own kernel and can be a step of a
        list.
        """
        kernel = self._decide("linear", weight.new_empty(1, weight.shape[1]), weight, None)
        floats = self._own.floats
        if kernel == "dots" and floats is not None and floats.takes_row(weight):
            return floats
        return self._own.compiled if kernel == "compiled" else None

    @property
    def part_runner(self) -> PartRunner:
        """What runs a `rows_product`; compiled when it is first asked for."""
        if self._runner is None:
            self._runner = PartRunner(self._code_folder)
        return self._runner

    def rows_product(
        self, inputs: ProductInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor
    ) -> RowsProduct | None:
        """What multiplies `inputs` with parts of a matrix, `weight` [some rows, in] and others, as `linear_into` would
        with all rows of the matrix, into their columns of `output` [rows, all rows], adding those numbers of `bias`
        [all rows]. None where the kernel chosen for that is not machine code that can write there by itself.
        """
        rows, columns = inputs.rows, weight.shape[1]
        if bias is not None and bias.shape != (output.shape[1],):
            return None
        added = None if bias is None else bias[: len(weight)]
        kernel = self._choose("linear", rows, weight, added, output.shape[1])
        if kernel == "amx" and self._own.amx is not None:
            return self._own.amx.rows_product(inputs.packed(self._own.amx), columns, bias, output)
        if kernel == "compiled" and self._own.compiled is not None and len(rows) == 1:
            return self._own.compiled.rows_product(rows[0].contiguous(), bias, output[0])
        floats = self._own.floats
        if kernel == "dots" and floats is not None and len(rows) == 1 and floats.takes_row(weight):
            return floats.row_product(rows[0], bias, output[0])
        if kernel == "outer" and floats is not None:
            return floats.rows_product(inputs.grouped(floats), bias, output)
        return None

    def stay_awake(self, on: bool) -> None:
        """Whether all weights stay where they are; see `CompiledBf16.stay_awake`."""
        self._own.stay_awake(on)

    def bind(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as a tensor over the same memory whose products are made here; unchanged if it is no 16-bit matrix
        (or stack of matrices).
        """
        if weight.dtype not in HALF_DTYPES or weight.dim() not in (2, 3) or weight.device.type != "cpu":
            return weight
        bound = weight.as_subclass(HalfMatrix)
        bound._products = self
        return bound

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`F.linear`: `inputs` [..., in], `weight` [out, in], `bias` [out] or None; [..., out] in the inputs' dtype."""
        return self._linear_by(self._choose("linear", inputs, weight, bias), inputs, weight, bias)

    def _linear_by(
        self, kernel: Kernel, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if kernel == "native":
            return F.linear(inputs, weight, bias)
        rows = inputs.reshape(-1, weight.shape[1])
        if kernel in _INTO:
            output = rows.new_empty(len(rows), len(weight))
            self._own_into(kernel, ProductInputs(rows), weight, bias, output)
            return output.view(*inputs.shape[:-1], weight.shape[0])
        product = self._wide_linear if kernel == "wide" else self._tall_linear
        if kernel == "compiled":
            assert self._own.compiled is not None  # `_decide`
            product = self._own.compiled.linear
        return product(rows, weight, bias).view(*inputs.shape[:-1], weight.shape[0])

    def linear_into(
        self, inputs: ProductInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor,
        of_rows: int,
    ) -> None:  # fmt: skip
        """`linear` of inputs [rows, in] into `output` [rows, out], some columns of a larger matrix. `weight` is part of
        one of `of_rows` rows, which the kernel is chosen for (`_choose`).
        """
        rows = inputs.rows
        kernel = self._choose("linear", rows, weight, bias, of_rows)
        is_small = len(rows) < _ROWS_IN_PLACE or len(weight) < _COLUMNS_IN_PLACE
        if kernel in _INTO:
            self._own_into(kernel, inputs, weight, bias, output)
        elif kernel == "native" and not is_small:
            _write_linear(rows, weight, bias, output)
        else:
            output.copy_(self._linear_by(kernel, rows, weight, bias))

    def matmul(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`inputs @ weight + bias`: `inputs` [..., in], `weight` [in, out], `bias` [out] or None."""
        kernel = self._choose("matmul", inputs, weight, bias)
        if kernel == "native":
            return torch.matmul(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)
        rows = inputs.reshape(-1, weight.shape[0])
        return self._wide_matmul(rows, weight, bias).view(*inputs.shape[:-1], weight.shape[1])

    def _choose(
        self, layout: Layout, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        of_rows: int | None = None,
    ) -> Kernel:  # fmt: skip
        """For a part of a weight that has `of_rows` rows what is best for all of it, if machine code goes from part to
        part: the time of a call, which a small weight's kernel is chosen by, does not come with each then.
        """
        shapes = (
            layout, inputs.shape, weight.shape, weight.stride(), inputs.dtype, weight.dtype, of_rows,
            None if bias is None else (bias.dtype, bias.shape),
        )  # fmt: skip
        kernel = self._chosen.get(shapes)
        if kernel is None:
            kernel = self._decide(layout, inputs, weight, bias, of_rows)
            if len(self._chosen) >= _REMEMBERED_SHAPES:
                self._chosen.clear()
            self._chosen[shapes] = kernel
        return "native" if torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad) else kernel

    def _decide(
        self, layout: Layout, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        of_rows: int | None = None,
    ) -> Kernel:  # fmt: skip
        """Native too for what the others are not made for: mixed dtypes, and mistakes that torch explains."""
        if weight.dim() != 2:
            return "native"
        height, width = weight.shape if layout == "linear" else reversed(weight.shape)
        if (
            inputs.dim() < 1
            or inputs.shape[-1] != width
            or inputs.dtype != weight.dtype
            or inputs.device != weight.device
            or not weight.numel()
            or not inputs.numel()
            or weight.shape[1] > self._scratch.numel()
            or (bias is not None and (bias.dtype != weight.dtype or bias.shape != (height,)))
        ):
            return "native"
        num_inputs, without = inputs.numel() // width, self._own.without(weight)
        kernel = self._profile.choose(layout, num_inputs, (of_rows or height) * width, without)
        if of_rows is None or kernel in _RUN_PARTS or (kernel in _RUN_PARTS_OF_A_ROW and num_inputs == 1):
            return kernel
        return self._profile.choose(layout, num_inputs, weight.numel(), without)

    def _own_into(
        self, kernel: Kernel, inputs: ProductInputs, weight: torch.Tensor, bias: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """By one of `_INTO`, which is there (`_decide`)."""
        if kernel == "amx":
            assert self._own.amx is not None
            self._own.amx.linear_into(inputs.packed(self._own.amx), weight, bias, output)
            return
        assert self._own.floats is not None
        if kernel == "dots":
            self._own.floats.dots_into(inputs.padded(), weight, bias, output)
        else:
            self._own.floats.outer_into(inputs.grouped(self._own.floats), weight, bias, output)

    def _wide_linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        output, inputs = rows.new_empty(len(rows), len(weight)), rows.float()
        at_once = self._rows_at_once(weight)
        sums = inputs.new_empty(len(rows) * min(at_once, len(weight)))
        for start in range(0, len(weight), at_once):
            part = self._widen(weight[start : start + at_once])
            sum_ = sums[: len(rows) * len(part)].view(len(rows), len(part))
            torch.mm(inputs, part.T, out=sum_)
            if bias is not None:
                sum_ += bias[start : start + at_once]
            output[:, start : start + at_once] = sum_
        return output

    def _tall_linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        output = rows.new_empty(len(rows), len(weight))
        columns = -(-len(rows) // _COLUMNS) * _COLUMNS
        inputs = self._scratch.new_zeros(weight.shape[1], columns)
        inputs[:, : len(rows)] = rows.T
        at_once = self._rows_at_once(weight)
        sums = inputs.new_empty(min(at_once, len(weight)), columns)
        for start in range(0, len(weight), at_once):
            part = self._widen(weight[start : start + at_once])
            sum_ = sums[: len(part)]
            torch.mm(part, inputs, out=sum_)
            if bias is not None:
                sum_ += bias[start : start + at_once, None]
            output[:, start : start + at_once] = sum_.T[: len(rows)]
        return output

    def _wide_matmul(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        inputs = rows.float()
        sums = inputs.new_zeros(len(rows), weight.shape[1])
        at_once = self._rows_at_once(weight)
        for start in range(0, len(weight), at_once):
            sums.addmm_(inputs[:, start : start + at_once], self._widen(weight[start : start + at_once]))
        if bias is not None:
            sums += bias
        return sums.to(rows.dtype)

    def _rows_at_once(self, weight: torch.Tensor) -> int:
        """Rows per chunk; the last is about as large as the others, because small products are slow."""
        most = max(1, self._scratch.numel() // weight.shape[1])
        chunks = -(-len(weight) // most)
        return -(-len(weight) // chunks)

    def _widen(self, part: torch.Tensor) -> torch.Tensor:
        return self._scratch[: part.numel()].view(part.shape).copy_(part)


class ProductInputs:
    """Inputs [rows, in] of products with one weight, or with its parts: as kernels take them, made when they are first
    asked for. Only what was asked for last is kept.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self._made: PackedInputs | PaddedInputs | GroupedInputs | WordInputs | None = None

    def packed(self, amx: CompiledAmx | CompiledAmxLowBit) -> PackedInputs:
        """In tiles."""
        return self._keep(PackedInputs, lambda: amx.pack(self.rows))

    def words(self, own: FloatLowBit, group: int) -> WordInputs:
        """As whole numbers, each group of columns by its largest."""
        if isinstance(self._made, WordInputs) and self._made.group != group:
            self._made = None
        return self._keep(WordInputs, lambda: own.words(self.rows, group))

    def padded(self) -> PaddedInputs:
        """In float32 for "dots"."""
        return self._keep(PaddedInputs, lambda: PaddedInputs.of(self.rows))

    def grouped(self, floats: CompiledFloats) -> GroupedInputs:
        """In float32 for "outer"."""
        return self._keep(GroupedInputs, lambda: floats.group(self.rows))

    def _keep(self, kind: type[_Made], make: Callable[[], _Made]) -> _Made:
        if not isinstance(self._made, kind):
            self._made = None  # there are never two of them
            self._made = make()
        return self._made


class HalfMatrix(torch.Tensor):
    """A 16-bit weight [out, in] (or a stack of them) that hands its products to `CpuProducts`. In every other operation
    it is the plain tensor, and so are the results.
    """

    _products: CpuProducts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and not (args and type(args[0]) is HalfMatrix):
                return _linear(*args, **(kwargs or {}))
            if not kwargs and len(args) == 2 and type(args[1]) is HalfMatrix and func in _MATMULS:
                return args[1]._products.matmul(args[0], args[1])
            if not kwargs and func is torch.addmm and len(args) == 3 and type(args[2]) is HalfMatrix:
                return args[2]._products.matmul(args[1], args[2], args[0])
            result = func(*args, **(kwargs or {}))
            if func is torch.Tensor.__getitem__ and args[0].dim() == 3:
                return args[0]._products.bind(result)
            return result


def linear_into(
    inputs: ProductInputs, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor, of_rows: int
) -> None:
    """`F.linear` of inputs [rows, in] into `output` [rows, out], some columns of a larger matrix; `weight` is part of
    one of `of_rows` rows.

    An ordinary product writes there by itself: copied afterwards, a long prompt's columns cost a tenth of the product.
    """
    if type(weight) is HalfMatrix:
        weight._products.linear_into(inputs, weight.as_subclass(torch.Tensor), bias, output, of_rows)
    elif type(weight) is not torch.Tensor:  # with kernels of its own
        output.copy_(F.linear(inputs.rows, weight, bias))
    else:
        _write_linear(inputs.rows, weight, bias, output)


def _write_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """torch's own product, without a copy of the result."""
    if bias is None:
        torch.mm(inputs, weight.t(), out=output)
    else:
        torch.addmm(bias, inputs, weight.t(), out=output)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if type(weight) is not HalfMatrix:
        return F.linear(input, weight, bias)
    return weight._products.linear(input, weight, bias)


def measure_profile(dtype: torch.dtype, own: OwnKernels = _NO_KERNELS) -> KernelProfile:
    """Time every kernel on this machine with the number of threads that torch has now."""
    costs = measure_costs(SIXTEEN_BIT_LAYOUTS, dtype, own)
    return KernelProfile(str(dtype).removeprefix("torch."), torch.get_num_threads(), costs)


def measure_costs(
    layouts: Collection[Layout], dtype: torch.dtype, own: OwnKernels = _NO_KERNELS
) -> dict[Layout, dict[Kernel, Cost]]:
    """`measure_profile` of some layouts."""
    with torch.inference_mode():
        return {layout: _measure_layout(layout, dtype, own) for layout in layouts}


def always(kernel: Kernel, dtype: torch.dtype = torch.bfloat16) -> KernelProfile:
    """A profile that chooses `kernel` wherever its layout has it."""
    costs: dict[Layout, dict[Kernel, Cost]] = {
        layout: {one: Cost(0.0, (1, 2), (0.0, 0.0) if one == kernel else (1.0, 1.0)) for one in kernels}
        for layout, kernels in KERNELS.items()
    }
    return KernelProfile(str(dtype).removeprefix("torch."), torch.get_num_threads(), costs)


def _measure_layout(layout: Layout, dtype: torch.dtype, own: OwnKernels) -> dict[Kernel, Cost]:
    multiply: dict[Kernel, Callable[..., torch.Tensor]] = {}
    for kernel in own.of_layout(layout):
        products = CpuProducts(always(kernel, dtype), own)
        multiply[kernel] = products.linear if layout == "linear" else products.matmul
    height, width = _MEASURED_SHAPE
    weights = itertools.cycle(torch.ones(_UNCACHED_BYTES // (2 * height * width), height, width, dtype=dtype))
    small = itertools.repeat(torch.ones(8, 8, dtype=dtype))
    fixed = least_seconds(multiply, torch.ones(1, 8, dtype=dtype), small, 4 * _MEASURED_TIMES)
    rates: dict[Kernel, list[float]] = {kernel: [] for kernel in multiply}
    running = dict(multiply)
    for rows in _MEASURED_ROWS:
        inputs = torch.ones(rows, width if layout == "linear" else height, dtype=dtype)
        seconds = least_seconds(running, inputs, weights, _MEASURED_TIMES)
        for kernel, took in seconds.items():
            rates[kernel].append(max(0.0, took - fixed[kernel]) / (height * width))
            few = kernel not in _FOR_MANY and rows >= _COLUMNS // 4
            if few and is_hopeless(rates[kernel], _MEASURED_ROWS, took / min(seconds.values())):
                del running[kernel]
    return {k: Cost(fixed[k], _MEASURED_ROWS[: len(r)], cleaned(r)) for k, r in rates.items()}


def is_hopeless(rates: Sequence[float], rows: Sequence[int], times_the_best: float) -> bool:
    """Whether a kernel whose last of `rates`, each for so many `rows`, was so many times the best kernel's will not be
    the best with more rows: a row of inputs costs no less there than with fewer rows.

    What it takes alone says too little. On a busy machine torch's product of 4 rows was slower than a compiled one by
    2.3 times instead of 1.4, and with 128 rows, where it is the faster one by far, nobody asked (AMX).
    """
    if times_the_best <= HOPELESS or len(rates) < 2:
        return False
    before, last = (rate / count for rate, count in zip(rates[-2:], rows[len(rates) - 2 :], strict=False))
    return last > _NO_BETTER * before


def least_seconds(
    multiply: dict[Kernel, Callable[..., torch.Tensor]],
    inputs: torch.Tensor,
    weights: Iterator[Any],
    times: int,
) -> dict[Kernel, float]:
    """Least seconds of each kernel, in turns, each time with the next of `weights`.

    Seconds of processor time over the number of threads: on a PC that is busy when a run starts, the clock on the wall
    would measure the others.
    """
    seconds: dict[Kernel, float] = dict.fromkeys(multiply, float("inf"))
    for _ in range(times):
        for kernel, call in multiply.items():
            weight = next(weights)
            begin = time.process_time()
            call(inputs, weight)
            seconds[kernel] = min(seconds[kernel], (time.process_time() - begin) / torch.get_num_threads())
    return seconds
