"""Which layer's KV cache is held at how many bits: a number for all, or rules in a file to be read and edited."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipo_ray.errors import InputError

KV_BITS = (16, 8, 4)
_EVERY = "*"
_LAYERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_FORM = '{"layers": [["0-1", 16], ["*", 4]]}'


@dataclass(frozen=True)
class KVPrecision:
    """Pairs of layers ("3", "0-7" or "*") and bits (16, 8 or 4). The first pair that names a layer holds for it; layers
    that none names stay at 16 bits. As a file: {"layers": [["0-1", 16], ["*", 4]]}.
    """

    layers: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for layers, bits in self.layers:
            _range(layers)
            if bits not in KV_BITS:
                raise InputError(f"layers {layers!r}: {bits} bits; a KV cache has 16, 8 or 4")

    @classmethod
    def parse(cls, text: str | int) -> KVPrecision:
        """Of what `--kv-precision` takes: bits for every layer, or a file. Raises InputError."""
        text = str(text)
        if re.fullmatch(r"-?\d+", text, re.ASCII):
            if int(text) not in KV_BITS:
                raise InputError(f"--kv-precision {text}: a KV cache has 16, 8 or 4 bits")
            return cls(((_EVERY, int(text)),))
        if not Path(text).is_file():
            raise InputError(f"--kv-precision {text}: neither 16, 8 or 4 nor a file; a file has {_FORM}")
        return cls.load(Path(text))

    @classmethod
    def load(cls, file: Path) -> KVPrecision:
        """The rules in `file`. Raises InputError: it cannot be read, or has something else."""
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"KV precision file {file} cannot be read: {error.strerror}; check the path") from error
        except InputError as error:
            raise InputError(f"KV precision file {file}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"KV precision file {file} is not JSON ({str(error)[:100]}); write {_FORM}") from error

    @classmethod
    def from_json(cls, raw: Any) -> KVPrecision:
        """Of a file's contents. Raises InputError for something else."""
        rules = raw.get("layers") if isinstance(raw, dict) else None
        if not isinstance(rules, list) or set(raw) != {"layers"}:
            raise InputError(f"it is {_FORM} and nothing else")
        for rule in rules:
            if not (isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str) and type(rule[1]) is int):
                raise InputError(f"{str(rule)[:80]} is no pair of layers and bits, like {_FORM}")
        return cls(tuple((layers, bits) for layers, bits in rules))

    def bits(self, num_layers: int) -> tuple[int, ...]:
        """Per layer of a model. Raises InputError for rules about layers that it does not have."""
        found = [0] * num_layers
        for layers, bits in self.layers:
            first, last = _range(layers) or (0, num_layers - 1)
            if last >= num_layers:
                raise InputError(
                    f"--kv-precision: layers {layers!r}, but the model has {num_layers} (0 to {num_layers - 1}); "
                    "is it a file for another model?"
                )
            for layer in range(first, last + 1):
                found[layer] = found[layer] or bits
        return tuple(bits or 16 for bits in found)


def _range(layers: str) -> tuple[int, int] | None:
    """First and last of "3" or "0-7", None for all."""
    if layers == _EVERY:
        return None
    match = _LAYERS.fullmatch(layers)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise InputError(f'layers {layers[:40]!r}: write a number like "3", a range like "0-7", or "*"')
    return int(match[1]), int(match[2] or match[1])
