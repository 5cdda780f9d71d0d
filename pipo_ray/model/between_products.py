"""What a model computes between its products, for many tokens on the CPU: RMS norms, and gates with SiLU.

A prompt's time between products is a fourth of it where the processor has a matrix unit, and a drive whose slots are
full stands still meanwhile.

A norm is replaced if it gives, for random numbers, what the machine code gives: so no architecture has to be known. A
gate is `silu(x) * y` wherever a module writes it: the activation returns its input as a tensor of another type, which
becomes the product with the next factor, or the activation itself if anything else is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from pipo_ray.compiled.between_rows import MULTIPLE, BetweenRows

LEAST_NUMBERS = 1 << 16
"""Below it torch's operations take no longer."""

_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_PROBE_ROWS = 4
_DIFFERENT = 0.01
"""Of the numbers, whose sums of squares were added in another order, by one step of bf16."""


def replace_between_products(model: nn.Module, rows: BetweenRows) -> None:
    """Have the norms of `model`, whose weights are bound later, and its SiLUs computed by `rows` where they can be."""
    known: dict[tuple[type, int], bool] = {}
    for module in model.modules():
        if type(module).__name__ in ("SiLU", "SiLUActivation"):
            module.__dict__["forward"] = partial(_silu, rows, module.forward)
            continue
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        size = int(module.weight.shape[0])  # type: ignore[arg-type, index]
        kind = type(module), size
        if kind not in known:
            known[kind] = _is_computed_so(module, size, epsilon, rows)
        if known[kind]:
            module.__dict__["forward"] = partial(_norm, rows, module, epsilon, module.forward)


def _epsilon(module: nn.Module) -> float | None:
    """Of an RMS norm in bf16 of rows of the right length; None of anything else."""
    if "RMSNorm" not in type(module).__name__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight: Any = module.weight
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    fits = weight.dim() == 1 and weight.dtype is torch.bfloat16 and not len(weight) % MULTIPLE
    return float(epsilon) if fits and isinstance(epsilon, float) else None


def _is_computed_so(module: nn.Module, size: int, epsilon: float, rows: BetweenRows) -> bool:
    generator = torch.Generator().manual_seed(size)
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in ((1, _PROBE_ROWS, size), (size,))]
    try:
        with torch.inference_mode():
            wanted = torch.func.functional_call(module, {"weight": made[1]}, (made[0],))
            got = rows.norm(made[0], made[1], epsilon)
    except (TypeError, RuntimeError):  # it takes more than rows
        return False
    if not isinstance(wanted, torch.Tensor) or wanted.shape != got.shape or wanted.dtype is not got.dtype:
        return False
    return float((got != wanted).float().mean()) <= _DIFFERENT and torch.allclose(
        got.float(), wanted.float(), rtol=2**-7, atol=0.0
    )


def _norm(
    rows: BetweenRows, module: nn.Module, epsilon: float, original: Callable[..., Any], hidden_states: torch.Tensor,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    weight: Any = module._parameters["weight"]
    if args or kwargs or not _is_large(hidden_states) or not hidden_states.is_contiguous():
        return original(hidden_states, *args, **kwargs)
    if weight is None or weight.dtype is not torch.bfloat16 or not weight.is_contiguous():
        return original(hidden_states)
    return rows.norm(hidden_states, weight, epsilon)


def _silu(rows: BetweenRows, original: Callable[..., Any], inputs: torch.Tensor) -> torch.Tensor:
    if not _is_large(inputs) or inputs.shape[-1] % MULTIPLE or type(inputs) is not torch.Tensor:
        return original(inputs)  # type: ignore[no-any-return]
    pending = inputs.as_subclass(PendingSiLU)
    pending.rows = rows
    return pending


def _is_large(numbers: torch.Tensor) -> bool:
    return (
        numbers.numel() >= LEAST_NUMBERS and numbers.dtype is torch.bfloat16 and numbers.device.type == "cpu"
        and not numbers.requires_grad
    )  # fmt: skip


class PendingSiLU(torch.Tensor):
    """silu of the numbers that this tensor has, not computed yet."""

    rows: BetweenRows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The gate if it is multiplied with numbers of the same shape; else what `func` makes of the activation."""
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            gated = _gated(*args)
            if gated is not None:
                return gated
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _gated(one: Any, other: Any) -> torch.Tensor | None:
    pending, up = (one, other) if isinstance(one, PendingSiLU) else (other, one)
    if type(up) is not torch.Tensor or up.dtype is not torch.bfloat16:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        gate, rows = pending.as_subclass(torch.Tensor), pending.rows
    if gate.shape != up.shape:
        return None
    matrices = [_as_matrix(gate), _as_matrix(up)]
    if matrices[0] is None or matrices[1] is None:
        return None
    return rows.gate(matrices[0], matrices[1]).view(gate.shape)


def _as_matrix(numbers: torch.Tensor) -> torch.Tensor | None:
    """A view [rows, size] with contiguous rows, if there is one."""
    if numbers.is_contiguous():
        return numbers.view(-1, numbers.shape[-1])
    if numbers.dim() < 2 or numbers.stride(-1) != 1 or any(length != 1 for length in numbers.shape[:-2]):
        return None
    return numbers.reshape(numbers.shape[-2:]) if numbers.dim() == 2 else numbers[(0,) * (numbers.dim() - 2)]


def _computed(value: Any) -> Any:
    if not isinstance(value, PendingSiLU):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return F.silu(value.as_subclass(torch.Tensor))
