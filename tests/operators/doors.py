"""Ways to call an operator that its tests share: each implementation, on a device that is not there, and compiled."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_port import flags
from glm5_port.dispatch import Bound, Operator, trace_through
from tests.fake_devices import fake_devices

BOTH = pytest.mark.parametrize("variant", ["reference", "torch/eager"])


def function_of(operator: Operator, variant: str) -> Callable[..., Any]:
    return operator.implementations[variant].function


def portable(operator: Operator, arguments: Mapping[str, Any]) -> Bound:
    """The operator bound to its portable implementation, whatever this machine has for these arguments."""
    with mock.patch.dict(os.environ, {f"GLM5_PORT_OP_{operator.name.upper()}": "torch"}):
        flags.reset()
        bound = operator.bind(**operator.facts_of(arguments))
    flags.reset()
    assert bound.implementation.id == "torch/eager"
    return bound


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any torch function returns. Views count by their own size."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


def on_absent_device(operator: Operator, arguments: Mapping[str, Any], device: str = "cuda") -> tuple[Any, int]:
    """Runs the body of the portable implementation on fake tensors of a device that is not there, where every host sync and
    every tensor on another device raises. Arguments may be on the meta device, to be large at no cost. Returns the result and
    the bytes of the largest tensor that was made."""
    bound = portable(operator, arguments)
    with fake_devices(), Largest() as largest, trace_through():

        def fake(value: Any) -> Any:
            if isinstance(value, Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            return [fake(v) for v in value] if isinstance(value, list) else value

        fakes = {name: fake(value) for name, value in arguments.items()}
        largest.bytes = 0
        result = bound(**fakes)
    for value in result if isinstance(result, tuple) else [result]:
        assert value is None or value.device.type == device
    return result, largest.bytes


def compiled(operator: Operator, arguments: Mapping[str, Any]) -> Any:
    """The bound operator called from a compiled function, one graph, with `arguments` (mutated ones are written)."""
    bound = portable(operator, arguments)
    torch._dynamo.reset()
    return torch.compile(lambda call: bound(**call), fullgraph=True, backend="aot_eager")(dict(arguments))
