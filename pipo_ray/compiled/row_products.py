"""What the kernels that multiply a few rows of inputs at a time have in common: a function for each number of rows."""

from __future__ import annotations


def product_name(num_inputs: int) -> str:
    """The function that computes `num_inputs` rows at once, or fewer where they do not divide all rows of inputs."""
    return f"product{num_inputs}"


def inputs_at_once(num_inputs: int, most: int) -> int:
    """Of rows of inputs, those that are computed at once, at most `most`: about the same every time."""
    return -(-num_inputs // -(-num_inputs // most))
