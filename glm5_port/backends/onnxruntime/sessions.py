"""Sessions of ONNX Runtime: one node graph around weights that stay in torch's memory.

A session belongs to a prepared weight: built at the first call with it, and gone when the weight goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from glm5_port.backends.onnxruntime import CPU, providers

OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
DOMAIN = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Session:
    """A session and the memory of its weights."""

    session: Any
    values: list[Any]

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The only output, for float32 inputs by name."""
        fed = {name: x.detach().to(torch.float32).contiguous().numpy() for name, x in inputs.items()}
        return torch.from_numpy(self.session.run(None, fed)[0])


def build(nodes: Sequence[Any], inputs: Mapping[str, int], width_out: int, weights: Mapping[str, Tensor]) -> Session:
    """A session of float32 rows.

    Args:
        nodes: of the graph, from inputs and weights by name to "y".
        inputs: name -> width of its rows.
        width_out: of the rows of "y".
        weights: uint8 or float32 tensors, contiguous; read where they are, never copied into a model.

    Raises:
        onnxruntime's error when no provider that was asked for has a kernel for a node.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    def rows(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])

    initializers = [_declared(name, weight) for name, weight in weights.items()]
    signature = [rows(name, width) for name, width in inputs.items()]
    graph = helper.make_graph(list(nodes), "glm5_port", signature, [rows("y", width_out)], initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, MICROSOFT_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    # detach(): an array keeps the tensor object that it came from alive, and a session must not keep its own key.
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weight.detach().numpy()) for weight in weights.values()]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_external_initializers(list(weights), values)
    if CPU not in (asked := providers()):
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=asked)
    session.disable_fallback()
    return Session(session, values)


def _declared(name: str, weight: Tensor) -> Any:
    """An initializer without data, which the session gets from memory."""
    from onnx import TensorProto, helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(str(weight.dtype).removeprefix("torch.")))
    declared = TensorProto(name=name, data_type=kind, dims=list(weight.shape), data_location=TensorProto.EXTERNAL)
    declared.external_data.add(key="location", value="memory")
    return declared


_sessions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def session_of(weight: Tensor, make: Callable[[], Session]) -> Session:
    """The session that belongs to a prepared weight, made the first time."""
    if weight not in _sessions:
        _sessions[weight] = make()
    return _sessions[weight]
