"""What the weights of random tokens count.

Tokens are drawn, and their probabilities summed, with whole-numbered weights. Sums of whole numbers are exact in any
order, so neither a token nor its log probability depends on how a device splits a sum, or on how many rows it sums at
once (of floats, CUDA's sums differ by both in the last bit).
"""

from __future__ import annotations


def unit(vocab_size: int) -> int:
    """The weight of the most probable token: a power of two, so that all weights together are at most 2^62."""
    return 1 << (62 - (vocab_size - 1).bit_length())
