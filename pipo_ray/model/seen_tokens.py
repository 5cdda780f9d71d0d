"""What the penalties look at: which tokens a sequence has, and how often each was generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class SeenTokens:
    """It follows from the token ids alone. Kept from token to token, it saves looking at all of them for each."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._of_prompt: Integers = np.unique(np.asarray(prompt_token_ids, np.int64))
        self._only_generated: list[int] = []
        self._counts: dict[int, int] = {}
        self._num_generated = 0

    def follow(self, generated_token_ids: Sequence[int]) -> None:
        """Take what has come to the generated tokens since the last call, which are all of them."""
        for token_id in generated_token_ids[self._num_generated :]:
            if token_id not in self._counts:
                place = int(np.searchsorted(self._of_prompt, token_id))
                if place == len(self._of_prompt) or self._of_prompt[place] != token_id:
                    self._only_generated.append(token_id)
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self._num_generated = len(generated_token_ids)

    def distinct(self) -> Integers:
        """Every token id of the prompt and the generated tokens once, int64 [n]."""
        return np.concatenate([self._of_prompt, np.asarray(self._only_generated, np.int64)])

    def generated(self) -> tuple[Integers, Integers]:
        """Every generated token id once, int64 [n], and how often it was generated, int64 [n]."""
        size = len(self._counts)
        return np.fromiter(self._counts, np.int64, size), np.fromiter(self._counts.values(), np.int64, size)
