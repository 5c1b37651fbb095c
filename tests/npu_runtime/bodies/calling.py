"""How a vendor operator runs on the stand-in device: the vendor's front end, with its kernels allowed; then our body.

The front end checks, allocates the results and chooses the kernel, as on the hardware. Then every result is filled with poison,
the body computes on the same memory seen from the CPU, and what it leaves undefined stays poison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.npu_runtime import aten, machine

POISON = 0xA5
"""Byte of integers that nobody has written; floating ones hold NaN."""


class Forbidden(RuntimeError):
    """A call that the vendor's documents do not allow, although the front end lets it through. On the hardware it would fail
    opaquely, or compute something else."""


@dataclass(frozen=True, slots=True)
class Body:
    """What stands in for an operator.

    Attributes:
        name: of the operator, with its overload where it is not the default one.
        kernels: names of the aclnn kernels that the front end may choose.
        compute: takes the arguments by name, tensors as CPU tensors, lists of them as lists; returns the results, None for one
            that is not defined. Arguments that the operator writes share their memory.
        chips: generations that the documents list.
    """

    name: str
    kernels: tuple[str, ...]
    compute: Callable[[Any], Any]
    chips: tuple[str, ...]


BODIES: dict[str, Body] = {}
_library: torch.library.Library | None = None
_running = "A2"


def body(*names: str, kernels: Sequence[str], chips: Sequence[str] = ("A2", "A3", "950")) -> Callable[..., Callable[..., Any]]:
    """Registers the decorated function as what these operators compute."""

    def register(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for name in names:
            BODIES[name] = Body(name, tuple(kernels), compute, tuple(chips))
        return compute

    return register


def require(condition: bool, rule: str) -> None:
    """Raises Forbidden with the rule when the condition does not hold."""
    if not condition:
        raise Forbidden(f"not documented: {rule}")


def chip() -> str:
    """The generation that this process stands in for."""
    return _running


def undefined(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A result that nobody has written yet."""
    made = torch.empty(tuple(shape), dtype=dtype)
    if dtype.is_floating_point:
        return made.fill_(torch.nan)
    made.view(-1).view(torch.uint8).fill_(POISON)
    return made


def install(running: machine.Machine) -> None:
    """Puts every body behind the vendor's front end."""
    global _library, _running
    _running = running.chip
    _library = torch.library.Library("npu", "IMPL")
    for name, entry in BODIES.items():
        vendors = torch.library.get_kernel(f"npu::{name}", "PrivateUse1")
        _library.impl(name, _call(entry, vendors), "PrivateUse1", allow_override=True)


def _call(entry: Body, vendors: Any) -> Callable[..., Any]:
    base, _, overload = entry.name.partition(".")
    schema = getattr(getattr(torch.ops.npu, base), overload or "default")._schema
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        require(_running in entry.chips, f"{entry.name} on {_running} (documented for {', '.join(entry.chips)})")
        with machine.armed(*entry.kernels):
            results = vendors.call_boxed(keys, *args, **kwargs)
        given = {id(value) for value in _tensors(arguments.values())}
        fresh = [result for result in _tensors([results]) if id(result) not in given and result.numel()]
        for result in fresh:
            memory = aten.on_cpu(result)
            memory.copy_(undefined(memory.shape, memory.dtype))
        try:
            computed = entry.compute(SimpleNamespace(**{name: _values(value) for name, value in arguments.items()}))
        except Forbidden as refusal:
            raise Forbidden(f"{entry.name}: {refusal}") from None
        _write(entry.name, list(_tensors([results])), computed, given)
        return results

    return functools.update_wrapper(run, entry.compute)


def _write(name: str, results: list[Tensor], computed: Any, given: set[int]) -> None:
    values = list(computed) if isinstance(computed, (list, tuple)) else [computed]
    for place, result in enumerate(results):
        if id(result) in given or place >= len(values) or values[place] is None:
            continue
        value = values[place]
        if value.shape != result.shape or value.dtype != result.dtype:
            made, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (value, result))
            raise AssertionError(f"{name}: the body made {made} for result {place}, the front end allocated {wanted}")
        if value.numel():
            aten.on_cpu(result).copy_(value)


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return plain_values(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [plain_values(tensor) for tensor in value]
    return value


def plain_values(tensor: Tensor) -> Tensor:
    """A tensor's values as a CPU tensor: the same memory, or, of one in FRACTAL_NZ, what the vendor's cast makes of it."""
    if tensor.device.type != aten.DEVICE:
        return tensor
    marked = aten.on_cpu(tensor)
    if aten.in_fractal_format(tensor):
        import torch_npu

        marked = aten.on_cpu(torch_npu.npu_format_cast(tensor, aten.FORMAT_ND)).clone()  # what it lies in is freed
        marked.fractal = True
    return marked


def in_nz(tensor: Tensor) -> bool:
    """Whether an argument of a body came in FRACTAL_NZ."""
    return getattr(tensor, "fractal", False)
