"""What sampling allocates. No torch here: the planner counts it too."""

from __future__ import annotations

GREEDY_BYTES, DRAWING_BYTES, SORTING_BYTES = 16, 32, 64
"""Per logit: float32 logits, their probabilities and whole-numbered weights; with changed scores and the weights' sums;
with their order as well."""

_AT_ONCE_BYTES = 32 << 20  # so many rows that starting a GPU's kernels takes no longer than the kernels


def rows_at_once(vocab_size: int, bytes_per_logit: int) -> int:
    """The rows of logits that a GPU samples from at once."""
    return max(1, _AT_ONCE_BYTES // (vocab_size * bytes_per_logit))


def sampling_bytes(vocab_size: int, num_rows: int) -> int:
    """The most that sampling from `num_rows` rows of logits allocates at once."""
    return max(vocab_size * SORTING_BYTES, min(_AT_ONCE_BYTES, num_rows * vocab_size * SORTING_BYTES))
