"""Triton kernels. Importing a module of this package imports triton; only `triton_support.kernels` does that, at first use."""
