from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipo_ray.errors import InputError
from pipo_ray.quant.policy import PolicyModel, Precision, Rule
from pipo_ray.quant.target import Chosen, LeastRounding, Target


def test_what_is_a_target() -> None:
    assert Target.parse("auto", "1%", None) == Target(max_loss=0.01)
    assert Target.parse("auto", 0.02, None) == Target(max_loss=0.02)
    assert Target.parse("auto", None, "2.5GiB") == Target(max_bytes=5 << 29)
    assert Target.parse("int8", None, None) is None
    assert Target.parse(None, None, None) is None
    assert Target(**Target(max_loss=0.01).to_json()) == Target(max_loss=0.01)


@pytest.mark.parametrize(
    "precision, max_loss, max_size, said",
    [
        ("auto", None, None, "wants one target: .* there is none"),
        ("auto", "1%", "1GiB", "wants one target: .* both are given"),
        ("int8", "1%", None, "--max-loss is a target of --precision auto"),
        (None, None, "1GiB", "--max-size is a target of --precision auto"),
        ("auto", "0%", None, "--max-loss '0%' is no increase"),
        ("auto", "-1%", None, "--max-loss '-1%' is no increase"),
        ("auto", "nan", None, "--max-loss 'nan' is no increase"),
        ("auto", "much", None, "--max-loss 'much' is no increase"),
        ("auto", None, "much", "--max-size: 'much' is not a size"),
    ],
)
def test_what_is_none(precision: str | None, max_loss: str | None, max_size: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Target.parse(precision, max_loss, max_size)


def test_what_was_chosen_is_kept() -> None:
    policy = Precision((Rule("*", "int8"),), PolicyModel("LlamaForCausalLM", 2, "1f"))
    chosen = Chosen(policy, 5 << 20, 0.0125, 0.0101, 4096)
    assert Chosen.from_json(chosen.to_json()) == chosen
    assert Chosen.from_json(chosen.to_json()).policy.model == policy.model
    assert "5.0 MiB" in str(chosen)
    assert "+1.01%" in str(chosen)


def test_it_is_said_why_no_weight_was_rounded() -> None:
    least = LeastRounding("model.layers.3.mlp.up_proj.weight", "int8", 2.5e-5)
    chosen = Chosen(Precision(), 7 << 20, 0.0, 0.0, 4096, least)
    assert Chosen.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    assert str(chosen).endswith(
        "no weight was rounded, because none may be: the least that rounding loses, model.layers.3.mlp.up_proj.weight "
        "alone in int8, is about 2.5e-05 nats, --max-loss 0.0025%"
    )
    assert "no weight" not in str(replace(chosen, least=None))
