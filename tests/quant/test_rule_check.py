from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray.errors import InputError
from pipo_ray.quant.policy import Precision, Rule
from pipo_ray.quant.rule_check import close_patterns, require_effect

MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{name}.weight" for layer in range(12) for name in MATRICES),
    "lm_head.weight",
]


def of(*rules: tuple[str, str]) -> Precision:
    return Precision(tuple(Rule(*rule) for rule in rules), file=Path("mine.json"))


def refused(policy: Precision, aliases: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as raised:
        require_effect(policy, NAMES, aliases)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "pattern, close",
    [
        ("self_atn.*", "*.self_attn.*"),
        ("model.layer.1.*", "model.layers.1.*"),
        ("model.layers.12.*", "model.layers.1.*"),
        ("model.layers.3.mlp.upproj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("*.dwn_proj.*", "*.down_proj.*"),
        ("lm-head.*", "lm_head.*"),
        ("LM_HEAD.WEIGHT", None),
        ("", None),
    ],
)
def test_a_misspelt_rule_is_refused_with_what_it_may_mean(pattern: str, close: str | None) -> None:
    said = refused(of((pattern, "16bit"), ("*", "int4")))
    assert said.startswith(f'precision policy mine.json: rule ["{pattern}", "16bit"] matches no tensor of the model; ')
    if close is None:
        assert "names are like model.embed_tokens.weight, " in said
    else:
        assert close in close_patterns(pattern, NAMES)
        assert f"{close_patterns(pattern, NAMES)[0]}, " in f"{said.split('close to it are ')[1].split(';')[0]}, "


def test_what_is_offered_matches() -> None:
    """Whatever is named as close would be accepted."""
    for pattern in ("self_atn.*", "lm-head.*", "*.lm_hed.*", "model.layer.*", "*.wight"):
        for close in close_patterns(pattern, NAMES):
            require_effect(of((close, "int4")), NAMES)


def test_a_rule_behind_one_that_takes_all_is_refused() -> None:
    said = refused(of(("*", "int4"), ("lm_head.*", "int8")))
    assert 'rule ["lm_head.*", "int8"] holds for nothing, because rule ["*", "int4"] before it has taken' in said
    said = refused(of(("model.layers.[0-9].mlp.*", "int4"), ("model.layers.1?.mlp.*", "int4"), ("*.mlp.*", "int8")))
    assert 'rule ["*.mlp.*", "int8"] holds for nothing' in said


def test_a_tied_tensor_is_said_to_be_one() -> None:
    said = refused(of(("head.*", "int8"), ("*", "int4")), {"head.weight": "model.embed_tokens.weight"})
    assert "head.weight is tied to model.embed_tokens.weight and not stored" in said


def test_rules_that_hold_for_something_pass() -> None:
    require_effect(of(("lm_head.*", "int8"), ("*.layers.0.*", "16bit"), ("*", "int4")), NAMES)
    require_effect(Precision(), NAMES)
    require_effect(Precision.parse("source"), NAMES)
