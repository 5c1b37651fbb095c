"""ONNX Runtime: quantised products by its CPU kernels, `MatMulNBits` and `QMoE`. Tensors stay on torch's `cpu`.

It computes only when asked for by name: `auto` goes on preferring the CPU's own implementations, since which is faster depends on
the machine. The execution provider is the one named here, and never another: where onnxruntime would fall back to its CPU
provider for a node, the session fails instead, and a provider that is not in the installed build is told before.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from glm5_port.registry import Backend, Probe

PROVIDER = "CPUExecutionProvider"
"""The execution provider of every session."""


def probe() -> Probe:
    details = {"torch": str(torch.__version__)}
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return Probe(f"{package} is not installed: pip install 'glm5_port[onnx]'", details)
    for package in ("onnx", "onnxruntime"):
        try:
            details[package] = str(importlib.import_module(package).__version__)
        except Exception as error:  # a shared library that does not load: its text is what the user needs
            text = " ".join(str(error).split())
            return Probe(f"{package} is installed and fails to import ({type(error).__name__}: {text}): reinstall it", details)
    available = importlib.import_module("onnxruntime").get_available_providers()
    if PROVIDER not in available:
        return Probe(f"this onnxruntime has no {PROVIDER} (it has {', '.join(available)}): install another build of it", details)
    return Probe(None, details | {"provider": PROVIDER})


BACKEND = Backend(
    name="onnxruntime",
    title="ONNX Runtime on the CPU",
    device_type="cpu",
    package=None,
    collective="gloo",
    order=1010,
    probe=probe,
    by_name_only=True,
)
