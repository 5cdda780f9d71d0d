"""Norms and gates by machine code: which are replaced, and that they compute what the modules do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from pipo_ray.compiled.between_rows import BetweenRows
from pipo_ray.compiled.support import obstacle
from pipo_ray.model.between_products import LEAST_NUMBERS, PendingSiLU, replace_between_products

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

SIZE = 256
COUNT = LEAST_NUMBERS // SIZE


class Counted(BetweenRows):
    """Which also counts its calls."""

    calls = 0

    def norm(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        return super().norm(*arguments)

    def gate(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        return super().gate(*arguments)


@pytest.fixture
def rows() -> Counted:
    return Counted()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def in_bf16(module: nn.Module) -> nn.Module:
    """With random weights."""
    for number, parameter in enumerate(module.parameters()):
        parameter.requires_grad = False
        parameter.data = normal(*parameter.shape, seed=number + 1)
        if parameter.dim() == 2:
            parameter.data /= parameter.shape[1] ** 0.5
    return module


def replaced(make: Callable[[], nn.Module], rows: BetweenRows) -> tuple[nn.Module, nn.Module]:
    """Two alike; the second one's parts are replaced before it has its weights, as in a run."""
    with torch.device("meta"):
        theirs = make().bfloat16()
    replace_between_products(theirs, rows)
    own = in_bf16(make())
    for name, parameter in own.named_parameters():
        holder, _, leaf = name.rpartition(".")
        theirs.get_submodule(holder)._parameters[leaf] = parameter
    return own, theirs


def differing(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one != other).float().mean())


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_are_replaced_where_they_give_the_same(kind: Any, rows: Counted) -> None:
    own, theirs = replaced(lambda: nn.Sequential(kind(SIZE, 1e-5), kind(SIZE, 1e-3)), rows)
    rows.calls = 0
    inputs = normal(1, COUNT, SIZE)
    with torch.inference_mode():
        got, expected = theirs(inputs), own(inputs)
    assert rows.calls == 2
    assert differing(got, expected) < 0.01
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=0.0)


@pytest.mark.parametrize(
    ("kind", "size"), [(GemmaRMSNorm, SIZE), (Olmo2RMSNorm, SIZE), (Qwen3NextRMSNormGated, SIZE), (LlamaRMSNorm, 250)]
)
def test_norms_that_give_something_else_stay(kind: Any, size: int, rows: Counted) -> None:
    _, theirs = replaced(lambda: kind(size, eps=1e-5), rows)
    assert "forward" not in theirs.__dict__
    assert rows.calls == (0 if size % 16 else rows.calls)  # machine code would write behind the end


@pytest.mark.parametrize("change", ["few", "float", "turned", "weight"])
def test_norms_of_what_is_not_for_them_are_the_modules(change: str, rows: Counted) -> None:
    own, theirs = replaced(lambda: LlamaRMSNorm(SIZE), rows)
    rows.calls = 0
    inputs = normal(1, COUNT, SIZE)
    if change == "few":
        inputs = inputs[:, :8]
    elif change == "float":
        inputs = inputs.float()
    elif change == "turned":
        inputs = normal(1, SIZE, COUNT).transpose(1, 2)
    else:
        weight = nn.Parameter(own.weight.float(), requires_grad=False)
        own._parameters["weight"] = theirs._parameters["weight"] = weight
    with torch.inference_mode():
        assert torch.equal(theirs(inputs), own(inputs))
    assert rows.calls == 0


def llama() -> nn.Module:
    return LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=SIZE))


def phi3() -> nn.Module:
    return Phi3MLP(Phi3Config(hidden_size=64, intermediate_size=SIZE, pad_token_id=0))


@pytest.mark.parametrize("make", [llama, phi3])
def test_gates_are_one_call(make: Callable[[], nn.Module], rows: Counted) -> None:
    own, theirs = replaced(make, rows)
    inputs = normal(1, COUNT, 64)
    with torch.inference_mode():
        got, expected = theirs(inputs), own(inputs)
        assert rows.calls == 1
        assert type(got) is torch.Tensor
        assert float((got - expected).norm() / expected.norm()) < 0.003
        assert torch.equal(theirs(inputs[:, :8]), own(inputs[:, :8]))
    assert rows.calls == 1


@pytest.mark.parametrize("order", ["left", "right", "method"])
def test_a_gate_is_silu_times_the_other_factor(order: str, rows: Counted) -> None:
    gate, up = normal(COUNT, SIZE), normal(COUNT, SIZE, seed=1)
    pending = silu(rows)(gate)
    got = {"left": lambda: pending * up, "right": lambda: up * pending, "method": lambda: up.mul(pending)}[order]()
    assert rows.calls == 1
    assert differing(got, F.silu(gate) * up) < 0.01
    torch.testing.assert_close(got, F.silu(gate) * up, rtol=2**-6, atol=2**-10)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x, y: x + y,
        lambda x, y: x * y[:1],
        lambda x, y: x * y.float(),
        lambda x, y: x * 2,
        lambda x, y: x @ y.T,
        lambda x, y: x * x,
        lambda x, y: torch.cat([y, x]),
        lambda x, y: torch.mul(x, y, out=torch.empty_like(y)),
        lambda x, y: F.linear(input=x, weight=y),
        lambda x, y: x.clone(),
        lambda x, y: torch.tensor(x.tolist()),
        lambda x, y: y.clone().mul_(x),
    ],
)
def test_of_anything_else_it_is_the_activation(ask: Callable[[Any, torch.Tensor], torch.Tensor], rows: Counted) -> None:
    gate, up = normal(COUNT, SIZE), normal(COUNT, SIZE, seed=1)
    pending = silu(rows)(gate)
    assert isinstance(pending, PendingSiLU)
    got = ask(pending, up)
    assert rows.calls == 0
    assert type(got) is torch.Tensor
    assert torch.equal(got, ask(F.silu(gate), up))


@pytest.mark.parametrize("name", ["gelu", "relu2", "quick_gelu"])
def test_other_activations_stay(name: str, rows: Counted) -> None:
    activation = ACT2FN[name]
    replace_between_products(nn.Sequential(activation), rows)
    assert "forward" not in activation.__dict__


def silu(rows: BetweenRows) -> nn.Module:
    module: nn.Module = ACT2FN["silu"]
    replace_between_products(nn.Sequential(module), rows)
    return module
