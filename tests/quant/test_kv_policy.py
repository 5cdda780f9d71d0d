"""Which layer has how many bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray.errors import InputError
from pipo_ray.quant.kv_policy import KVPrecision


def test_a_number_is_for_all_layers() -> None:
    assert KVPrecision.parse("4").bits(3) == KVPrecision.parse(4).bits(3) == (4, 4, 4)


def test_the_first_rule_holds_and_the_rest_stays_at_16(tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    file.write_text('{"layers": [["0-1", 16], ["1-3", 8], ["5", 4]]}')
    precision = KVPrecision.parse(str(file))
    assert precision.bits(7) == (16, 16, 8, 8, 16, 4, 16)
    file.write_text('{"layers": [["0", 16], ["*", 4]]}')
    assert KVPrecision.parse(str(file)).bits(3) == (16, 4, 4)


@pytest.mark.parametrize("text", ["3", "-4", "0", "32", "five", "no/such/file.json", ""])
def test_other_bits_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--kv-precision .*16, 8 or 4"):
        KVPrecision.parse(text)


@pytest.mark.parametrize(
    "content, what",
    [
        ("{", "is not JSON"),
        ('{"rules": []}', "and nothing else"),
        ('{"layers": 4}', "and nothing else"),
        ('{"layers": [["*"]]}', "no pair of layers and bits"),
        ('{"layers": [["*", "4"]]}', "no pair of layers and bits"),
        ('{"layers": [["*", true]]}', "no pair of layers and bits"),
        ('{"layers": [["*", 5]]}', "5 bits; a KV cache has 16, 8 or 4"),
        ('{"layers": [["first", 4]]}', 'write a number like "3"'),
        ('{"layers": [["3-1", 4]]}', 'write a number like "3"'),
    ],
)
def test_a_file_that_says_something_else_is_named(content: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    file.write_text(content)
    with pytest.raises(InputError, match=f"KV precision file {file}") as caught:
        KVPrecision.parse(str(file))
    assert what in str(caught.value)


def test_a_file_for_a_model_with_more_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"layers '6-7', but the model has 7 \(0 to 6\)"):
        KVPrecision((("6-7", 4),)).bits(7)
