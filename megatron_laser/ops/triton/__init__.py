"""The kernels in Triton: forward and backward over tiles of the vocabulary, and few rows in one pass."""
