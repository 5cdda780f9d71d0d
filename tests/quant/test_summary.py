from __future__ import annotations

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
    (line,) = describe_precision(manifest(PLAIN, TABLE, packed("int4"), packed("int8")), "avx512")
    # int4: 4 + 32 / 64; int8: 8 + 16 / 64; all: those, and twice 16 bits for 4096 and 64 weights.
    assert line.startswith("precision: 1 in int4-g64, 1 in int8 with 6.38 bits per weight, ")
    assert "2 tensors at 16 bits or more (1 of them matrices); 9.62 bits per weight in all" in line


def test_another_processor_is_told() -> None:
    (_, told) = describe_precision(manifest(packed("int4", "avx2")), "avx512")
    assert told.startswith("int4 weights are stored for avx2 and this processor's kernel takes avx512")
    assert len(describe_precision(manifest(packed("int8")), "avx512")) == 1


def test_which_kernel_is_used_without_ours_is_said_once() -> None:
    int4, int8 = manifest(packed("int4", "avx512")), manifest(packed("int8"))
    for one in (int4, int8):
        (_, told) = describe_precision(one, "avx512", "llvmlite is not installed")
        assert told.startswith("low-bit products are torch's, because llvmlite is not installed")
        assert len(describe_precision(one, "avx512", None)) == 1
    assert describe_precision(manifest(PLAIN), "avx512", "llvmlite is not installed") == []
    assert len(describe_precision(manifest(packed("int4", "avx2")), "avx512", "llvmlite is not installed")) == 2
