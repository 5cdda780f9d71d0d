"""What fewer bits cost: perplexity of a text, and how far the next token's distribution is from the original's.

perplexity      e to the mean loss per token, each given those before it in its window
KL divergence   mean over the tokens of sum p * log(p / q): p the original's next-token distribution, q the other's,
                in nats (Kullback and Leibler, 1951)
same token      share of the tokens at which the most probable next token is the same
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipo_ray.errors import InputError, ResourceError
from pipo_ray.session.memory import format_size

Logits = npt.NDArray[np.float32]

COMPARING_BYTES = 64 << 20
"""What `Quality.add` takes on its way, whatever the vocabulary."""

_CHUNK_ELEMENTS = COMPARING_BYTES // 4 // 8

LEAST_TOKENS = 64
"""Fewer say nothing about a model."""


@dataclass
class Quality:
    """Sums over the tokens so far, in float64."""

    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0
    count: int = 0

    def add(self, window: Sequence[int], logits: Logits, original: Logits) -> None:
        """A window's token ids, and the logits [len(window), vocabulary] of this model and of the original."""
        following = np.asarray(window[1:])
        step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, len(following), step):
            rows = slice(start, min(start + step, len(following)))
            ours, theirs = log_softmax(logits[rows]), log_softmax(original[rows])
            self.loss -= float(ours[np.arange(len(ours)), following[rows]].sum(dtype=np.float64))
            self.divergence += float((np.exp(theirs) * (theirs - ours)).sum(dtype=np.float64))
            self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.count += len(following)

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return math.exp(self.loss / self.count)

    @property
    def kl(self) -> float:
        """Mean divergence from the original, nats; rounding can leave a tiny negative number, which is none."""
        return max(0.0, self.divergence / self.count)

    @property
    def same_token(self) -> float:
        """0 to 1."""
        return self.same / self.count


def log_softmax(logits: Logits) -> Logits:
    """Log probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def too_short(what: str, num_tokens: int) -> str:
    """What is said of a text that has fewer than LEAST_TOKENS tokens; `what` names it."""
    return (
        f"{what} has {num_tokens} token{'s' * (num_tokens != 1)}, at least {LEAST_TOKENS} are needed to tell models "
        "apart; give a longer one"
    )


def windows_of(token_ids: Sequence[int], prefix: Sequence[int], length: int, most_tokens: int) -> list[list[int]]:
    """The text's first `most_tokens` tokens in windows of `length` at most, each behind `prefix` (what begins a text).

    Raises InputError for a text that is too short.
    """
    ids = list(token_ids[:most_tokens])
    if len(ids) < LEAST_TOKENS:
        raise InputError(too_short("the text", len(ids)))
    step = length - len(prefix)
    windows = [[*prefix, *ids[at : at + step]] for at in range(0, len(ids), step)]
    return [window for window in windows if len(window) > 1]


class LogitsFile:
    """The original's logits of every window, on disk: for a large vocabulary they are gigabytes. It has no name."""

    def __init__(self, folder: Path, windows: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Raises ResourceError if `folder` has no room for it."""
        self._vocabulary = vocabulary
        self._rows = [len(window) for window in windows]
        nbytes = 4 * vocabulary * sum(self._rows)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            os.posix_fallocate(self._file.fileno(), 0, max(1, nbytes))
        except OSError as error:
            raise ResourceError(
                f"the original's logits take {format_size(nbytes)} in {folder}: {error.strerror}; take fewer tokens, "
                "or set PIPO_CACHE to a folder on a larger drive"
            ) from error

    def write(self, window: int, logits: Logits) -> None:
        """Keep the logits of the window of this number."""
        self._map(window)[:] = logits

    def read(self, window: int) -> Logits:
        """What was kept."""
        return self._map(window)

    def close(self) -> None:
        """The memory on disk is free again."""
        self._file.close()

    def _map(self, window: int) -> Logits:
        offset = 4 * self._vocabulary * sum(self._rows[:window])
        shape = (self._rows[window], self._vocabulary)
        return np.memmap(self._file, np.float32, "r+", offset, shape)
