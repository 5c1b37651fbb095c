"""Starts the stand-in runtime for the tests of this folder, which run in the environment of `make test-npu` only.

Elsewhere torch_npu is absent (it would break `import torch` for everybody) and these files are not collected: `make test`
says so.
"""

from __future__ import annotations

import importlib.util
import os

CHIP, CANN = "NPU_RUNTIME_CHIP", "NPU_RUNTIME_CANN"
"""Environment variables: which machine the runtime stands in for; torch_npu reads it once a process."""

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.npu_runtime import machine

    machine.start(os.environ.get(CHIP, "A2"), os.environ.get(CANN, "9.1.0"))
