"""The products of a plan's low-bit weights, for the device that computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from pipo_ray.model.kept_profiles import Costs, Measurable, ProfilePlaces, device_facts, kept_profile
from pipo_ray.model.kernel_profile import KERNELS, KernelProfile, Layout
from pipo_ray.model.low_bit import ACTIVATIONS, LowBitProducts, layout_of
from pipo_ray.plan.pieces import SweepPlan
from pipo_ray.quant.panels import Panels, machine_layout
from pipo_ray.triton_kernels.support import keep_compiled_in, obstacle

TRITON_FOLDER = "triton"
"""Where, beside other machine code, what Triton compiles is kept."""


def products_for(
    plan: SweepPlan, places: ProfilePlaces, device: torch.device, code_folder: Path | None = None
) -> LowBitProducts | None:
    """The products of the plan's low-bit weights; None if it has none. `places` and `code_folder` are those of
    `LowBitProducts.for_run`.
    """
    used = [tensor.panels for piece in plan.pieces for tensor in piece.tensors if tensor.panels is not None]
    if not used:
        return None
    if device.type == "cpu":
        return LowBitProducts.for_run({layout_of(panels.low_bit) for panels in used}, places, code_folder)
    return cuda_products(most_used(used), places, device, code_folder)


def most_used(panels: Sequence[Panels]) -> list[Panels]:
    """Of each width, panels of the format and the layout that most of them have."""
    kinds = Counter((one.low_bit.bits, one.format, one.layout) for one in panels)
    chosen = {bits: (format, layout) for (bits, format, layout), _ in reversed(kinds.most_common())}
    return [next(one for one in panels if (one.format, one.layout) == kind) for _, kind in sorted(chosen.items())]


def cuda_products(
    kinds: Sequence[Panels], places: ProfilePlaces, device: torch.device, code_folder: Path | None
) -> LowBitProducts:
    """Products on a CUDA device: by Triton's kernels if they can be had and are right for panels like `kinds`, else by
    torch, and then they say why (`LowBitProducts.obstacle`).

    A few seconds when kernels are compiled, which are then kept in `code_folder`; half a second when they are measured.
    """
    reason = obstacle(torch.cuda.get_device_capability(device))
    if reason is None:
        try:
            keep_compiled_in(None if code_folder is None else code_folder / TRITON_FOLDER)
            return _triton_products(kinds, places, device)
        except Exception as error:
            # Whatever a compiler that we do not own may raise: without it everything can be computed, too.
            reason = f"its kernels do not work here ({first_line(error)})"
    empty = KernelProfile("bfloat16", torch.get_num_threads(), {})
    return LowBitProducts(empty, machine_layout(), device, obstacle=reason)


def _triton_products(kinds: Sequence[Panels], places: ProfilePlaces, device: torch.device) -> LowBitProducts:
    from pipo_ray.triton_kernels.measure import check, measure
    from pipo_ray.triton_kernels.products import TritonProducts
    from pipo_ray.triton_kernels.products import layout_of as cuda_layout_of

    products = TritonProducts(device)
    for panels in kinds:
        check(products, panels, device)
    by_layout = {cuda_layout_of(one): one for one in kinds}
    facts = device_facts(device)
    wanted = {
        layout: Measurable(KERNELS[layout], {**facts, "format": one.format, "panels": one.layout})
        for layout, one in by_layout.items()
    }

    def measure_missing(layouts: Collection[Layout]) -> Mapping[Layout, Costs]:
        return measure(products, [by_layout[layout] for layout in layouts], device).costs

    profile = kept_profile(places, ACTIVATIONS, wanted, measure_missing)
    torch.cuda.empty_cache()
    return LowBitProducts(profile, machine_layout(), device, triton=products)


def first_line(error: Exception) -> str:
    """What the error is, in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
