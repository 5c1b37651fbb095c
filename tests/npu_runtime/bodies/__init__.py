"""What the vendor's fused operators compute on the stand-in device.

Written from the operator pages of Ascend/op-plugin, independently of this library's own implementations: results against those
would otherwise be circular. Where the documents leave something open, the bodies choose what a caller must not rely on: the order
of indices, ties to the later position, poison beyond what is defined.
"""

from __future__ import annotations

from tests.npu_runtime.bodies import attention, calling, experts, indexer, prologue, quantised, small  # noqa: F401 - register
from tests.npu_runtime.bodies.calling import BODIES, Forbidden, install

__all__ = ["BODIES", "Forbidden", "install"]
