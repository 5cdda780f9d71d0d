"""The text that weights are calibrated on: read, checked, and cut into windows of tokens. Reading imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipo_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
