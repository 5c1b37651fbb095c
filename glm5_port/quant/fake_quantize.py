"""The value that INT4 leaves of a weight, as a differentiable function of its float32 master.

The quantiser (`glm5_port.quant.int4`) is called through an opaque torch op, so that no compiler writes it a second time.

Shape legend: ... any leading dimensions; I inputs of a row; g weights of a group.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from glm5_port.errors import InputError
from glm5_port.quant import learned_scales as learned
from glm5_port.quant.int4 import AMAX7, Int4Rule, dequantize_packed, groups_of, quantize_packed, quantize_with_scales
from glm5_port.quant.places import Piece

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""They hold every bfloat16 value; float16 does not."""

_HOLDERS: weakref.WeakValueDictionary[int, FakeQuantize] = weakref.WeakValueDictionary()
_NO_HOLDER = 0
_next_holder = itertools.count(1)
_optimizer_steps = 0


# --- the function ----------------------------------------------------------------------------------------------------------


def fake_quantize(
    master: Tensor,
    rule: Int4Rule = AMAX7,
    scales: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    name: str = "weight",
) -> Tensor:
    """bf16(q * s) of bf16(master), with the gradient of the identity (with `scales`: of LSQ, see the module's text).

    Args:
        master: [..., I] float32.
        rule: which rule, and its group size.
        scales: [..., I / g] float32, learned; None takes the rule's.
        dtype: of the result: float32 (the default), bfloat16 or float64, all of which hold the value exactly.
        name: of the weight, for errors.

    Returns:
        [..., I], a new tensor.

    Raises:
        InputError: a master or scales of another dtype or shape, NaN, infinite or above 2^127 in magnitude.
    """
    dtype = dtype or master.dtype
    check_master(master.dtype, dtype, name)
    groups, _ = groups_of(master.shape[-1], rule.group_size, name=name)
    if scales is not None:
        learned.check_scales(scales, (*master.shape[:-1], groups), name)
    return _fake_quantize(master, scales, rule.name, rule.group_size, dtype, name, _NO_HOLDER)


def check_master(master: torch.dtype, dtype: torch.dtype, name: str) -> None:
    if master != torch.float32:
        raise InputError(
            f"{name}: masters are float32, this one is {master}.\n"
            "  In bfloat16 an optimizer's steps round to nothing (a weight of 0.02 moves by 1e-4 or not at all). Keep the model "
            "in float32,\n  or let prepare_qat(..., convert_masters=True) make float32 masters of the weights it prepares."
        )
    if dtype not in COMPUTE_DTYPES:
        raise InputError(
            f"{name}: values in {dtype} were asked for, which does not hold every bfloat16 value\n"
            f"  supported: {', '.join(str(d).removeprefix('torch.') for d in COMPUTE_DTYPES)}"
        )


@torch.library.custom_op("glm5_port::int4_fake_quantize", mutates_args=())
def _fake_quantize(
    master: Tensor, scales: Tensor | None, rule: str, group_size: int, dtype: torch.dtype, name: str, holder: int
) -> Tensor:
    """Opaque to compilers. The holder (0: none) keeps codes and scales, and spares their computation while nothing changed."""
    owner = _HOLDERS.get(holder)
    key = _state_of(master, scales)
    record = None if owner is None or key is None or owner.record is None or owner.record.key != key else owner.record
    if record is None:
        record = record_of(master, scales, Int4Rule(rule, group_size), name)
    if owner is not None:
        owner.record = record
    values = dequantize_packed(record.packed, record.scales)
    return values if values.dtype == dtype else values.to(dtype)


@_fake_quantize.register_fake
def _(master: Tensor, scales: Tensor | None, rule: str, group_size: int, dtype: torch.dtype, name: str, holder: int) -> Tensor:
    return master.new_empty(master.shape, dtype=dtype)


@torch.library.custom_op("glm5_port::int4_learned_scale_gradients", mutates_args=())
def _learned_scale_gradients(gradient: Tensor, master: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    packed = quantize_with_scales(master, learned.round_scales(scales))
    return learned.gradients(gradient, master, scales, packed)


@_learned_scale_gradients.register_fake
def _(gradient: Tensor, master: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(master), torch.empty_like(scales)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    master, scales = inputs[:2]
    ctx.learned = scales is not None
    if ctx.learned:
        ctx.save_for_backward(master, scales)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rest = (None,) * 5
    if not ctx.learned:
        return gradient.to(torch.float32), None, *rest
    return *_learned_scale_gradients(gradient, *ctx.saved_tensors), *rest


_fake_quantize.register_autograd(_backward, setup_context=_keep_for_backward)


# --- what it was computed with -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """Codes and scales of one parameter.

    Attributes:
        key: the state of the master and its scales that they were made from; None if it cannot be told again.
        packed, scales: [..., I / 8] int32 and [..., I / g] bfloat16.
    """

    key: tuple[Any, ...] | None
    packed: Tensor
    scales: Tensor


def record_of(master: Tensor, scales: Tensor | None, rule: Int4Rule, name: str) -> Record:
    key = _state_of(master, scales)
    if scales is None:
        return Record(key, *quantize_packed(master, rule, name=name))
    rounded = learned.round_scales(scales, name)
    return Record(key, quantize_with_scales(master, rounded, name=name), rounded)


def _state_of(master: Tensor, scales: Tensor | None) -> tuple[Any, ...] | None:
    """Changes whenever a parameter is written: by torch in place (version counter), by an optimizer (fused ones write past
    the counter, so their steps are counted), or by putting another tensor in its place (address)."""
    state: list[Any] = [_optimizer_steps]
    for tensor in (master, scales):
        if tensor is not None:
            if tensor.is_inference():
                return None
            state += [tensor.data_ptr(), tensor.shape, tensor.device, tensor._version]
    return tuple(state)


@functools.cache
def _count_optimizer_steps() -> None:
    """From the first prepared model on. (Counting from import on would touch programs that only read this module.)"""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class FakeQuantize(nn.Module):
    """Turns one master parameter into what INT4 leaves of it, and remembers the codes and scales of the last time.

    Attributes:
        name: of the parameter.
        rule: which rule, and its group size.
        dtype: what the layer computes in.
        pieces: the checkpoint weights in the parameter.
        scales: learned, [..., I / g] float32; None takes the rule's.
        record: of the last forward pass.
    """

    def __init__(self, name: str, rule: Int4Rule, dtype: torch.dtype, pieces: Sequence[Piece], record: Record, learned: bool):
        super().__init__()
        self.name, self.rule, self.dtype, self.pieces = name, rule, dtype, tuple(pieces)
        self.scales = nn.Parameter(record.scales.to(torch.float32)) if learned else None
        self.record: Record | None = record
        self._register()
        _count_optimizer_steps()

    def _register(self) -> None:
        self.holder = next(_next_holder)
        _HOLDERS[self.holder] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()  # a copy keeps records of its own

    def extra_repr(self) -> str:
        return f"{self.name}, {self.rule}{', learned scales' if self.scales is not None else ''}"

    def forward(self, master: Tensor) -> Tensor:
        check_master(master.dtype, self.dtype, self.name)
        return _fake_quantize(master, self.scales, self.rule.name, self.rule.group_size, self.dtype, self.name, self.holder)
