"""What a model computes between its products, for many tokens on the CPU: RMS norms, and the gate of an MLP with SiLU.

torch makes several passes over memory for each, machine code one (`pipo_ray/compiled/between_rows.py`); a drive whose
slots are full stands still meanwhile. No architecture has to be known: a module is replaced if it gives, for random
numbers of several sizes, what the machine code gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from pipo_ray.compiled.between_rows import MULTIPLE, BetweenRows

LEAST_NUMBERS = 1 << 16
"""Below it torch's operations take no longer."""

MLP, ACTIVATION = ("gate_proj", "up_proj", "down_proj"), "act_fn"
"""The parts of an MLP with a gate."""
_PROBE_SHAPE = (1, 4, 64)
_SCALES = (1.0, 1e-3, 30.0)
_NOBODYS, _PLAIN = set(vars(nn.Module())), (bool, int, float, str, type(None))
_DIFFERENT = 0.02
"""Of the numbers, by one step of bf16: sums of squares are added in another order, exponentials made otherwise."""


def replace_between_products(model: nn.Module, rows: BetweenRows) -> None:
    """Have the norms and gates of `model`, whose weights are bound later, computed by `rows` where they can be."""
    replaced: dict[Any, Callable[..., Any] | None] = {}
    for module in model.modules():
        kind = _kind(module)
        if kind not in replaced:
            replaced[kind] = _replacement(module, rows)
        computed = replaced[kind]
        if computed is not None:
            module.__dict__["forward"] = partial(computed, rows, module, module.forward)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Alike for modules that differ in nothing but their weights: their class, what is written on them, their parts."""
    own = [(name, value) for name, value in vars(module).items() if name not in _NOBODYS]
    told = tuple((name, value if isinstance(value, _PLAIN) else id(value)) for name, value in own)
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in module.parameters(recurse=False))
    return type(module), told, shapes, tuple((name, _kind(part)) for name, part in module.named_children())


def _replacement(module: nn.Module, rows: BetweenRows) -> Callable[..., Any] | None:
    epsilon = _epsilon(module)
    if epsilon is not None and _is_norm(module, epsilon, rows):
        return partial(_norm, epsilon)
    return _gated if _is_gated(module, rows) else None


def norm_epsilon(module: nn.Module) -> Any:
    """Of an RMS norm, by its class's name; None of anything else."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if "RMSNorm" in type(module).__name__ else None


def _epsilon(module: nn.Module) -> float | None:
    """Of an RMS norm in bf16 of rows of the right length; None of anything else."""
    epsilon = norm_epsilon(module)
    if epsilon is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight: Any = module.weight
    fits = weight.dim() == 1 and weight.dtype is torch.bfloat16 and not len(weight) % MULTIPLE
    return float(epsilon) if fits and isinstance(epsilon, float) else None


def _is_norm(module: nn.Module, epsilon: float, rows: BetweenRows) -> bool:
    """Whether it computes what `BetweenRows.norm` does, of rows as small as the root of `epsilon`, too."""
    size = len(module.weight)  # type: ignore[arg-type]
    weight = _random(size, seed=size)
    for scale in (*_SCALES, epsilon**0.5):
        inputs = (scale * _random(1, _PROBE_SHAPE[1], size, seed=size + 1)).bfloat16()
        try:
            with torch.inference_mode():
                wanted = torch.func.functional_call(module, {"weight": weight}, (inputs,))
        except Exception:  # it takes more than rows, and may raise whatever it likes without
            return False
        if not _are_alike(rows.norm(inputs, weight, epsilon), wanted):
            return False
    return True


def _is_gated(module: nn.Module, rows: BetweenRows) -> bool:
    """Whether it is `down_proj(silu(gate_proj(x)) * up_proj(x))`, asked in this order: tried with other functions in
    the place of the three products.
    """
    if {name for name, _ in module.named_children()} != {*MLP, ACTIVATION} or next(module.buffers(), None) is not None:
        return False
    if any(type(getattr(module, name)) is not nn.Linear for name in MLP):
        return False
    inputs = _random(*_PROBE_SHAPE, seed=0)
    for number, scale in enumerate(_SCALES):
        factors = {name: scale * _random(*_PROBE_SHAPE, seed=2 * number + at) for at, name in enumerate(MLP[:2])}
        stood_in = copy.copy(module)
        stood_in._modules = dict(module._modules)
        asked: list[tuple[str, torch.Tensor]] = []
        for name in MLP:
            stood_in._modules[name] = _StandIn(name, factors.get(name), asked)
        try:
            with torch.inference_mode():
                wanted = stood_in.forward(inputs)
        except Exception:  # whatever another module makes of such products
            return False
        names = tuple(name for name, _ in asked)
        if names != MLP or asked[0][1] is not inputs or asked[1][1] is not inputs or wanted is not asked[2][1]:
            return False
        gate, up = (factors[name].flatten(0, 1) for name in MLP[:2])
        if not _are_alike(rows.gate(gate, up).view(wanted.shape), wanted):
            return False
    return True


class _StandIn(nn.Module):
    """In the place of a product: gives `factor`, or its inputs if that is None, and tells what was `asked`."""

    def __init__(self, name: str, factor: torch.Tensor | None, asked: list[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self.name, self.factor, self.asked = name, factor, asked

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What was given for it."""
        self.asked.append((self.name, inputs))
        return inputs if self.factor is None else self.factor.clone()


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _are_alike(got: torch.Tensor, wanted: Any) -> bool:
    if not isinstance(wanted, torch.Tensor) or wanted.shape != got.shape or wanted.dtype is not got.dtype:
        return False
    same = torch.allclose(got.float(), wanted.float(), rtol=2**-7, atol=1e-30)
    return same and float((got != wanted).float().mean()) <= _DIFFERENT


def _norm(
    epsilon: float, rows: BetweenRows, module: nn.Module, original: Callable[..., Any], hidden_states: torch.Tensor,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    weight: Any = module._parameters["weight"]
    if (
        args or kwargs or not _is_for_machine_code(hidden_states) or weight.dtype is not torch.bfloat16
        or not weight.is_contiguous() or hidden_states.shape[-1:] != weight.shape
    ):  # fmt: skip
        return original(hidden_states, *args, **kwargs)
    return rows.norm(hidden_states, weight, epsilon)


def _gated(
    rows: BetweenRows, module: nn.Module, original: Callable[..., Any], inputs: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs:
        return original(inputs, *args, **kwargs)
    projections: Any = module
    gate, up = projections.gate_proj(inputs), projections.up_proj(inputs)
    if not (_is_for_machine_code(gate) and _is_for_machine_code(up)) or gate.shape[-1] % MULTIPLE:
        return projections.down_proj(projections.act_fn(gate) * up)
    gated = rows.gate(gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1]))
    return projections.down_proj(gated.view(gate.shape))


def _is_for_machine_code(numbers: torch.Tensor) -> bool:
    return (
        type(numbers) is torch.Tensor and numbers.numel() >= LEAST_NUMBERS and numbers.dtype is torch.bfloat16
        and numbers.device.type == "cpu" and not numbers.requires_grad and numbers.is_contiguous()
    )  # fmt: skip
