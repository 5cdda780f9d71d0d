"""Are an architecture's fused experts multiplied by `F.linear`, one at a time? Asked of a tiny random model of it.

Low-bit weights answer that operation alone. Some architectures (gpt-oss) multiply with the transposed tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from pipo_ray.model.graph import set_experts_implementation
from pipo_ray.model.probe import tiny_model
from pipo_ray.model.streamed import FusedExperts, LowBitMatrix
from pipo_ray.model.trace import is_experts

_TOKENS = 24
_TOLERANCE = 1e-6


def experts_are_linear(config: PretrainedConfig) -> bool:
    """Whether every fused expert tensor of `config`'s architecture is used as `F.linear(x, tensor[e], ...)` and in no
    other way. False if there are none.
    """
    try:
        model = tiny_model(config)
        set_experts_implementation(model, "eager")
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.arange(_TOKENS).mul_(7).remainder_(vocabulary).view(1, -1)
        with torch.inference_mode():
            wanted = model(input_ids=ids, use_cache=False).logits
            if not _stand_in(model):
                return False
            got = model(input_ids=ids, use_cache=False).logits
    except Exception:  # whatever such a model cannot do
        return False
    return bool((got - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())


def _stand_in(model: Any) -> int:
    """Put stand-ins that answer `F.linear` in the places of `model`'s fused experts; how many."""
    count = 0
    for module in model.modules():
        if not is_experts(module):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                experts = [_answer(part) for part in parameter.detach()]
                stand_in: Any = FusedExperts.make(
                    tuple(parameter.shape), parameter.dtype, parameter.device, experts.__getitem__
                )
                module._parameters[name] = stand_in
                count += 1
    return count


def _answer(weight: torch.Tensor) -> torch.Tensor:
    def product(inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(inputs, weight, bias)

    return LowBitMatrix.make(tuple(weight.shape), weight.dtype, weight.device, product)
