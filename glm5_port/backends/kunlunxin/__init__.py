"""Kunlunxin XPU: answers as `cuda`, remapped by torch_xmlir (XPytorch); collectives are BKCL under the name nccl.

The chip has no float64, and FlagGems lists its topk and sort as unsupported: parity there needs the CPU for the gold.
"""

from __future__ import annotations

from glm5_port.backends.probing import KUNLUNXIN, KUNLUNXIN_PACKAGE, probe_cuda
from glm5_port.registry import Backend, Probe


def probe() -> Probe:
    return probe_cuda(KUNLUNXIN)


BACKEND = Backend(
    name="kunlunxin",
    title="Kunlunxin XPU",
    device_type="cuda",
    package=KUNLUNXIN_PACKAGE,
    collective="nccl",
    order=17,
    probe=probe,
)
