"""How each device computes: one folder per chip, `torch/` for the portable implementations.

`load_built_in` registers every built-in backend and its implementations without importing any vendor package; vendor packages are
imported inside probes and kernels only. Backends of other packages come through `glm5_port.plugins`.
"""

from __future__ import annotations

import importlib

from glm5_port.registry import register_backend

BUILT_IN = ("cuda", "npu", "musa", "mlu", "gcu", "hygon", "metax", "kunlunxin", "iluvatar", "cpu", "onnxruntime")
"""Folders of this package that hold a backend, in the order in which `auto` tries them."""

IMPLEMENTATIONS = (
    "cpu.quantize",
    "cpu.matmul",
    "cpu.experts",
    "cpu.indexer",
    "cpu.norm",
    "cpu.rope",
    "cpu.routing",
    "cpu.attention",
    "cpu.cache",
    "cpu.mla",
    "npu.norm",
    "npu.linear",
    "npu.rope",
    "npu.cache",
    "npu.attention",
    "npu.indexer",
    "npu.mla",
    "npu.routing",
    "npu.experts",
    "npu.quantised",
    "cuda.rope",
    "cuda.attention",
    "cuda.expanded",
    "cuda.indexer",
    "cuda.norm",
    "cuda.cache",
    "cuda.mla",
    "cuda.routing",
    "cuda.quantize",
    "cuda.matmul",
    "cuda.linear",
    "cuda.experts",
    "cuda.flash_mla",
    "onnxruntime.int4",
)
"""Modules of this package with implementations of the backends' own."""


def load_built_in() -> None:
    """Registers the built-in backends, then the implementations of each, then the portable ones."""
    for name in BUILT_IN:
        register_backend(importlib.import_module(f"glm5_port.backends.{name}").BACKEND)
    for module in IMPLEMENTATIONS:
        importlib.import_module(f"glm5_port.backends.{module}")
    importlib.import_module("glm5_port.backends.torch")
