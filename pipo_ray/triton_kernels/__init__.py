"""Products with low-bit weights on a CUDA device, by kernels that read panels as they are."""
