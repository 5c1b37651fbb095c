"""Building ONNX graphs: nodes by short calls, initializers that lie in data files, and the small compositions that GLM-5 repeats.

Every value is float32; the initializers keep the dtype of their file and are cast where they are used, which ONNX Runtime does
once, when it loads the graph. Only operators of the standard set and, for INT4 weights, `MatMulNBits` and `QMoE`.

Shape legend: T rows; D width; P rotated pairs; N, K outputs and inputs of a weight; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glm5_port.backends.onnxruntime.sessions import DOMAIN, IR_VERSION, MICROSOFT_OPSET, OPSET
from glm5_port.errors import CheckpointError, InputError
from glm5_port.quant.formats.onnx_data import CODES, NIBBLES, SCALES, DataFile, Initializer

_KINDS = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "U8": "UINT8"}
_ZERO_CODE = 8
"""What a code of 0 is stored as."""


def onnx_module() -> Any:
    """The onnx package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import onnx
        import onnx.helper
    except ImportError as error:
        raise InputError("onnx is not installed: pip install 'glm5_port[onnx]'") from error
    return onnx


class Graph:
    """A graph that grows. Methods that add nodes take and return names of values."""

    def __init__(self, files: Iterable[DataFile]) -> None:
        self._onnx = onnx_module()
        self.float32 = self._onnx.TensorProto.FLOAT
        self._stored = {initializer.name: initializer for file in files for initializer in file.initializers}
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._made: dict[tuple[Any, ...], str] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def node(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds a node; the name of its output, or a tuple of names. Inputs left out are ""."""
        names = [f"{kind}_{len(self._nodes)}" + (f"_{place}" if outputs > 1 else "") for place in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def add_node(self, node: Any) -> str:
        """Adds a node that was made elsewhere; the name of its only output."""
        self._nodes.append(node)
        return str(node.output[0])

    def once(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """As `node`, but the same node is added once."""
        key = (kind, inputs, tuple(sorted(attributes.items())))
        if key not in self._made:
            self._made[key] = self.node(kind, *inputs, **attributes)
        return self._made[key]

    def numbers(self, values: Sequence[int] | int) -> str:
        """A constant of int64: a vector, or a scalar."""
        return self._constant(np.array(values, dtype=np.int64))

    def floats(self, values: Any) -> str:
        """A constant of float32."""
        return self._constant(np.array(values, dtype=np.float32))

    def filled(self, like: str, value: float) -> str:
        """A number in the shape of a value."""
        number = self._onnx.numpy_helper.from_array(np.array([value], dtype=np.float32))
        return str(self.node("ConstantOfShape", self.node("Shape", like), value=number))

    def _constant(self, array: np.ndarray) -> str:
        key = ("constant", str(array.dtype), array.shape, array.tobytes())
        if key not in self._made:
            name = self._made[key] = f"constant_{len(self._initializers)}"
            self._initializers[name] = self._onnx.numpy_helper.from_array(array, name)
        return self._made[key]

    # -- ends ----------------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int | str], *, integers: bool = False) -> str:
        """Declares an input of float32, or of int64."""
        self._inputs.append(self._end(name, shape, integers))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """Declares a value of float32 as output under a name of its own."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))
        self._outputs.append(self._end(name, shape, False))

    def _end(self, name: str, shape: Sequence[int | str], integers: bool) -> Any:
        kind = self._onnx.TensorProto.INT64 if integers else self.float32
        return self._onnx.helper.make_tensor_value_info(name, kind, list(shape))

    def serialised(self, name: str, notes: Mapping[str, str]) -> bytes:
        """The model: what lies in data files is referred to, not held.

        Args:
            name: of the graph.
            notes: metadata for people.
        """
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, MICROSOFT_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="glm5_port")
        helper.set_model_props(model, dict(notes))
        return bytes(model.SerializeToString(deterministic=True))

    # -- weights -------------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether an initializer of this name lies in a file."""
        return name in self._stored

    def stored(self, name: str) -> str:
        """An initializer in the dtype of its file."""
        if name not in self._stored:
            raise CheckpointError(f"onnx: no data file holds {name}")
        if name not in self._initializers:
            self._initializers[name] = self._declared(self._stored[name])
        return name

    def weight(self, name: str) -> str:
        """A weight [N, K] or a vector in float32; an INT4 weight as q * s."""
        if self.has(name + CODES):
            return self._decoded(name)
        value = self.stored(name)
        return value if self._stored[name].dtype == "F32" else self.once("Cast", value, to=self.float32)

    def rows(self, name: str, ids: str) -> str:
        """Some rows of a weight, in float32: only they are cast."""
        if self.has(name + CODES):
            return str(self.node("Gather", self._decoded(name), ids))
        return str(self.node("Cast", self.node("Gather", self.stored(name), ids), to=self.float32))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of an initializer in a file."""
        return self._stored[name].shape

    def _declared(self, initializer: Initializer) -> Any:
        proto = self._onnx.TensorProto
        kind = getattr(proto, _KINDS[initializer.dtype])
        declared = proto(name=initializer.name, data_type=kind, dims=list(initializer.shape), data_location=proto.EXTERNAL)
        place = {"location": initializer.file, "offset": initializer.first, "length": initializer.bytes}
        for key, value in place.items():
            declared.external_data.add(key=key, value=str(value))
        return declared

    def _decoded(self, name: str) -> str:
        """q * s of an INT4 weight [N, K]: the same bytes seen as UINT4, of which 8 is zero."""
        rows, blocks, half = self.shape_of(name + CODES)
        nibbles = name + NIBBLES
        if nibbles not in self._initializers:
            declared = self._declared(self._stored[name + CODES])
            declared.name, declared.data_type = nibbles, self._onnx.TensorProto.UINT4
            del declared.dims[:]
            declared.dims.extend([rows, blocks, 2 * half])
            self._initializers[nibbles] = declared
        stored = self.once("Cast", nibbles, to=self.float32)
        codes = self.once("Sub", stored, self.floats(_ZERO_CODE))
        scales = self.once("Unsqueeze", self.weight(name + SCALES), self.numbers([-1]))
        return self.once("Reshape", self.once("Mul", codes, scales), self.numbers([rows, blocks * 2 * half]))

    # -- compositions --------------------------------------------------------------------------------------------------

    def linear(self, x: str, name: str) -> str:
        """x W^T of rows [T, K]; `MatMulNBits` where W is INT4."""
        if not self.has(name + CODES):
            return str(self.node("Gemm", x, self.weight(name), transB=1))
        rows, blocks, half = self.shape_of(name + CODES)
        sizes = {"K": blocks * half * 2, "N": rows, "bits": 4, "block_size": half * 2, "accuracy_level": 0}
        weights = (self.stored(name + CODES), self.weight(name + SCALES))
        return str(self.node("MatMulNBits", x, *weights, domain=DOMAIN, **sizes))

    def rms_norm(self, x: str, name: str, eps: float) -> str:
        """weight * x * (mean(x^2) + eps)^(-1/2) over the last dimension."""
        mean = self.node("ReduceMean", self.node("Mul", x, x), self.numbers([-1]), keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.floats(eps)))
        return str(self.node("Mul", self.node("Div", x, root), self.weight(name)))

    def sigmoid(self, x: str) -> str:
        """1 / (1 + e^-x). Not `Sigmoid`: ONNX Runtime's is off by 1e-7 of one, which is much of a small affinity."""
        exponential = self.node("Exp", self.node("Neg", x))
        return str(self.node("Reciprocal", self.node("Add", exponential, self.floats(1.0))))

    def gated(self, gate: str, up: str) -> str:
        """silu(gate) * up."""
        return str(self.node("Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), up))

    def mlp(self, x: str, prefix: str) -> str:
        """silu(x gate^T) * (x up^T) down^T of rows [T, D]."""
        gate, up = (self.linear(x, f"{prefix}{projection}_proj.weight") for projection in ("gate", "up"))
        return self.linear(self.gated(gate, up), f"{prefix}down_proj.weight")

    def reshape(self, x: str, leading: str, sizes: Sequence[int]) -> str:
        """x with the leading dimensions of a shape value, then fixed ones."""
        return str(self.node("Reshape", x, self.once("Concat", leading, self.numbers(sizes), axis=0)))

    def cut(self, x: str, sizes: Sequence[int]) -> tuple[str, ...]:
        """Parts of the last dimension."""
        return tuple(self.node("Split", x, self.numbers(sizes), outputs=len(sizes), axis=-1))

    def rotate(self, x: str, angles: tuple[str, str], sizes: tuple[int, int], *, interleaved: bool) -> str:
        """(a, b) -> (a cos - b sin, b cos + a sin) of the first channels of every head.

        Args:
            x: [..., channels].
            angles: cosine and sine, [..., P].
            sizes: rotated channels 2 P, and the others.
            interleaved: pairs (2i, 2i + 1), else (i, i + P).
        """
        cos, sin = angles
        turned, rest = (x, None) if sizes[1] == 0 else self.cut(x, sizes)
        if interleaved:
            pairs = self.node("Reshape", turned, self.numbers([0, 0, 0, sizes[0] // 2, 2]))
            first, second = (self.node("Squeeze", part, self.numbers([-1])) for part in self.cut(pairs, [1, 1]))
        else:
            first, second = self.cut(turned, [sizes[0] // 2] * 2)
        one = self.node("Sub", self.node("Mul", first, cos), self.node("Mul", second, sin))
        two = self.node("Add", self.node("Mul", second, cos), self.node("Mul", first, sin))
        if interleaved:
            last = self.numbers([-1])
            both = self.node("Concat", self.node("Unsqueeze", one, last), self.node("Unsqueeze", two, last), axis=-1)
            joined = self.node("Reshape", both, self.numbers([0, 0, 0, sizes[0]]))
        else:
            joined = self.node("Concat", one, two, axis=-1)
        return str(joined if rest is None else self.node("Concat", joined, rest, axis=-1))
