"""What attends to packed pages on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import torch

from pipo_ray.model.cpu_linear import HALF_DTYPES
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.low_bit_choice import TRITON_FOLDER, first_line
from pipo_ray.model.packed_rows import PackedRows
from pipo_ray.plan.low_bit_pages import PageLayout
from pipo_ray.triton_kernels.support import keep_compiled_in, obstacle


def rows_for(
    bits: tuple[int, ...], facts: ModelFacts, dtype: torch.dtype, device: torch.device, code_folder: Path | None
) -> PackedRows | str:
    """Attention of a row's tokens that come alone, by Triton's kernels, if they can be had and are right for pages of
    the model's shapes in `bits`, a number per layer; else why not, in words for the user.

    A few seconds when kernels are compiled, which are then kept in `code_folder`.
    """
    if dtype not in HALF_DTYPES:
        return f"the model is computed in {str(dtype)[6:]}"
    reason = obstacle(torch.cuda.get_device_capability(device))
    if reason is not None:
        return reason
    try:
        keep_compiled_in(None if code_folder is None else code_folder / TRITON_FOLDER)
        return _checked_rows(bits, facts, dtype, device)
    except Exception as error:
        # Whatever a compiler that we do not own may raise: without it everything can be computed, too.
        return f"Triton's kernels do not work here ({first_line(error)})"


def _checked_rows(bits: tuple[int, ...], facts: ModelFacts, dtype: torch.dtype, device: torch.device) -> PackedRows:
    from pipo_ray.triton_kernels.packed_check import check
    from pipo_ray.triton_kernels.packed_kernels import PackedKernels

    kernels = PackedKernels(device)
    layouts = [PageLayout(*shape, few) for shape in facts.kv_shapes for few in sorted(set(bits) - {16})]
    with torch.inference_mode():
        check(kernels, layouts, facts.num_attention_heads, dtype, device)
    torch.cuda.empty_cache()
    return PackedRows(bits, kernels)
