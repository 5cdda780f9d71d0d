from __future__ import annotations

import pytest

from pipo_ray.errors import InputError
from pipo_ray.quant.formats import GROUPS, LowBitFormat


@pytest.mark.parametrize(
    "name, low_bit",
    [
        ("int4", LowBitFormat(4, 64)),
        ("int4-g32", LowBitFormat(4, 32)),
        ("int4-g128-sym", LowBitFormat(4, 128, True)),
        ("int4-sym", LowBitFormat(4, 64, True)),
        ("int8", LowBitFormat(8, 0, True)),
    ],
)
def test_names(name: str, low_bit: LowBitFormat) -> None:
    assert LowBitFormat.parse(name) == low_bit
    assert LowBitFormat.parse(low_bit.name) == low_bit


@pytest.mark.parametrize(
    "name, said",
    [
        ("int3", "'int3' has 3 bits, supported are 4 and 8"),
        ("int4-g48", "groups of 48 columns, supported are 32, 64, 128"),
        ("int4-g0", "groups of 0 columns"),
        ("int8-g64", "int8 has one scale per row"),
        ("fp4", "'fp4' is not known"),
        ("", "'' is not known"),
    ],
)
def test_what_is_refused(name: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        LowBitFormat.parse(name)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_columns() -> None:
    assert [LowBitFormat(4, group).columns_multiple for group in GROUPS] == list(GROUPS)
    assert LowBitFormat.parse("int8").columns_multiple == 16
