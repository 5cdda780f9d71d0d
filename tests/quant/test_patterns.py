from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.quant.patterns import rules_for
from pipo_ray.quant.policy import Precision, Rule

FORMATS = ("int4-g64", "int8", "16bit")
LAYERS = 23
TENSORS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight", "mlp.gate.weight")
NAMES = (*(f"model.layers.{layer}.{tensor}" for layer in range(LAYERS) for tensor in TENSORS), "lm_head.weight")


def test_equal_neighbours_are_one_rule() -> None:
    formats = dict.fromkeys(NAMES, "int4-g64")
    for layer in (3, 4, 5, 7, 12, 22):
        formats |= {name: "int8" for name in NAMES if name.startswith(f"model.layers.{layer}.mlp")}
    formats["model.layers.0.self_attn.k_proj.weight"] = "16bit"
    assert rules_for(formats) == (
        Rule("model.layers.0.self_attn.k_proj.*", "16bit"),
        Rule("model.layers.[3-57].mlp.*", "int8"),
        Rule("model.layers.12.mlp.*", "int8"),
        Rule("model.layers.22.mlp.*", "int8"),
        Rule("*", "int4-g64"),
    )
    assert rules_for({}) == ()


@given(st.lists(st.sampled_from((*FORMATS, None)), min_size=len(NAMES), max_size=len(NAMES)))
def test_every_tensor_has_its_format(drawn: list[str | None]) -> None:
    formats = {name: format for name, format in zip(NAMES, drawn, strict=True) if format is not None}
    others = [name for name in NAMES if name not in formats]
    policy = Precision(rules_for(formats, others))
    for name, format in formats.items():
        rule = policy.rule_for(name)
        assert (rule.format if rule else "16bit") == format
    for name in others:  # a specific rule for a matrix that cannot be quantized would be refused
        rule = policy.rule_for(name)
        assert rule is None or rule.pattern == "*"
