"""Kernels of the rewritten graph: optimizer updates, norms, packing and casts."""
