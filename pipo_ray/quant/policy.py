"""Which weight is held at which precision: rules by name, in a form that people can read, edit and reuse."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipo_ray.errors import InputError
from pipo_ray.quant.formats import AS_SOURCE, SIXTEEN_BITS, LowBitFormat

if TYPE_CHECKING:
    from pipo_ray.store.checkpoint import Checkpoint

EVERYTHING = "*"
POLICY_KEY = "precision_policy"
"""Of the policy's JSON in the manifest's `extra`."""


@dataclass(frozen=True)
class Rule:
    """Weights whose names match `pattern` (shell wildcards) get the format called `format`. "16bit" ones have 16 bits;
    "source" ones keep the codes that a quantized checkpoint has, and have 16 bits where it has none that fit.
    """

    pattern: str
    format: str

    def __str__(self) -> str:
        return f'["{self.pattern}", "{self.format}"]'

    def require_format(self) -> None:
        """Raise InputError if there is no such format."""
        if self.format in (SIXTEEN_BITS, AS_SOURCE):
            return
        try:
            LowBitFormat.parse(self.format)
        except InputError as error:
            raise InputError(f"rule {self}: {error}") from error


@dataclass(frozen=True)
class PolicyModel:
    """What a policy was made for: `architecture` of config.json, `layers` (0 where config.json does not say), and a
    checksum (hex) of the names and shapes of the checkpoint's tensors. A fine-tuned model has the same.
    """

    architecture: str
    layers: int
    tensors: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PolicyModel:
        """That of an open checkpoint."""
        import xxhash

        shapes = sorted((name, list(header.shape)) for name, header in checkpoint.tensors.items())
        digest = xxhash.xxh3_64(json.dumps(shapes).encode()).hexdigest()
        return cls(checkpoint.architecture or checkpoint.model_type, _num_layers(checkpoint.config), digest)

    @classmethod
    def from_json(cls, raw: Any) -> PolicyModel:
        """What `to_json` gave. Raises InputError for something else."""
        kinds = {"architecture": str, "layers": int, "tensors": str}
        if not isinstance(raw, dict) or {name: type(value) for name, value in raw.items()} != kinds:
            raise InputError('its "model" is not {"architecture": NAME, "layers": NUMBER, "tensors": CHECKSUM}')
        return cls(**raw)

    def to_json(self) -> dict[str, Any]:
        """For a policy's file."""
        return {"architecture": self.architecture, "layers": self.layers, "tensors": self.tensors}

    def __str__(self) -> str:
        layers = f" with {self.layers} layers" if self.layers else ""
        return f"{self.architecture or 'a model without a name'}{layers} (tensors {self.tensors})"


@dataclass(frozen=True)
class Precision:
    """The first of `rules` that matches a weight's name holds for it; weights that none matches stay at 16 bits.

    As a file: {"rules": [["lm_head.*", "int8"], ["*", "int4-g64"]]}. Names are those of the module graph, as they are
    in `manifest.json`. A rule for "*" takes what can be quantized; one that is more specific is refused if a matrix
    that it names cannot be. A "model" in the file, a PolicyModel, is the one that the rules were made for, and others
    are refused; it changes nothing else. `file` is where the policy was read, for what is said about it.
    """

    rules: tuple[Rule, ...] = ()
    model: PolicyModel | None = field(default=None, compare=False)
    file: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for rule in self.rules:
            rule.require_format()

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Of what `--precision` takes: a format's name, or a policy file. Raises InputError."""
        if text == SIXTEEN_BITS:
            return cls()
        if text == AS_SOURCE:
            return cls((Rule(EVERYTHING, AS_SOURCE),))
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
            return replace(cls.from_json(raw), file=file)
        except InputError as error:
            raise InputError(f"precision policy {file}: {error}") from error

    @classmethod
    def from_json(cls, raw: Any) -> Precision:
        """What `to_json` gave. Raises InputError for something else."""
        rules = raw.get("rules") if isinstance(raw, dict) else None
        if not isinstance(rules, list) or not set(raw) <= {"rules", "model"}:
            raise InputError(
                'a policy is {"rules": [[PATTERN, FORMAT], ...]}, with or without a "model", and nothing else'
            )
        for rule in rules:
            if not (isinstance(rule, list) and len(rule) == 2 and all(isinstance(part, str) for part in rule)):
                raise InputError(
                    f'rule {str(rule)[:80]} is no pair of a name pattern and a format; write it as ["*", "int4"]'
                )
        model = PolicyModel.from_json(raw["model"]) if "model" in raw else None
        return cls(tuple(Rule(pattern, format) for pattern, format in rules), model)

    def to_json(self) -> dict[str, Any]:
        """For a file or a manifest."""
        rules = {"rules": [[rule.pattern, rule.format] for rule in self.rules]}
        return rules if self.model is None else {"model": self.model.to_json(), **rules}

    def save(self, file: Path) -> None:
        """As a file with one rule per line, for people to read and edit. Raises InputError if it cannot be written."""
        lines = ",\n".join(f"  {json.dumps(rule)}" for rule in self.to_json()["rules"])
        model = "" if self.model is None else f'"model": {json.dumps(self.model.to_json())},\n '
        try:
            file.write_text(f'{{{model}"rules": [\n{lines}\n ]}}\n', encoding="utf-8")
        except OSError as error:
            raise InputError(f"precision policy {file} cannot be written: {error.strerror}; check the path") from error

    def require_model(self, checkpoint: Checkpoint) -> None:
        """Raise InputError if the policy was made for another model than that of `checkpoint`."""
        if self.model is not None and self.model != (given := PolicyModel.of(checkpoint)):
            raise InputError(
                f"{self} was made for {self.model}, and {checkpoint.folder} is {given}; make one for it "
                'with --precision auto, or delete "model" from the file to use its rules all the same'
            )

    @property
    def is_low_bit(self) -> bool:
        """Whether any weight may have fewer than 16 bits."""
        return any(rule.format != SIXTEEN_BITS for rule in self.rules)

    @property
    def asks_for_few_bits(self) -> bool:
        """Whether it does so whatever the checkpoint has."""
        return any(rule.format not in (SIXTEEN_BITS, AS_SOURCE) for rule in self.rules)

    @property
    def label(self) -> str:
        """For a file name: a format's name, "mixed" for several rules, "16bit" for none."""
        if not self.is_low_bit:
            return SIXTEEN_BITS
        (first, *more) = self.rules
        return "mixed" if more or first.pattern != EVERYTHING else first.format

    def __str__(self) -> str:
        return f"precision {self.label}" if self.file is None else f"precision policy {self.file}"

    def rule_for(self, name: str) -> Rule | None:
        """The rule that holds for a weight and asks for few bits."""
        rule = next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)
        return None if rule is None or rule.format == SIXTEEN_BITS else rule


def _num_layers(config: Mapping[str, Any]) -> int:
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(number := fields.get(name), int):
                return number
    return 0
