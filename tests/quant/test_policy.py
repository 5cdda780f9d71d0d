from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipo_ray.errors import InputError
from pipo_ray.prepare import prepare_store
from pipo_ray.quant.policy import PolicyModel, Precision, Rule
from pipo_ray.store.checkpoint import Checkpoint


def test_a_name_is_a_policy_of_one_rule() -> None:
    assert Precision.parse("int4") == Precision((Rule("*", "int4-g64"),))
    assert Precision.parse("int8").label == "int8"
    assert not Precision.parse("16bit").is_low_bit
    assert Precision.parse("16bit") == Precision()


def test_the_first_rule_that_matches_holds(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    rules = [["lm_head.*", "int8"], ["*.layers.0.*", "16bit"], ["*_proj.weight", "int4-g32"]]
    file.write_text(json.dumps({"rules": rules}))
    policy = Precision.parse(str(file))
    assert policy.to_json() == {"rules": rules}
    assert Precision.from_json(policy.to_json()) == policy
    assert policy.label == "mixed"
    names = ("lm_head.weight", "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight", "model.norm.weight")
    found = [policy.rule_for(name) for name in names]
    assert [rule and rule.format for rule in found] == ["int8", None, "int4-g32", None]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON"),
        ("[]", "a policy is"),
        ('{"rules": [], "models": 1}', "a policy is"),
        ('{"rules": [], "model": 1}', 'its "model" is not'),
        ('{"rules": [], "model": {"architecture": "Llama", "layers": true, "tensors": ""}}', 'its "model" is not'),
        ('{"rules": [["*"]]}', "no pair"),
        ('{"rules": [["*", 4]]}', "no pair"),
        ('{"rules": [["*", "int5"]]}', "5 bits, supported are 4 and 8"),
        ('{"rules": [["*", "int4-g16"]]}', "groups of 16"),
    ],
)
def test_a_policy_file_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(text)
    with pytest.raises(InputError) as raised:
        Precision.parse(str(file))
    assert said in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_such_file() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Precision.parse("/nowhere/policy.json")


def test_a_file_is_edited_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    rules = (Rule("lm_head.*", "int8"), Rule("*", "int4-g64"))
    for policy in (Precision(rules), Precision(rules, PolicyModel("LlamaForCausalLM", 2, "1f"))):
        policy.save(file)
        assert Precision.load(file) == policy
        assert Precision.load(file).model == policy.model
        assert '\n  ["lm_head.*", "int8"],\n' in file.read_text()  # a rule has a line of its own
    with pytest.raises(InputError, match="cannot be written"):
        policy.save(tmp_path / "nowhere" / "policy.json")


def test_a_policy_for_another_model_is_refused(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    mine, other = (tiny_checkpoint("LlamaConfig", dtype="bfloat16", num_hidden_layers=n) for n in (1, 2))
    with Checkpoint.open(mine) as checkpoint:
        policy = Precision((Rule("*", "int8"),), PolicyModel.of(checkpoint))
        policy.require_model(checkpoint)
    file = tmp_path / "policy.json"
    policy.save(file)
    with pytest.raises(InputError, match=r"made for LlamaForCausalLM with 1 layers .* is LlamaForCausalLM with 2 lay"):
        prepare_store(other, precision=str(file))
    # A name is worth nothing where shapes are others.
    wider = tiny_checkpoint("LlamaConfig", dtype="bfloat16", num_hidden_layers=1, intermediate_size=96)
    with Checkpoint.open(wider) as checkpoint, pytest.raises(InputError, match="made for LlamaForCausalLM"):
        policy.require_model(checkpoint)
