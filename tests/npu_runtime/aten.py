"""What torch's own operators compute on the stand-in device: the CPU's kernel, on the same memory.

Not what the hardware's kernels compute: their numbers are not tested here. Views, factories and copies across devices stay
torch_npu's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

DEVICE = "npu"
NATIVE = frozenset(
    {
        "empty.memory_format",
        "empty_strided",
        "as_strided",
        "view",
        "_reshape_alias",
        "resize_",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "unfold",
        "_to_copy",
        "_local_scalar_dense",
        "_copy_from_and_resize",
        "_pin_memory",
        "is_pinned",
        "record_stream",
    }
)
"""Operators of aten that torch_npu computes without a kernel, or by way of others."""
FORMAT_ND, FORMAT_NZ = 2, 29

_library: torch.library.Library | None = None


class OtherDevice(RuntimeError):
    """An operator got tensors of the NPU and of the CPU at once, which the hardware refuses."""


def on_cpu(tensor: Tensor) -> Tensor:
    """The memory of a tensor of the stand-in device as a CPU tensor of the same strides: nothing is copied. Of a tensor in
    FRACTAL_NZ this shows the bytes as they lie: see `bodies.values`."""
    memory = tensor.untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype)
    if memory.nbytes() == 0:
        return empty.new_empty(tensor.shape)
    alias = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), torch.device("cpu"), memory.nbytes())
    return empty.set_(alias, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the stand-in device."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_cpu(copy).copy_(tensor)
    return copy


def in_fractal_format(tensor: Tensor) -> bool:
    """Whether the tensor's memory is in FRACTAL_NZ."""
    import torch_npu

    return int(torch_npu.get_npu_format(tensor)) == FORMAT_NZ


def install() -> None:
    """Gives every operator of aten that torch_npu has a kernel for the CPU's body."""
    global _library
    vendors_copy = torch.library.get_kernel("aten::copy_", "PrivateUse1")
    _library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, rest = name.partition("::")
        if namespace != "aten" or rest in NATIVE:
            continue
        base, _, overload = rest.partition(".")
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operator is None or _returns_view(operator):
            continue
        if rest == "copy_":
            body = _copy(vendors_copy)
        elif rest in OURS or _runs_on_cpu(name):
            body = _body(OURS.get(rest, operator))
        else:
            continue
        _library.impl(rest, body, "PrivateUse1", allow_override=True)


def _matmul_backward(grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of a product: torch has a formula of its own, torch_npu an operator."""
    left, right = self.unsqueeze(0) if self.dim() == 1 else self, other.unsqueeze(1) if other.dim() == 1 else other
    above = grad.unsqueeze(-2) if self.dim() == 1 else grad
    above = above.unsqueeze(-1) if other.dim() == 1 else above
    to_left = (above @ right.mT).sum_to_size(left.shape) if mask[0] else torch.zeros_like(left)
    to_right = (left.mT @ above).sum_to_size(right.shape) if mask[1] else torch.zeros_like(right)
    return to_left.view(self.shape), to_right.view(other.shape)


OURS: dict[str, Callable[..., Any]] = {"matmul_backward": _matmul_backward}
"""Operators that only torch_npu has a kernel for."""


def _returns_view(operator: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in operator._schema.returns)


def _runs_on_cpu(name: str) -> bool:
    """Whether the CPU has a kernel of that name; where it has none, torch_npu's own is made of other operators."""
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _copy(vendors: Any) -> Callable[..., Tensor]:
    """`copy_` between any devices; what is in FRACTAL_NZ goes the vendor's way, which casts it."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        here = [tensor for tensor in (to, source) if tensor.device.type == DEVICE]
        if any(in_fractal_format(tensor) for tensor in here):
            return vendors.call_boxed(keys, to, source, non_blocking)
        plain = [on_cpu(tensor) if tensor.device.type == DEVICE else tensor for tensor in (to, source)]
        plain[0].copy_(plain[1])
        return to

    return copy


def _body(operator: Any) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        values, structure = pytree.tree_flatten((args, kwargs))
        originals: dict[int, Tensor] = {}
        foreign: list[Tensor] = []
        device = torch.device(DEVICE, 0)
        for place, value in enumerate(values):
            if isinstance(value, Tensor) and value.device.type == DEVICE:
                if in_fractal_format(value):
                    raise RuntimeError(f"{operator} got a tensor {tuple(value.shape)} in FRACTAL_NZ: cast it to ND first")
                device, values[place] = value.device, on_cpu(value)
                originals[id(values[place])] = value
            elif isinstance(value, Tensor) and value.dim() and value.device.type == "cpu":
                foreign.append(value)
            elif isinstance(value, torch.device) and value.type == DEVICE:
                device, values[place] = value, torch.device("cpu")
        if foreign and originals:
            shape = tuple(foreign[0].shape)
            raise OtherDevice(f"{operator}: Expected all tensors to be on the same device, and one {shape} is on cpu")
        args, kwargs = pytree.tree_unflatten(values, structure)
        result = operator(*args, **kwargs)
        return pytree.tree_map_only(
            Tensor, lambda out: originals[id(out)] if id(out) in originals else on_device(out, device), result
        )

    return compute
