"""The low-bit formats of a weight, by name. Imports no torch: the CLI checks names before anything is started."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipo_ray.errors import InputError

GROUPS = (32, 64, 128)
"""Group sizes of int4 in columns: what torch's int4 kernels take."""

DEFAULT_GROUP = 64

INT8_COLUMNS = 16
"""Columns of an int8 weight come in multiples of this: torch's int8 kernel reads so many bytes at once, and with fewer
it reads past the end of a row.
"""

SIXTEEN_BITS = "16bit"
"""The name, in a policy, of weights that are left as they are."""

AS_SOURCE = "source"
"""The name, in a policy, of weights that keep what a quantized checkpoint has of them."""

_NAME = re.compile(r"int(?P<bits>\d+)(-g(?P<group>\d+))?(?P<symmetric>-sym)?")
_KNOWN = f"{SIXTEEN_BITS}, {AS_SOURCE}, int8, int4, int4-gN and int4-gN-sym with N of {', '.join(map(str, GROUPS))}"


@dataclass(frozen=True)
class LowBitFormat:
    """How a weight [rows, columns] is written with few bits.

    int4: codes q from 0 to 15 and, for each `group` columns of a row, a bf16 scale s and zero z; a value is
    (q - 8) s + z. A symmetric one has z = 0. int8: codes from -127 to 127 and one bf16 scale per row, `group` is 0; a
    value is q s.
    """

    bits: int
    group: int = 0
    symmetric: bool = False

    @classmethod
    def parse(cls, name: str) -> LowBitFormat:
        """The format called `name`, such as "int8", "int4" (groups of 64), "int4-g32", "int4-g128-sym".

        Raises InputError for an unknown width or group size.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"precision {name!r} is not known; known are {_KNOWN}, or a policy file")
        bits, group = int(match["bits"]), match["group"]
        if bits == 8:
            if group is not None or match["symmetric"]:
                raise InputError(f"precision {name!r}: int8 has one scale per row, symmetric; write int8")
            return cls(8, 0, True)
        if bits != 4:
            raise InputError(f"precision {name!r} has {bits} bits, supported are 4 and 8; known are {_KNOWN}")
        columns = DEFAULT_GROUP if group is None else int(group)
        if columns not in GROUPS:
            raise InputError(
                f"precision {name!r} has groups of {columns} columns, supported are {', '.join(map(str, GROUPS))}"
            )
        return cls(4, columns, match["symmetric"] is not None)

    @property
    def name(self) -> str:
        """What `parse` takes."""
        return "int8" if self.bits == 8 else f"int4-g{self.group}" + ("-sym" if self.symmetric else "")

    @property
    def columns_multiple(self) -> int:
        """The number of columns of a weight must be a multiple of this."""
        return self.group or INT8_COLUMNS
