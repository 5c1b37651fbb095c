"""Triton kernels on the CPU, through Triton's interpreter: in a process of its own, `make test-interpreter`. No GPU runs here."""
