"""Weights of fewer bits: formats, rounding, panels as they lie in a block store, and the policy that chooses."""
