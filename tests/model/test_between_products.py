"""Norms and gates by machine code: which are replaced, and that they compute what the modules do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASE, VOCAB_SIZE, Architecture
from harness import Pipeline, pack_checkpoint, random_prompts
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.between_rows import BetweenRows
from pipo_ray.compiled.support import floats_obstacle
from pipo_ray.model import between_products
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.between_products import LEAST_NUMBERS, replace_between_products
from pipo_ray.quant.panels import machine_layout
from pipo_ray.quant.policy import Precision

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))

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
    if size % 16:
        assert rows.calls == 0  # machine code would write behind the end


@pytest.mark.parametrize("change", ["few", "float", "turned", "weight", "size"])
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
    elif change == "size":
        with torch.inference_mode(), pytest.raises(RuntimeError):
            theirs(normal(1, COUNT, 2 * SIZE))
        return
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


def test_gates_are_one_call(rows: Counted) -> None:
    own, theirs = replaced(llama, rows)
    rows.calls = 0
    inputs = normal(1, COUNT, 64)
    with torch.inference_mode():
        got, expected = theirs(inputs), own(inputs)
        assert rows.calls == 1
        assert type(got) is torch.Tensor
        assert float((got - expected).norm() / expected.norm()) < 0.003
        assert torch.equal(theirs(inputs[:, :8]), own(inputs[:, :8]))
        in_float = own.float(), theirs.float()
        assert torch.equal(in_float[1](inputs.float()), in_float[0](inputs.float()))
    assert rows.calls == 1


def test_a_gate_of_another_length_is_the_modules(rows: Counted) -> None:
    own, theirs = replaced(lambda: LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=SIZE + 8)), rows)
    rows.calls = 0
    inputs = normal(1, COUNT, 64)
    with torch.inference_mode():
        assert torch.equal(theirs(inputs), own(inputs))
    assert rows.calls == 0  # machine code would write behind the end


class Changed(LlamaMLP):
    """An MLP with the parts of Llama's that makes something else of them."""

    def __init__(self, change: str) -> None:
        super().__init__(LlamaConfig(hidden_size=64, intermediate_size=SIZE))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.change == "order":
            up = self.up_proj(x)
            return self.down_proj(self.act_fn(self.gate_proj(x)) * up)
        gate, up = self.gate_proj(x * 1 if self.change == "inputs" else x), self.up_proj(x)
        if self.change == "limit":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        if self.change == "swapped":
            gate, up = up, gate
        if self.change == "twice":
            self.down_proj(up)
        if self.change == "raises":
            raise KeyError(self.change)
        if self.change == "small":
            gate = gate + 1e-4
        out: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return out + 0 if self.change == "behind" else out


CHANGES = ["order", "inputs", "limit", "swapped", "twice", "raises", "small", "behind"]


@pytest.mark.parametrize("change", CHANGES)
def test_gates_of_something_else_stay(change: str, rows: Counted) -> None:
    _, theirs = replaced(lambda: Changed(change), rows)
    assert "forward" not in theirs.__dict__
    _, theirs = replaced(lambda: Changed("nothing"), rows)
    assert "forward" in theirs.__dict__


@pytest.mark.parametrize("make", [phi3, lambda: GemmaMLP(GemmaConfig(hidden_size=64, intermediate_size=SIZE))])
def test_other_mlps_stay(make: Callable[[], nn.Module], rows: Counted) -> None:
    _, theirs = replaced(make, rows)
    assert "forward" not in theirs.__dict__


class EpsilonRMSNorm(LlamaRMSNorm):
    """With epsilon outside of the root."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        root = hidden_states.float().pow(2).mean(-1, keepdim=True).sqrt()
        return self.weight * (hidden_states / (root + self.variance_epsilon)).to(hidden_states.dtype)


class FlaggedRMSNorm(LlamaRMSNorm):
    """Adds something where it is told to."""

    def __init__(self, added: float) -> None:
        super().__init__(SIZE)
        self.added = added

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.added


class GatedRMSNorm(LlamaRMSNorm):
    """Which raises something of its own without a second argument."""

    def forward(self, hidden_states: torch.Tensor, gate: Any = None) -> torch.Tensor:
        return super().forward(hidden_states) * gate.sigmoid()


def test_a_norm_is_judged_by_itself_and_by_small_rows_too(rows: Counted) -> None:
    norms = FlaggedRMSNorm(0.0), FlaggedRMSNorm(1.0), EpsilonRMSNorm(SIZE), GatedRMSNorm(SIZE)
    _, theirs = replaced(lambda: nn.Sequential(*copy.deepcopy(norms)), rows)
    assert ["forward" in part.__dict__ for part in theirs] == [True, False, False, False]


@pytest.mark.parametrize("precision", ["int4-g32", "16bit"])
def test_a_prompt_in_a_sweep(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the binder, whose weights come and go."""
    monkeypatch.setattr(between_products, "LEAST_NUMBERS", 512)
    architecture = Architecture(
        "qwen3", "", "qwen3", {**BASE, "hidden_size": 128, "head_dim": 32, "num_hidden_layers": 2}
    )
    checkpoint = architecture.save(tmp_path / "checkpoint", dtype="bfloat16")
    packed = pack_checkpoint(
        checkpoint,
        tmp_path / "store",
        torch.bfloat16,
        Precision.parse(precision),
        panel_bytes=4096,
        layout=machine_layout(),
    )
    (tokens,) = random_prompts(VOCAB_SIZE, (40,))
    calls: list[str] = []
    for name in ("norm", "gate"):
        original = getattr(BetweenRows, name)

        def counted(self: Any, *given: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(self, *given)

        monkeypatch.setattr(BetweenRows, name, counted)

    def logits(least: int) -> torch.Tensor:
        monkeypatch.setattr(between_products, "LEAST_NUMBERS", least)
        with Pipeline(packed, attention=CompiledAttention(), compile_layers=True, chunk=None) as opened:
            calls.clear()
            (output,) = opened.runner.run([SweepEntry("a", tuple(tokens), 0, len(tokens), "all")])
        assert output is not None
        return output.float()

    got = logits(512)
    assert (calls.count("norm"), calls.count("gate")) == (2 * 4 + 1, 2)
    expected = logits(1 << 40)
    assert not calls
    assert float((got - expected).norm() / expected.norm()) < 0.02
