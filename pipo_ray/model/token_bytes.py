"""What a token of a sweep takes besides weights and KV cache: measured on the meta graph, where nothing is allocated.

Operations make and free tensors there in the order in which they do on a device. What a run computes otherwise than the
graph (attention, products with weights that are converted or come in parts) takes here what it takes there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.cpu_linear import HALF_DTYPES
from pipo_ray.model.kernel_profile import SCRATCH_BYTES
from pipo_ray.model.layer_replay import layer_kinds, replayed_layers
from pipo_ray.model.live_bytes import LiveBytes
from pipo_ray.model.trace import Scratch, attention_scratch, run_on_meta

_TOKENS = 1024
"""So many that what does not depend on their number is nothing beside them."""

_MATMULS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


def token_bytes(model: PreTrainedModel) -> tuple[int, int] | None:
    """Bytes per token at the peak of a ragged row's forward pass, logits left out. `model` is all on meta, with the
    trace's attention.

    The first number holds where a product is written in its place and a sequence's attention is computed in its dtype:
    a GPU with 16-bit weights, its KV cache in as many bits. The second holds everywhere: inputs are converted, the
    product of a weight's part is copied, attention to several places is merged in float32. None where the graph cannot
    tell: values decide how much is computed (experts), or memory grows faster than the row.
    """
    try:
        kinds = layer_kinds(model)
        lean = _per_token(model, kinds, "lean")
        most = None if lean is None else _per_token(model, kinds, "most")
    except UnsupportedModelError:  # with so many tokens; it has been traced with a few
        return None
    return None if lean is None or most is None else (lean, max(lean, most))


def _per_token(model: PreTrainedModel, kinds: dict[nn.Module, Hashable], scratch: Scratch) -> int | None:
    few, many = (_peak(model, kinds, count, scratch) for count in (_TOKENS, 2 * _TOKENS))
    if few is None or many is None or many > 2 * few:
        return None
    return -(-few // _TOKENS)


def _peak(model: PreTrainedModel, kinds: dict[nn.Module, Hashable], num_tokens: int, scratch: Scratch) -> int | None:
    products = _ConvertedProducts() if scratch == "most" else contextlib.nullcontext()
    # As `ModelRunner` does; architectures that do not know it make the logits of all tokens in a run, too.
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with attention_scratch(scratch), LiveBytes() as live, products, replayed_layers(kinds, live):
        asked = run_on_meta(model, num_tokens, "its activations cannot be measured", use_cache=False, **kept)
    return None if asked else live.peak


class _ConvertedProducts(TorchFunctionMode):
    """Products with parameters take what `CpuProducts` does, and a copy of a part's product: parts are equal, so it is
    half of the whole one or less.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scratch: list[torch.Tensor] = []
        if func is F.linear and isinstance(args[1], nn.Parameter):
            scratch = _linear_scratch(args[0], args[1])
        elif func in _MATMULS and isinstance(args[1], nn.Parameter):
            scratch = _matmul_scratch(args[0], args[1])
        elif func is torch.addmm and len(args) == 3 and isinstance(args[2], nn.Parameter):
            scratch = _matmul_scratch(args[1], args[2])
        result = func(*args, **kwargs)
        scratch.clear()
        return result


def _linear_scratch(inputs: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    rows = inputs.numel() // inputs.shape[-1]
    part = inputs.new_empty(rows, -(-weight.shape[0] // 2))
    if inputs.dtype not in HALF_DTYPES:
        return [part]
    at_once = min(weight.shape[0], max(1, SCRATCH_BYTES // 4 // weight.shape[1]))
    return [part, _float32(rows, inputs.shape[-1]), _float32(rows, at_once)]


def _matmul_scratch(inputs: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Of a weight [in, out], which never comes in parts."""
    if inputs.dtype not in HALF_DTYPES:
        return []
    rows = inputs.numel() // inputs.shape[-1]
    return [_float32(rows, inputs.shape[-1]), _float32(rows, weight.shape[1])]


def _float32(rows: int, columns: int) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device="meta")
