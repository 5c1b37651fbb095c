"""What every operator's tests ask of both doors: bound calls compile into one graph, and portable bodies trace without a chip."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm5_port.dispatch import Bound, Operator, trace_through
from tests.fake_devices import fake_devices


def bind(operator: Operator, arguments: Mapping[str, Any], **facts: Any) -> Bound:
    """The operator bound on the facts of a call."""
    return operator.bind(**{**operator.facts_of(arguments), **facts})


def portable(operator: Operator) -> list[Any]:
    """The operator's reference and portable implementations, as pytest parameters."""
    chosen = [i for i in operator.implementations.values() if i.portable or i.backend == "reference"]
    return [pytest.param(i.function, id=i.id) for i in chosen]


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def check_compiles(operator: Operator, arguments: Mapping[str, Any]) -> None:
    """One graph without breaks, and the bits of the eager call."""
    bound = bind(operator, arguments, needs_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda values: bound(**values), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = outputs(bound(**copy.deepcopy(dict(arguments))))
        actual = outputs(compiled(copy.deepcopy(dict(arguments))))
    assert len(actual) == len(expected) > 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


class Sizes(TorchDispatchMode):
    """Records the bytes of the largest tensor that any step makes; views of what is there do not count."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in outputs(result) if not function.is_view else ():
            self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def trace_on(device: str, operator: Operator, arguments: Mapping[str, Any], names: tuple[str, ...] = ()) -> Iterator[Sizes]:
    """Runs the bodies of the portable implementations on fake tensors of a device that is not here: a host sync or a device
    literal raises. Results must look as the declaration's fake says. `names` are implementations that must be among them.
    Arguments may be on the meta device, to be large at no cost."""
    facts = {**operator.facts_of(arguments), "device_type": device, "needs_grad": False}
    found = [i for i in operator.implementations.values() if i.portable and not i.not_supported(**facts)]
    assert found
    assert set(names) <= {i.id for i in found}
    for implementation in found:
        with fake_devices(), trace_through(), torch.no_grad():
            fakes = {n: _like(v, device) for n, v in arguments.items()}
            with Sizes() as sizes:
                actual = outputs(implementation.function(**fakes))
            expected = outputs(operator.fake(**fakes))
        ours, declared = ([(t.shape, t.dtype, t.device) for t in tensors] for tensors in (actual, expected))
        assert ours == declared, implementation.id
        assert actual[0].device.type == device
        yield sizes


def _like(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return [_like(v, device) for v in value] if isinstance(value, list) else value


def check_traces(operator: Operator, arguments: Mapping[str, Any], names: tuple[str, ...] = ()) -> None:
    """`trace_on` for the devices that torch knows without a vendor package."""
    for device in ("cuda", "xpu"):
        assert list(trace_on(device, operator, arguments, names))
