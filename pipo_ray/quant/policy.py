"""Which weight is held at which precision: rules by name, in a form that people can read, edit and reuse."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipo_ray.errors import InputError
from pipo_ray.quant.formats import SIXTEEN_BITS, LowBitFormat

EVERYTHING = "*"
POLICY_KEY = "precision_policy"
"""Of the policy's JSON in the manifest's `extra`."""


@dataclass(frozen=True)
class Rule:
    """Weights whose names match `pattern` (shell wildcards) get the format called `format`, or stay as they are."""

    pattern: str
    format: str


@dataclass(frozen=True)
class Precision:
    """The first of `rules` that matches a weight's name holds for it; weights that none matches stay at 16 bits.

    As a file: {"rules": [["lm_head.*", "int8"], ["*", "int4-g64"]]}. Names are those of the module graph, as they are
    in `manifest.json`. A rule for "*" takes what can be quantized; one that is more specific is refused if a matrix
    that it names cannot be.
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule.format != SIXTEEN_BITS:
                LowBitFormat.parse(rule.format)

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Of what `--precision` takes: a format's name, or a policy file. Raises InputError."""
        if text == SIXTEEN_BITS:
            return cls()
        if os.sep in text or text.endswith(".json") or Path(text).is_file():
            return cls.load(Path(text))
        return cls((Rule(EVERYTHING, LowBitFormat.parse(text).name),))

    @classmethod
    def load(cls, file: Path) -> Precision:
        """The policy in `file`. Raises InputError: it cannot be read, or is no policy."""
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"precision policy {file} cannot be read: {error.strerror}; check the path") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"precision policy {file} is not JSON ({str(error)[:100]})") from error
        try:
            return cls.from_json(raw)
        except InputError as error:
            raise InputError(f"precision policy {file}: {error}") from error

    @classmethod
    def from_json(cls, raw: Any) -> Precision:
        """What `to_json` gave. Raises InputError for something else."""
        rules = raw.get("rules") if isinstance(raw, dict) else None
        if not isinstance(rules, list) or set(raw) != {"rules"}:
            raise InputError('a policy is {"rules": [[PATTERN, FORMAT], ...]} and nothing else')
        for rule in rules:
            if not (isinstance(rule, list) and len(rule) == 2 and all(isinstance(part, str) for part in rule)):
                raise InputError(f"rule {str(rule)[:80]} is no pair of a name pattern and a format")
        return cls(tuple(Rule(pattern, format) for pattern, format in rules))

    def to_json(self) -> dict[str, Any]:
        """For a file or a manifest."""
        return {"rules": [[rule.pattern, rule.format] for rule in self.rules]}

    @property
    def is_low_bit(self) -> bool:
        """Whether any weight may have fewer than 16 bits."""
        return any(rule.format != SIXTEEN_BITS for rule in self.rules)

    @property
    def label(self) -> str:
        """For a file name: a format's name, "mixed" for several rules, "16bit" for none."""
        if not self.is_low_bit:
            return SIXTEEN_BITS
        (first, *more) = self.rules
        return "mixed" if more or first.pattern != EVERYTHING else first.format

    def rule_for(self, name: str) -> Rule | None:
        """The rule that holds for a weight and asks for few bits."""
        rule = next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)
        return None if rule is None or rule.format == SIXTEEN_BITS else rule
