"""Kernels that torch does not have, written as LLVM IR and compiled for this processor when a run starts."""
