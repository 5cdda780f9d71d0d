"""Which of a model's tensors are stored with few bits, and which cannot be. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from pipo_ray.errors import InputError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.formats import AS_SOURCE, GROUPS, SIXTEEN_BITS, LowBitFormat
from pipo_ray.quant.panels import PANEL_BYTES, divide
from pipo_ray.quant.policy import EVERYTHING, Precision
from pipo_ray.quant.rule_check import require_effect


def assign(
    blocks: Sequence[BlockSpec],
    precision: Precision,
    *,
    looked_up: Collection[str],
    layout: str,
    linear_experts: bool = False,
    panel_bytes: int = PANEL_BYTES,
    source_format: Callable[[TensorSpec], LowBitFormat | None] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> tuple[BlockSpec, ...]:
    """`blocks` with the tensors that `precision` asks for turned into panels.

    Only matrices that are used by nn.Linear alone can be, and experts if `linear_experts` (see
    `model/linear_experts.py`). `looked_up` are the tables of embeddings. A tensor that
    cannot be stays as it is under a rule for "*". `source_format` says in which format the checkpoint has codes of a
    tensor: what a rule for "source" makes of it; `aliases` are names of tensors that are tied to one of `blocks`.

    Raises InputError for a rule that holds for nothing (`require_effect`); naming the tensor, the reason and what would
    fit, if a more specific rule asks for what cannot be, or if nothing is left that could be quantized.
    """
    require_effect(precision, dict.fromkeys(tensor.name for block in blocks for tensor in block.tensors), aliases)
    kept: list[tuple[TensorSpec, LowBitFormat, str]] = []
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
                fitting = _fitting([(tensor, low_bit)], looked_up, linear_experts)
                instead = f"write {' or '.join(fitting)} in this rule, or " if fitting else ""
                raise InputError(
                    f"{precision}: rule {rule}: {tensor.name} cannot be {low_bit.name}: {reason}; {instead}put "
                    f'["{tensor.name}", "{SIXTEEN_BITS}"] in front of it'
                )
            kept.append((tensor, low_bit, reason))
            return tensor
        num_packed += 1
        panels = divide(tensor.shape[0], tensor.shape[1], low_bit, layout, panel_bytes)
        return replace(tensor, shape=panels.shape, dtype="U8", panels=panels)

    result = tuple(replace(block, tensors=tuple(one(tensor) for tensor in block.tensors)) for block in blocks)
    if precision.asks_for_few_bits and not num_packed:
        # A matrix says more about why than a norm does.
        odd = [one for one in kept if "columns" in one[2]]
        name, why = next((tensor.name, reason) for tensor, _, reason in odd or kept)
        fitting = _fitting([(tensor, low_bit) for tensor, low_bit, _ in odd], looked_up, linear_experts)
        raise InputError(
            f"{precision}: no tensor can be quantized ({name}: {why}); use "
            f"{'--precision ' if precision.file is None else ''}{' or '.join(fitting) or SIXTEEN_BITS}"
        )
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


def _fitting(
    refused: Sequence[tuple[TensorSpec, LowBitFormat]], looked_up: Collection[str], linear_experts: bool
) -> list[str]:
    """Of tensors and the formats that they cannot have: the names of others that the most of them can, those with the
    fewest bits first; none if nothing fits any.
    """
    counts: Counter[LowBitFormat] = Counter()
    for tensor, asked in refused:
        groups = (LowBitFormat(4, group, asked.bits == 4 and asked.symmetric) for group in sorted(GROUPS, reverse=True))
        for other in (*groups, LowBitFormat.parse("int8")):
            counts[other] += refusal(tensor, other, looked_up, linear_experts) is None
    most = max(counts.values(), default=0)
    return [one.name for one, count in counts.items() if count == most > 0]
