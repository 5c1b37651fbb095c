"""What an INT4 checkpoint is made of: which weights are quantised, and whether names, shapes, dtypes and config.json agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.model.stored_tensors import FLOATS, StoredTensor, StoredTensors
from glm5_port.model.tensors import FLOAT32, PROJECTION, TensorSpec, expected_tensors, layer_prefix
from glm5_port.quant.choice import Choice, choice_of
from glm5_port.quant.files import Reader
from glm5_port.quant.formats import Format, int8_tensors
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.output_files import OutputTensor


@dataclass(slots=True)
class Structure:
    """The quantised weights of a checkpoint.

    Attributes:
        format: they are stored in.
        rule: they are said to follow.
        weights: quantised weight -> its stored tensors by name. Only weights that are whole.
        choice: the options that choose the weights of which any part is stored quantised.
        shapes: weight -> [out, in] as the model expects it.
        int8: weight in INT8 -> its stored tensors: codes, scales, offsets. Only weights that are whole.
        owners: every piece that the model has in this format -> the tensor of the model that it belongs to.
        problems: what does not fit, one sentence each.
    """

    format: Format
    rule: Int4Rule
    weights: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    int8: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check_constants(self, name: str, reader: Reader) -> list[str]:
        """Compares the tensors that do not depend on the values, such as the stored shape."""
        problems = []
        for key, constant in self.format.constants(name, self.shapes[name]).items():
            stored = reader.whole(self.weights[name][key])
            if not torch.equal(stored.to(torch.int64), constant.to(torch.int64)):
                problems.append(f"{key} is {stored.tolist()}; expected {constant.tolist()}")
        return problems


def read_structure(
    config: Glm5Config,
    block: Any,
    stored: StoredTensors,
    rule: Int4Rule,
    output_format: Format,
    *,
    mtp_absent: bool = False,
    check_config: bool = True,
) -> Structure:
    """Finds the quantised weights and compares everything with what the model needs.

    Args:
        config: of the model, without its quantisation.
        block: quantization_config of config.json; None if there is none.
        stored: headers of the files.
        rule: tells the group size.
        output_format: they are stored in.
        mtp_absent: the source had no MTP layer, so none is missing.
        check_config: whether `block` must say what the tensors are.
    """
    structure = Structure(output_format, rule)
    expected = expected_tensors(config, mtp=config.mtp_layer is not None)
    prefix = None if config.mtp_layer is None else layer_prefix(config.mtp_layer)
    quantized = set(structure.format.weights({**stored.tensors, **dict.fromkeys(stored.unreadable)}))
    kept = {name: _kept(structure.format, name, spec, config) for name, spec in expected.items() if name not in quantized}
    if prefix is not None and not _holds_any(prefix, quantized, kept, stored):
        if not mtp_absent:
            structure.problems.append(f"the MTP layer is missing: config.json announces it, and no tensor {prefix}* is stored")
        expected = {name: spec for name, spec in expected.items() if not name.startswith(prefix)}
    for name in sorted(quantized - set(expected)):
        structure.problems.append(f"{name} is quantised and is no weight of this model")
    for name, spec in expected.items():
        if name in quantized:
            _add_weight(structure, name, spec, stored)
        elif name in stored.tensors and stored.tensors[name].dtype == "I8" and structure.format.is_int8(name):
            outputs = int8_tensors(name, spec.shape)
            structure.owners |= {output.name: name for output in outputs}
            if parts := _whole(structure, outputs, stored, f"an INT8 weight {list(spec.shape)}"):
                structure.int8[name] = parts
        else:
            structure.owners |= {output.name: name for output in kept[name]}
            for output in kept[name]:
                _check_plain(structure, output, stored)
    structure.choice = choice_of(expected, quantized, prefix)
    if check_config:
        modules: dict[bool, list[str]] = {True: [], False: []}
        for name, spec in expected.items():
            if name.endswith(".weight") and len(spec.shape) == 2 and spec.component != "embedding":
                modules[name in quantized].append(name.removesuffix(".weight"))
        structure.problems += structure.format.config_problems(block, rule, modules[True], modules[False], config.mtp_layer)
    return structure


def _kept(output_format: Format, name: str, spec: TensorSpec, config: Glm5Config) -> tuple[OutputTensor, ...]:
    """The pieces of a tensor that is not quantised; "BF16" stands for any float."""
    whole = OutputTensor.of(name, "F32" if spec.kind == FLOAT32 else "BF16", spec.shape)
    return output_format.container.kept(name, StoredTensor(whole.shape, whole.dtype, "", whole.bytes, 0), config).outputs


def _holds_any(prefix: str, quantized: set[str], kept: Mapping[str, tuple[OutputTensor, ...]], stored: StoredTensors) -> bool:
    """Whether any tensor of a layer is stored, in whatever form."""
    pieces = {output.name for name, outputs in kept.items() if name.startswith(prefix) for output in outputs}
    there = (*stored.tensors, *stored.unreadable)
    return any(name.startswith(prefix) for name in (*quantized, *there)) or any(name in pieces for name in there)


def _add_weight(structure: Structure, name: str, spec: TensorSpec, stored: StoredTensors) -> None:
    """Checks the tensors of one quantised weight."""
    if spec.kind != PROJECTION:
        structure.problems.append(f"{name} is quantised; {spec.component} must not be")
        return
    try:
        outputs = structure.format.tensors(name, spec.shape, structure.rule)
    except InputError as error:
        structure.problems.append(str(error).splitlines()[0])
        return
    structure.owners |= {output.name: name for output in outputs}
    if name in stored.tensors and all(output.name != name for output in outputs):
        structure.problems.append(f"{name} is stored both quantised and as it was")
    what = f"a weight {list(spec.shape)} in groups of {structure.rule.group_size}"
    if parts := _whole(structure, outputs, stored, what):
        structure.weights[name] = parts
        structure.shapes[name] = spec.shape


def _whole(
    structure: Structure, outputs: tuple[OutputTensor, ...], stored: StoredTensors, what: str
) -> dict[str, StoredTensor] | None:
    """The stored tensors of one weight; None, and problems, unless all are as they should be."""
    whole = True
    for output in outputs:
        tensor = stored.tensors.get(output.name)
        if tensor is None:
            whole = False
            if output.name not in stored.unreadable:
                structure.problems.append(f"{output.name} is missing")
        elif tensor.shape != output.shape:
            whole = False
            structure.problems.append(f"{output.name} is {list(tensor.shape)}; {what} has {list(output.shape)}")
        elif tensor.dtype != output.dtype and not (output.dtype == "I32" and tensor.dtype == "I64"):
            whole = False
            structure.problems.append(f"{output.name} is stored as {tensor.dtype}; expected {output.dtype}")
    return {output.name: stored.tensors[output.name] for output in outputs} if whole else None


def _check_plain(structure: Structure, expected: OutputTensor, stored: StoredTensors) -> None:
    """Checks a piece of a tensor that is not quantised."""
    name, tensor = expected.name, stored.tensors.get(expected.name)
    if tensor is None:
        if name not in stored.unreadable:
            structure.problems.append(f"{name} is missing")
    elif tensor.shape != expected.shape:
        structure.problems.append(f"{name} is {list(tensor.shape)}; expected {list(expected.shape)}")
    elif tensor.dtype not in (("F32",) if expected.dtype == "F32" else FLOATS):
        structure.problems.append(f"{name} is stored as {tensor.dtype}; expected {expected.dtype}")
