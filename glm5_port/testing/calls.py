"""Calling an operator so that mistakes show: on copies, with poison in all memory that nobody has written yet.

Poison is a byte pattern that is finite in every dtype where the memory belongs to the caller (mutated arguments), and NaN
where an implementation allocates without filling. What a call must leave alone is checked bit for bit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from glm5_port.dispatch import Operator
from glm5_port.registry import Implementation

POISON = 0xA5
"""Byte of memory that a call must write or leave alone: finite in every floating dtype, negative in every signed one."""

_RAISED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def to_gold(value: Any) -> Any:
    """Raises floating tensors of 16 bits and more to float64; quantised bytes stay what they are."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _RAISED else value.clone()
    if isinstance(value, (list, tuple)):
        return [to_gold(v) for v in value]
    return value


def to_device(value: Any, device: str) -> Any:
    """Moves every tensor, keeping the strides of views that have gaps (`Tensor.to` would close them)."""
    if isinstance(value, Tensor):
        if value.device.type == torch.device(device).type or value.is_contiguous() or 0 in value.stride():
            return value.to(device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, Mapping):
        return {name: to_device(v, device) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(v, device) for v in value]
    return value


def strided(value: Any) -> Any:
    """The same values as every second element of a wider tensor, with poison in between."""
    if isinstance(value, list):
        return [strided(v) for v in value]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    wide = poison_(value.new_empty((*value.shape[:-1], 2 * value.shape[-1])), with_nan=True)
    wide[..., ::2] = value
    return wide[..., ::2]


def poison_(tensor: Tensor, *, with_nan: bool = False) -> Tensor:
    """Fills `tensor` with the poison byte, or with NaN where asked for and possible."""
    if with_nan and tensor.dtype in _RAISED:
        return tensor.fill_(torch.nan)
    pattern = torch.full((tensor.element_size(),), POISON, dtype=torch.uint8, device=tensor.device)
    value = pattern.bool()[:1] if tensor.dtype == torch.bool else pattern.view(tensor.dtype)
    return tensor.copy_(value.expand_as(tensor))


class PoisonedEmpty(TorchFunctionMode):
    """Within the context, memory that Python code allocates without filling (`torch.empty` and its kin) holds poison."""

    ALLOCATORS = frozenset(
        {torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted, Tensor.new_empty, Tensor.new_empty_strided}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return poison_(result, with_nan=True) if func in self.ALLOCATORS and result.device.type != "meta" else result


def flat(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and mappings, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from flat(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from flat(value)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: NaN equals itself, 0.0 differs from -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    return torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, one more dimension, on its device."""
    return tensor.detach().contiguous().reshape(*tensor.shape, 1).view(torch.uint8)


def run_outputs(operator: Operator, function: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Tensor]:
    """Calls `function` on a copy of `arguments`. Returns its outputs, then the mutated arguments: a flat list on the CPU."""
    mine = copy.deepcopy(dict(arguments))
    with torch.no_grad():
        result = function(**mine)
    return [t.detach().cpu() for t in (*flat(result), *written(operator, mine))]


def written(operator: Operator, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The mutated arguments as a flat list, in the order of the declaration."""
    return list(flat([arguments[name] for name in operator.mutates]))


def observe(operator: Operator, function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[list[Tensor], list[str]]:
    """As `run_outputs` with unfilled memory poisoned, and what the call did against the declaration: writing an argument
    that is not declared as mutated, or returning memory of an argument or of another output (an opaque torch op may not)."""
    mine = copy.deepcopy(dict(arguments))
    with torch.no_grad(), PoisonedEmpty():
        result = function(**mine)
    problems = [
        f"wrote its argument {name}, which is not declared as mutated"
        for name in arguments
        if name not in operator.mutates
        and not all(same_bits(a, b) for a, b in zip(flat(arguments[name]), flat(mine[name]), strict=True))
    ]
    owners = {_memory(t): f"argument {name}" for name, value in mine.items() for t in flat(value) if t.numel()}
    for place, output in enumerate(flat(result)):
        if output.numel() == 0:
            continue
        if (owner := owners.get(_memory(output))) is not None:
            problems.append(f"output {place} shares memory with {owner}")
        owners[_memory(output)] = f"output {place}"
    return [t.detach().cpu() for t in (*flat(result), *written(operator, mine))], problems


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_fake(implementation: Implementation, arguments: Mapping[str, Any], outputs: list[Tensor]) -> list[str]:
    """The fake must promise the shapes and dtypes that the call returns: compiled graphs are planned on them."""
    with FakeTensorMode() as mode:
        fakes = {name: _to_fake(mode, value) for name, value in arguments.items()}
        call = _signature(implementation).bind(**fakes)  # torch passes by place what the schema does not make keyword-only
        promised = list(flat(implementation.fake(*call.args, **call.kwargs)))
    returned = outputs[: len(outputs) - len(written(implementation.operator, arguments))]
    if len(promised) != len(returned):
        return [f"the fake promises {len(promised)} outputs, the call returns {len(returned)}"]
    return [
        f"the fake promises {tuple(fake.shape)} {fake.dtype} for output {place}, "
        f"the call returns {tuple(real.shape)} {real.dtype}"
        for place, (fake, real) in enumerate(zip(promised, returned, strict=True))
        if fake.shape != real.shape or fake.dtype != real.dtype
    ]


def _signature(implementation: Implementation) -> inspect.Signature:
    return implementation.operator.signature if implementation.prepare is None else inspect.signature(implementation.function)


def _to_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    return [_to_fake(mode, v) for v in value] if isinstance(value, (list, tuple)) else value


def prepared_arguments(implementation: Implementation, facts: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` as this implementation takes them: with its own weight layout in place of the canonical weights."""
    if implementation.prepare is None:
        return dict(arguments)
    preparation = implementation.prepare(facts)
    weights = {name: arguments[name] for name in implementation.operator.weights}
    experts = facts.get("experts")
    for part in range(experts) if experts is not None else [None]:
        preparation.add(part, {n: (w if part is None else w[part]).clone() for n, w in weights.items()})
    rest = {name: value for name, value in arguments.items() if name not in weights}
    return rest | preparation.finish()


def call_with_prepared(implementation: Implementation, facts: Mapping[str, Any]) -> Callable[..., Any]:
    """The implementation's function, taking canonical weights even where it prepares its own layout."""
    if implementation.prepare is None:
        return implementation.function
    return lambda **arguments: implementation.function(**prepared_arguments(implementation, facts, arguments))
