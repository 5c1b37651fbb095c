"""ONNX Runtime: quantised products by its CPU kernels, `MatMulNBits` and `QMoE`. Tensors stay on torch's `cpu`.

It computes only when asked for by name: `auto` goes on preferring the CPU's own implementations, since which is faster depends on
the machine. The execution providers are those that GLM5_PORT_ONNXRUNTIME_PROVIDER names, and never another: where onnxruntime
would fall back to its CPU provider for a node, the session fails instead, and a provider that is not in the installed build is
told before. Only CPUExecutionProvider has ever been run.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from glm5_port import flags
from glm5_port.errors import did_you_mean
from glm5_port.registry import Backend, Probe

CPU = "CPUExecutionProvider"
"""The provider that onnxruntime falls back to."""


def providers() -> list[str]:
    """The execution providers of every session, in the order in which they are asked for a node."""
    return [name.strip() for name in flags.current().onnxruntime_provider.split(",") if name.strip()]


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
    for name in (asked := providers()):
        if name not in available:
            return Probe(
                f"{flags.ONNXRUNTIME_PROVIDER.name} asks for {name}, which this build of onnxruntime does not have (it has "
                f"{', '.join(available)}){did_you_mean(name, available)}: name one of these, or install another build",
                details,
            )
    return Probe(None, details | {"providers": ", ".join(asked)})


BACKEND = Backend(
    name="onnxruntime",
    title="ONNX Runtime",
    device_type="cpu",
    package=None,
    collective="gloo",
    order=1010,
    probe=probe,
    by_name_only=True,
)
