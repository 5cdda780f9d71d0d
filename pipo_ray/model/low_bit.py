"""Products with low-bit weights, panel by panel, out of the memory that they were read into.

Where the processor has what it takes, kernels of our own multiply (`pipo_ray/compiled`): few rows of inputs at the
memory's bandwidth, many at the processor's, or at that of its unit for products of matrices; on other processors with
AVX2 ours compute in float32, and int4 in whole numbers of 16 bits. Otherwise torch's kernel takes few rows; for many it
computes at less than half of what the processor can: there a part of a panel is unpacked into memory that stays in the
cache, and multiplied by torch's 16-bit or float32 product. Where one overtakes the other is measured on the machine.

On a CUDA device Triton's kernels multiply (`pipo_ray/triton_kernels`), or torch's product behind several operations
that unpack, where those cannot be had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch

from pipo_ray.compiled.float_low_bit import FloatLowBit
from pipo_ray.compiled.low_bit import CompiledLowBit
from pipo_ray.compiled.support import LAYOUT, amx_obstacle, floats_obstacle, obstacle
from pipo_ray.model.cpu_linear import ProductInputs, is_hopeless, least_seconds
from pipo_ray.model.kept_profiles import Measurable, ProfilePlaces, kept_profile
from pipo_ray.model.kernel_profile import KERNELS, SCRATCH_BYTES, Cost, Kernel, KernelProfile, Layout, cleaned
from pipo_ray.model.streamed import LinearProduct, LowBitMatrix
from pipo_ray.quant.codec import PanelViews, halves, views_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, INT8_LAYOUT, Panels, divide, machine_layout

if TYPE_CHECKING:
    from pipo_ray.triton_kernels.products import RowsProduct as DeviceProduct
    from pipo_ray.triton_kernels.products import TritonProducts

ACTIVATIONS = torch.bfloat16
"""What torch's low-bit kernels take, and what a model with low-bit weights is computed in."""

RowsProduct = Callable[[ProductInputs, torch.Tensor | None], torch.Tensor]
"""Inputs bf16 [n, columns] in, products bf16 [n, rows] out: in the matrix that is given, if it can be written there."""

_OWN: frozenset[Kernel] = frozenset({"compiled", "blocks", "amx"})
_FLOATS: frozenset[Kernel] = frozenset({"dots", "outer", "words"})
_MEASURED_ROWS = (1, 4, 16, 64, 256)
_MEASURED_SHAPE = (512, 2048)
_MEASURED_TIMES = 5
_UNCACHED_BYTES = 16 << 20
_INT8_INPUTS_ALIGNED = 32  # torch's kernel (aten/src/ATen/native/cpu/int8mm_kernel.cpp, 2.13) faults on others
_REMEMBERED = 4096
_REMEMBERED_COUNTS = 8


class LowBitProducts:
    """Multiplies bf16 inputs with panels as `profile` chooses. One caller at a time.

    Takes 7 MiB for unpacked weights (6.5 bytes for each of 64 rows' weights if a row has more than 16,384), and what a
    product's output takes. Panels of another int4 layout than `machine` (see `machine_layout`) are unpacked however few
    rows there are, unless `floats` takes them. Elsewhere than on the CPU all are: `profile` is not asked then. Without
    `compiled` or `floats` there is no kernel of our own, and without the former's `amx` none for the matrix unit. That
    takes as much memory again as the inputs, rounded up, and `floats` twice as much, and 4 MiB for sums.
    """

    def __init__(
        self,
        profile: KernelProfile,
        machine: str,
        device: torch.device | None = None,
        compiled: CompiledLowBit | None = None,
        triton: TritonProducts | None = None,
        obstacle: str | None = None,
        floats: FloatLowBit | None = None,
    ) -> None:
        self._profile, self._machine, self._compiled, self._triton = profile, machine, compiled, triton
        self._floats = floats
        self.obstacle = obstacle
        self._device = device or torch.device("cpu")
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._chosen: dict[tuple[int, Panels, int], Kernel] = {}

    @classmethod
    def for_run(
        cls, layouts: Collection[Layout], places: ProfilePlaces, code_folder: Path | None = None
    ) -> LowBitProducts:
        """On the CPU, with the profile in `places`; measured (and kept there) if there is none for these layouts and
        this number of threads. It takes 0.3 s for each of them. Machine code is kept in `code_folder`.
        """
        compiled = compiled_low_bit(code_folder)
        floats = float_low_bit(code_folder) if compiled is None else None
        wanted = {layout: Measurable(_kernels(layout, compiled, floats)) for layout in layouts}
        profile = kept_profile(
            places, ACTIVATIONS, wanted, lambda missing: measure_low_bit(missing, compiled, floats).costs
        )
        return cls(profile, machine_layout(), compiled=compiled, floats=floats)

    @property
    def compiles(self) -> bool:
        """Whether kernels for bf16 are compiled here, and so what lies between products can be."""
        return self._compiled is not None or self._floats is not None

    def compiled_for(self, panels: Panels, num_rows: int) -> CompiledLowBit | FloatLowBit | None:
        """What multiplies one row of inputs with `num_rows` rows in such panels, if that is our own kernel and can be a
        step of a list.
        """
        kernel = self._kernel(1, panels, num_rows)
        if kernel in ("words", "dots") and self._floats is not None and self._floats.takes_row(panels, num_rows):
            return self._floats
        return self._compiled if kernel == "compiled" else None

    def stay_awake(self, on: bool) -> None:
        """Whether all weights stay where they are; see `CompiledLowBit.stay_awake`."""
        for own in (self._compiled, self._floats):
            if own is not None:
                own.stay_awake(on)

    def bind(self, memory: torch.Tensor, panels: Panels, first: int) -> torch.Tensor:
        """A stand-in for the rows of a weight whose panels from the `first` on are `memory`, uint8 [panels,
        panel_bytes]: their products are made here, without a copy.
        """
        start, stop = panels.rows_of(first, first + len(memory))
        shape = (stop - start, panels.columns)
        matrix: Any = LowBitMatrix.make(shape, ACTIVATIONS, self._device, self.product(memory, panels, stop - start))
        matrix.packed = memory, panels
        bound: torch.Tensor = matrix
        return bound

    def product(self, memory: torch.Tensor, panels: Panels, num_rows: int) -> LinearProduct:
        """`F.linear` with the first `num_rows` rows in the panels `memory`, in the inputs' dtype."""
        if self._triton is not None:
            return self._product_on_device(self._triton, memory, panels, num_rows)
        columns = panels.columns
        calls = _Calls(lambda num_inputs: self._rows_product(memory, panels, num_rows, num_inputs))

        def linear(
            inputs: torch.Tensor | ProductInputs, bias: torch.Tensor | None, output: torch.Tensor | None = None
        ) -> torch.Tensor:
            # Nothing is done here that need not be: with one row of inputs every microsecond shows.
            shared, inputs = _shared(inputs, columns)
            product = calls.for_count(shared.rows.shape[0])(shared, output)
            if bias is not None:
                product += bias
            if output is not None:
                return output if product is output else output.copy_(product)
            if product.dtype is not inputs.dtype:
                product = product.to(inputs.dtype)
            return product.view(*inputs.shape[:-1], num_rows)

        return linear

    def _product_on_device(
        self, triton: TritonProducts, memory: torch.Tensor, panels: Panels, num_rows: int
    ) -> LinearProduct:
        """The same by kernels that add the bias, and write where the product is wanted: what they save the host."""
        columns = panels.columns

        def make(num_inputs: int) -> DeviceProduct:
            kernel = self._kernel(num_inputs, panels, num_rows)
            return triton.product(memory, panels, num_rows, num_inputs, kernel)

        calls = _Calls(make)

        def linear(
            inputs: torch.Tensor | ProductInputs, bias: torch.Tensor | None, output: torch.Tensor | None = None
        ) -> torch.Tensor:
            shared, inputs = _shared(inputs, columns)
            rows = shared.rows
            call = calls.for_count(rows.shape[0])
            if bias is not None and bias.dtype is not ACTIVATIONS:
                bias = bias.to(ACTIVATIONS)
            if output is None:
                product = call(rows, bias)
                return product.to(inputs.dtype).view(*inputs.shape[:-1], num_rows)
            if output.dtype is ACTIVATIONS and output.dim() == 2 and output.stride(1) == 1:
                return call(rows, bias, output)
            return output.copy_(call(rows, bias).view(output.shape))

        return linear

    def linear(
        self, inputs: torch.Tensor, memory: torch.Tensor, panels: Panels, num_rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What `product` gives, once."""
        return self.product(memory, panels, num_rows)(inputs, bias)

    def _rows_product(self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int) -> RowsProduct:
        """The product for inputs bf16 [num_inputs, columns], contiguous."""
        kernel = self._kernel(num_inputs, panels, num_rows)
        if kernel == "amx":
            return self._amx_product(memory, panels, num_rows)
        if kernel in _FLOATS:
            return self._float_product(memory, panels, num_rows, num_inputs, kernel)
        if kernel in _OWN:
            assert self._compiled is not None  # `_choose`
            product = self._compiled.product(memory, panels, num_rows, num_inputs, blocks=kernel == "blocks")
            return lambda inputs, _: product(inputs.rows)
        if kernel == "packed" and num_rows == panels.panel_rows * len(memory) == panels.panel_rows:
            views = views_of(memory[0], panels)
            return lambda inputs, _: self._packed(inputs.rows, views, panels)
        return lambda inputs, _: self._by_panels(inputs.rows, memory, panels, num_rows, kernel)

    def _amx_product(self, memory: torch.Tensor, panels: Panels, num_rows: int) -> RowsProduct:
        assert self._compiled is not None  # `_choose`
        amx = self._compiled.amx
        assert amx is not None

        def multiply(inputs: ProductInputs, output: torch.Tensor | None) -> torch.Tensor:
            if output is None or output.dtype is not ACTIVATIONS or output.stride(1) != 1:
                output = inputs.rows.new_empty(len(inputs.rows), num_rows)
            amx.linear_into(inputs.packed(amx), memory, panels, num_rows, output)
            return output

        return multiply

    def _float_product(
        self, memory: torch.Tensor, panels: Panels, num_rows: int, num_inputs: int, kernel: Kernel
    ) -> RowsProduct:
        floats = self._floats
        assert floats is not None  # `_choose`
        is_int4 = panels.low_bit.bits == 4
        int4 = floats.int4_product(memory, panels, num_rows, num_inputs) if is_int4 else None

        def multiply(inputs: ProductInputs, output: torch.Tensor | None) -> torch.Tensor:
            if output is None or output.dim() != 2:
                output = inputs.rows.new_empty(num_inputs, num_rows)
            if int4 is not None:
                int4(inputs.words(floats, panels.low_bit.group), output)
            elif kernel == "dots":
                floats.int8_dots_into(inputs.padded(), memory, panels, output)
            else:
                floats.int8_outer_into(inputs.grouped(floats.int8), memory, panels, output)
            return output

        return multiply

    def _by_panels(
        self, rows: torch.Tensor, memory: torch.Tensor, panels: Panels, num_rows: int, kernel: Kernel
    ) -> torch.Tensor:
        output = rows.new_empty(len(rows), num_rows)
        for index, panel in enumerate(memory):
            part = output[:, index * panels.panel_rows : (index + 1) * panels.panel_rows]
            views = views_of(panel, panels)
            if kernel == "packed":
                part.copy_(self._packed(rows, views, panels)[:, : part.shape[1]])
            elif panels.low_bit.bits == 8:
                self._unpacked_int8(rows, views, kernel, part)
            else:
                self._unpacked_int4(rows, views, panels, kernel, part)
        return output

    def _packed(self, rows: torch.Tensor, views: PanelViews, panels: Panels) -> torch.Tensor:
        """[len(rows), panel_rows]."""
        if panels.low_bit.bits == 8:
            if rows.data_ptr() % _INT8_INPUTS_ALIGNED:
                rows = rows.clone()
            return torch._weight_int8pack_mm(rows, views.codes, views.scales)
        group = panels.low_bit.group
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, views.codes, group, views.scales)
        return product

    def _kernel(self, num_inputs: int, panels: Panels, num_rows: int) -> Kernel:
        kernel = self._chosen.get((num_inputs, panels, num_rows))
        if kernel is None:
            kernel = self._choose(num_inputs, panels, num_rows)
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            self._chosen[num_inputs, panels, num_rows] = kernel
        return kernel

    def _choose(self, num_inputs: int, panels: Panels, num_rows: int) -> Kernel:
        if self._triton is not None:
            return self._triton.choose(self._profile, num_inputs, panels, num_rows)
        if not num_inputs or self._device.type != "cpu":
            return "native"
        without: set[Kernel] = set() if panels.layout in (self._machine, INT8_LAYOUT) else {"packed"}
        without |= _missing(self._compiled, self._floats) if panels.layout in (LAYOUT, INT8_LAYOUT) else _OWN
        if self._floats is None or not self._floats.takes(panels):
            without |= _FLOATS
        layout = layout_of(panels.low_bit)
        return self._profile.choose(layout, num_inputs, panels.panel_rows * panels.columns, without)

    def _unpacked_int4(
        self, rows: torch.Tensor, views: PanelViews, panels: Panels, kernel: Kernel, output: torch.Tensor
    ) -> None:
        """Fill `output`, [len(rows), panel_rows] or less of the last panel."""
        order, columns, group = INT4_LAYOUTS[panels.layout], panels.columns, panels.low_bit.group
        packed = views.codes.view(-1, columns, order.block // 2)
        scales = views.scales[..., 0].float()
        zeros = views.scales[..., 1].float().sub_(scales, alpha=8)
        inputs = rows.float() if kernel == "wide" else rows
        at_once = self._rows_at_once(columns)
        for start in range(0, output.shape[1], at_once):
            stop = min(start + at_once, panels.panel_rows)
            part = packed[start // order.block : stop // order.block]
            codes = self._take(torch.uint8, part.numel()).view(part.shape)
            weight = self._take(torch.float32, columns * (stop - start)).view(columns, -1, order.block)
            low, high = halves(weight, order, dim=2)
            low.copy_(torch.bitwise_and(part, 15, out=codes).transpose(0, 1))
            high.copy_(torch.bitwise_right_shift(part, 4, out=codes).transpose(0, 1))
            groups = weight.view(-1, group, stop - start)
            torch.addcmul(zeros[:, None, start:stop], groups, scales[:, None, start:stop], out=groups)
            matrix = weight.view(columns, stop - start)
            if kernel == "native":
                matrix = self._take(ACTIVATIONS, matrix.numel()).view(matrix.shape).copy_(matrix)
            part_of_output = output[:, start:stop]
            part_of_output.copy_(torch.mm(inputs, matrix)[:, : part_of_output.shape[1]])

    def _unpacked_int8(self, rows: torch.Tensor, views: PanelViews, kernel: Kernel, output: torch.Tensor) -> None:
        """As `_unpacked_int4`."""
        dtype = torch.float32 if kernel == "wide" else ACTIVATIONS  # both hold every code exactly
        inputs = rows.to(dtype)
        codes, scales = views.codes[: output.shape[1]], views.scales[: output.shape[1]]
        at_once = self._rows_at_once(codes.shape[1])
        for start in range(0, len(codes), at_once):
            part = codes[start : start + at_once]
            matrix = self._take(dtype, part.numel()).view(part.shape).copy_(part)
            output[:, start : start + at_once] = torch.mm(inputs, matrix.T).mul_(scales[start : start + at_once])

    def _rows_at_once(self, columns: int) -> int:
        return max(1, SCRATCH_BYTES // 4 // columns // BLOCK_ROWS) * BLOCK_ROWS

    def _take(self, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        scratch = self._scratch.get(dtype)
        if scratch is None or scratch.numel() < num_elements:
            with torch.inference_mode(False):  # written to in and out of inference mode
                scratch = self._scratch[dtype] = torch.empty(num_elements, dtype=dtype, device=self._device)
        return scratch[:num_elements]


_Call = TypeVar("_Call")


class _Calls(Generic[_Call]):
    """Products of one weight by how many rows of inputs they are for, each made once."""

    def __init__(self, make: Callable[[int], _Call]) -> None:
        self._make = make
        self._made: dict[int, _Call] = {}

    def for_count(self, num_inputs: int) -> _Call:
        """That for so many rows."""
        call = self._made.get(num_inputs)
        if call is None:
            if len(self._made) >= _REMEMBERED_COUNTS:
                self._made.clear()
            call = self._made[num_inputs] = self._make(num_inputs)
        return call


def _shared(inputs: torch.Tensor | ProductInputs, columns: int) -> tuple[ProductInputs, torch.Tensor]:
    """`inputs` [..., columns] as kernels take them, [n, columns]: the same object if it is that; and its tensor."""
    if not isinstance(inputs, ProductInputs):
        return ProductInputs(_rows_of(inputs, columns)), inputs
    is_taken = inputs.rows.dtype is ACTIVATIONS and inputs.rows.is_contiguous()
    return inputs if is_taken else ProductInputs(_rows_of(inputs.rows, columns)), inputs.rows


def _rows_of(inputs: torch.Tensor, columns: int) -> torch.Tensor:
    rows = inputs.reshape(-1, columns)
    if rows.dtype is not ACTIVATIONS or not rows.is_contiguous():
        rows = rows.to(ACTIVATIONS).contiguous()
    return rows


def compiled_low_bit(code_folder: Path | None = None) -> CompiledLowBit | None:
    """Our own low-bit products, None where they cannot be had (see `obstacle`)."""
    return None if obstacle() else CompiledLowBit(code_folder, amx=not amx_obstacle())


def float_low_bit(code_folder: Path | None = None) -> FloatLowBit | None:
    """Our own float32 products with low-bit panels, None where they cannot be had (see `floats_obstacle`)."""
    return None if floats_obstacle() else FloatLowBit(code_folder)


def layout_of(low_bit: LowBitFormat) -> Layout:
    """Under which a format's kernels are measured."""
    return cast(Layout, f"int{low_bit.bits}")


def always_low_bit(kernel: Kernel) -> KernelProfile:
    """A profile that chooses `kernel`."""
    costs: dict[Layout, dict[Kernel, Cost]] = {
        layout: {one: Cost(0.0, (1, 2), (0.0, 0.0) if one == kernel else (1.0, 1.0)) for one in KERNELS[layout]}
        for layout in _LAYOUTS
    }
    return KernelProfile("bfloat16", torch.get_num_threads(), costs)


def measure_low_bit(
    layouts: Collection[Layout], compiled: CompiledLowBit | None = None, floats: FloatLowBit | None = None
) -> KernelProfile:
    """Time every kernel of `layouts` on this machine with the number of threads that torch has now."""
    with torch.inference_mode():
        costs = {layout: _measure(layout, compiled, floats) for layout in _LAYOUTS if layout in layouts}
    return KernelProfile("bfloat16", torch.get_num_threads(), costs)


_LAYOUTS: tuple[Layout, ...] = ("int4", "int8")


def _kernels(layout: Layout, compiled: CompiledLowBit | None, floats: FloatLowBit | None) -> list[Kernel]:
    missing = _missing(compiled, floats)
    return [kernel for kernel in KERNELS[layout] if kernel not in missing]


def _missing(compiled: CompiledLowBit | None, floats: FloatLowBit | None) -> frozenset[Kernel]:
    """Kernels of our own that cannot be had."""
    missing: frozenset[Kernel] = frozenset() if floats is not None else _FLOATS
    if compiled is None:
        return missing | _OWN
    return missing | {"amx"} if compiled.amx is None else missing


def _measure(layout: Layout, compiled: CompiledLowBit | None, floats: FloatLowBit | None) -> dict[Kernel, Cost]:
    kernels = _kernels(layout, compiled, floats)
    machine = machine_layout()
    panels = divide(*_MEASURED_SHAPE, LowBitFormat.parse(layout), machine)
    small = divide(BLOCK_ROWS, panels.low_bit.columns_multiple, panels.low_bit, machine)

    def call(kernel: Kernel, shape: Panels) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        products = LowBitProducts(always_low_bit(kernel), machine, compiled=compiled, floats=floats)
        return lambda inputs, memory: products.linear(inputs, memory, shape, shape.rows, None)

    def weights(shape: Panels, count: int) -> Any:
        return itertools.cycle(torch.zeros(count, *shape.shape, dtype=torch.uint8))

    one = torch.ones(1, small.columns, dtype=ACTIVATIONS)
    fixed = least_seconds({k: call(k, small) for k in kernels}, one, weights(small, 2), 4 * _MEASURED_TIMES)
    running = {kernel: call(kernel, panels) for kernel in kernels}
    rates: dict[Kernel, list[float]] = {kernel: [] for kernel in running}
    memory = weights(panels, max(2, _UNCACHED_BYTES // panels.panel_bytes))
    elements = panels.panel_rows * panels.columns
    for rows in _MEASURED_ROWS:
        inputs = torch.ones(rows, panels.columns, dtype=ACTIVATIONS)
        times = _MEASURED_TIMES * (4 if rows < 16 else 1)  # memory that others use disturbs more than a processor
        seconds = least_seconds(running, inputs, memory, times)
        for kernel, took in seconds.items():
            rates[kernel].append(max(0.0, took - fixed[kernel]) / elements)
            if rows >= 32 and is_hopeless(rates[kernel], _MEASURED_ROWS, took / min(seconds.values())):
                del running[kernel]
    return {k: Cost(fixed[k], _MEASURED_ROWS[: len(r)], cleaned(r)) for k, r in rates.items()}


__all__ = [
    "ACTIVATIONS",
    "LowBitProducts",
    "always_low_bit",
    "compiled_low_bit",
    "float_low_bit",
    "layout_of",
    "measure_low_bit",
]
