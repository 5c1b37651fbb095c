"""The Triton kernels lowered for an Ascend NPU, by the front half of triton-ascend's compiler: `make test-triton-ascend`.

triton-ascend owns the import name `triton`, so these tests live in an environment of their own. Its compiler needs no CANN as far
as Linalg; what turns Linalg into machine code is part of CANN, and nothing here says whether it would take what is handed to it.
"""
