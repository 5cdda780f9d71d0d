from __future__ import annotations

from dataclasses import replace

import pytest

from pipo_ray.quant.foreign.detect import SOURCE_KEY
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import divide
from pipo_ray.quant.summary import describe_precision
from pipo_ray.store.manifest import Manifest, StoredBlock, StoredTensor


def manifest(*tensors: StoredTensor) -> Manifest:
    block = StoredBlock("a", "mlp", 0, "one.safetensors", 4096, 1 << 20, "0" * 32, tensors)
    return Manifest(2, "", "", "", "bfloat16", {}, (block,), 1 << 20)


PLAIN = StoredTensor("norm", "BF16", (64,), None, "none", 0, 128)
TABLE = StoredTensor("embed", "BF16", (64, 64), None, "rows", 0, 8192)


def packed(name: str, layout: str = "avx512") -> StoredTensor:
    panels = divide(64, 64, LowBitFormat.parse(name), layout)
    return StoredTensor(name, "U8", panels.shape, None, "rows", 0, panels.panel_bytes, panels)


def test_bits_per_weight() -> None:
    assert describe_precision(manifest(PLAIN, TABLE)) == []
    (line,) = describe_precision(manifest(PLAIN, TABLE, packed("int4"), packed("int8")), ("avx512",))
    # int4: 4 + 32 / 64; int8: 8 + 16 / 64; all: those, and twice 16 bits for 4096 and 64 weights.
    assert line.startswith("precision: 1 in int4-g64, 1 in int8 with 6.38 bits per weight, ")
    assert "2 tensors at 16 bits or more (1 of them matrices); 9.62 bits per weight in all" in line


def test_another_processor_is_told() -> None:
    (_, told) = describe_precision(manifest(packed("int4", "avx2")), ("avx512",))
    assert told.startswith("int4 weights are stored for avx2 and this processor's kernel takes avx512")
    assert len(describe_precision(manifest(packed("int8")), ("avx512",))) == 1


def test_which_kernel_is_used_without_ours_is_said_once() -> None:
    int4, int8 = manifest(packed("int4", "avx512")), manifest(packed("int8"))
    for one in (int4, int8):
        (_, told) = describe_precision(one, ("avx512",), "llvmlite is not installed")
        assert told.startswith("low-bit products are torch's, because llvmlite is not installed")
        assert len(describe_precision(one, ("avx512",), None)) == 1
    assert describe_precision(manifest(PLAIN), ("avx512",), "llvmlite is not installed") == []
    assert len(describe_precision(manifest(packed("int4", "avx2")), ("avx512",), "llvmlite is not installed")) == 2


@pytest.mark.parametrize(
    "exact, said",
    [
        (4000, "GPTQ: 7 matrices repacked exactly, 2 dequantized"),
        (0, "rounded to bf16, by 2^-8 at most in all of the groups), 2 dequantized"),
        (1000, "by 2^-8 at most in 75% of the groups)"),
        (1, "in 99% of the groups)"),
        (3999, "in 1% of the groups)"),
    ],
)
def test_what_repacking_rounds_is_said(exact: int, said: str) -> None:
    source = {"label": "GPTQ", "repacked": 7, "dequantized": 2, "rounded_again": 0, "groups": 4000}
    found = replace(manifest(packed("int4")), extra={SOURCE_KEY: source | {"exact_groups": exact}})
    line = describe_precision(found, ("avx512",))[0]
    assert line.startswith("GPTQ: 7 matrices repacked ")
    assert said in line


def test_groups_that_were_not_counted_are_not_called_exact() -> None:
    source = {"label": "GGUF Q4_0", "repacked": 2, "dequantized": 0, "rounded_again": 0, "groups": 0, "exact_groups": 0}
    found = replace(manifest(packed("int4")), extra={SOURCE_KEY: source})
    assert describe_precision(found, ("avx512",))[0] == (
        "GGUF Q4_0: 2 matrices repacked (codes as they are; scales and zeros rounded to bf16, by 2^-8 at most)"
    )


def test_nothing_repacked_is_nothing_rounded_to_bf16() -> None:
    source = {"label": "GPTQ", "repacked": 0, "dequantized": 9, "rounded_again": 0, "groups": 4, "exact_groups": 0}
    assert describe_precision(replace(manifest(PLAIN), extra={SOURCE_KEY: source})) == ["GPTQ: 9 dequantized"]
