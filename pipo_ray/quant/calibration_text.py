"""The text that weights are calibrated on: read, checked, and cut into windows of tokens. Reading imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipo_ray.errors import InputError
from pipo_ray.quant.policy import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHOD = "gptq"
CALIBRATION_KEY = "calibration"
"""In the manifest's `extra`: method, checksum and tokens of the text, and how many matrices were rounded with it."""

BUNDLED_TEXT = Path(__file__).parents[1] / "bundled" / "calibration.txt"
"""Prose of eight sources on which the bundled model was trained; nothing of its held-out text is in it."""

CALIBRATION_TOKENS = 32768
"""What is read of a text: more changed nothing that could be measured (`benchmarks/low_bit_quality.py`)."""

LEAST_TOKENS = 1024
"""Fewer do not tell which inputs a matrix gets."""

WINDOW_TOKENS = 1024

_MOST_CHARACTERS = 16
"""Of a token, on average: the rest of a long text is not looked at."""


@dataclass(frozen=True)
class CalibrationText:
    """The text of `file`, and its `checksum` (xxh3_128 of the bytes, in hex)."""

    file: Path
    text: str
    checksum: str

    @classmethod
    def load(cls, file: str | os.PathLike[str] | None = None) -> CalibrationText:
        """Of `file`, or the bundled text. Raises InputError: it cannot be read, or is not UTF-8."""
        import xxhash

        path = BUNDLED_TEXT if file is None else Path(file)
        try:
            raw = path.read_bytes()
            text = raw.decode("utf-8")
        except OSError as error:
            raise InputError(
                f"calibration text {path} cannot be read: {error.strerror}; give a text file, or no file for the "
                "bundled text"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"calibration text {path} is not UTF-8 (byte {error.start}); convert it") from error
        return cls(path, text, xxhash.xxh3_128(raw).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """What tells a store that was calibrated on this text from others."""
        return {"method": METHOD, "text": self.checksum, "most_tokens": CALIBRATION_TOKENS}

    def windows(
        self, tokenizer: PreTrainedTokenizerBase | None, context_length: int, most_tokens: int = CALIBRATION_TOKENS
    ) -> list[list[int]]:
        """Its first `most_tokens` tokens in windows of at most WINDOW_TOKENS and `context_length`, each behind what
        begins a text for this tokenizer.

        Raises InputError without a tokenizer, and for a text that has fewer than LEAST_TOKENS tokens.
        """
        if tokenizer is None:
            raise InputError("the checkpoint has no tokenizer, which calibration needs; add its files, or leave it out")
        # Not verbose: the tokenizer's own idea of the greatest length is not the model's.
        beginning = self.text[: _MOST_CHARACTERS * most_tokens]
        ids: list[int] = tokenizer.encode(beginning, add_special_tokens=False, verbose=False)
        if len(ids) < LEAST_TOKENS:
            raise InputError(
                f"calibration text {self.file} has {len(ids)} tokens, at least {LEAST_TOKENS} are needed; give a "
                "longer one, or no file for the bundled text"
            )
        whole: list[int] = tokenizer.encode(self.text[:64])
        prefix = whole[: whole.index(ids[0])] if ids[0] in whole else []
        step = max(1, min(WINDOW_TOKENS, context_length) - len(prefix))
        chosen = ids[:most_tokens]
        # As long as possible and equally long: a short rest would see little context.
        count = -(-len(chosen) // step)
        length = -(-len(chosen) // count)
        return [[*prefix, *chosen[at : at + length]] for at in range(0, len(chosen), length)]


def calibration_text(calibrate: bool | str | os.PathLike[str], policy: Precision | None) -> CalibrationText | None:
    """What `calibrate` asks for: False for none, True for the bundled text, or a text file.

    Raises InputError: as `CalibrationText.load` does, and if `policy` has no int4 weights, which alone gain by it.
    """
    if calibrate is False:
        return None
    if policy is not None and not can_calibrate(policy):
        raise InputError(
            f"--calibrate with --precision {policy.label}: a text helps int4 weights only; leave --calibrate out, or "
            "give for instance --precision int4-g32"
        )
    return CalibrationText.load(None if calibrate is True else calibrate)


def can_calibrate(policy: Precision) -> bool:
    """Whether it asks for int4 weights."""
    return any(rule.format.startswith("int4") for rule in policy.rules)


def stored_calibration(extra: dict[str, Any]) -> dict[str, Any]:
    """Of a manifest's `extra`: what `CalibrationText.to_json` gave; empty for a store that was not calibrated."""
    found = extra.get(CALIBRATION_KEY)
    names = ("method", "text", "most_tokens")
    return {name: found.get(name) for name in names} if isinstance(found, dict) else {}
