"""Which of a model's tensors are stored with few bits, and which cannot be. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from pipo_ray.errors import InputError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.formats import AS_SOURCE, LowBitFormat
from pipo_ray.quant.panels import PANEL_BYTES, divide
from pipo_ray.quant.policy import EVERYTHING, Precision


def assign(
    blocks: Sequence[BlockSpec],
    precision: Precision,
    *,
    looked_up: Collection[str],
    layout: str,
    linear_experts: bool = False,
    panel_bytes: int = PANEL_BYTES,
    source_format: Callable[[TensorSpec], LowBitFormat | None] | None = None,
) -> tuple[BlockSpec, ...]:
    """`blocks` with the tensors that `precision` asks for turned into panels.

    Only matrices that are used by nn.Linear alone can be, and experts if `linear_experts` (see
    `model/linear_experts.py`). `looked_up` are the tables of embeddings. A tensor that
    cannot be stays as it is under a rule for "*". `source_format` says in which format the checkpoint has codes of a
    tensor: what a rule for "source" makes of it. Raises InputError naming the tensor and the reason if a more specific
    rule asks for it, or if nothing is left that could be quantized.
    """
    kept: list[str] = []
    num_packed = 0

    def one(tensor: TensorSpec) -> TensorSpec:
        nonlocal num_packed
        rule = precision.rule_for(tensor.name)
        if rule is None:
            return tensor
        if rule.format != AS_SOURCE:
            low_bit = LowBitFormat.parse(rule.format)
        elif source_format is None or (own := source_format(tensor)) is None:
            return tensor
        else:
            low_bit = own
        if (reason := refusal(tensor, low_bit, looked_up, linear_experts)) is not None:
            # "*.mlp.*" means the matrices in there, and not their biases.
            named = rule.pattern == tensor.name or (rule.pattern != EVERYTHING and len(tensor.shape) == 2)
            if named and rule.format != AS_SOURCE:
                raise InputError(f"precision rule {rule.pattern!r}: {tensor.name} cannot be {low_bit.name}: {reason}")
            kept.append(f"{tensor.name}: {reason}")
            return tensor
        num_packed += 1
        panels = divide(tensor.shape[0], tensor.shape[1], low_bit, layout, panel_bytes)
        return replace(tensor, shape=panels.shape, dtype="U8", panels=panels)

    result = tuple(replace(block, tensors=tuple(one(tensor) for tensor in block.tensors)) for block in blocks)
    if precision.asks_for_few_bits and not num_packed:
        # A matrix says more about why than a norm does.
        why = next((reason for reason in kept if "columns" in reason), kept[0] if kept else "no rule matches a tensor")
        raise InputError(f"precision {precision.label}: no tensor can be quantized ({why}); use --precision 16bit")
    return result


def refusal(tensor: TensorSpec, low_bit: LowBitFormat, looked_up: Collection[str], linear_experts: bool) -> str | None:
    """Why `tensor` cannot be held in `low_bit`, or None if it can; the other arguments are those of `assign`."""
    if tensor.expert is not None and not linear_experts:
        return "it is one of a layer's fused experts, which this architecture does not multiply one by one"
    if len(tensor.shape) != 2:
        return f"it has shape {list(tensor.shape)}, not a matrix's"
    if tensor.name in looked_up:
        return "it is a table of embeddings"
    if tensor.cut != "rows" and tensor.expert is None:
        return "it is used by something other than nn.Linear"
    if tensor.dtype != "BF16":
        return f"the model keeps it in {tensor.dtype}"
    if not tensor.shape[0] or not tensor.shape[1] or tensor.shape[1] % low_bit.columns_multiple:
        what = f"groups of {low_bit.group}" if low_bit.group else "int8"
        return f"{what} need a multiple of {low_bit.columns_multiple} columns, it has {tensor.shape[1]}"
    return None
