"""INT4-aware training: forward passes compute with bf16(q * s), gradients go straight through to float32 masters.

    fake_quantize      the value that INT4 leaves of a master, as a differentiable function
    prepare_qat        lets the weights of a model pass through it; remove_qat takes it away again
    quantised_state    the codes and scales that the last forward pass computed with, by checkpoint name
    canonical_tensors  the same as the tensors of a compressed-tensors checkpoint
    kl_to_teacher      a loss that keeps the quantised model at the distribution of the full-precision one

There is one quantiser (`glm5_port.quant.int4`): training keeps the very codes and scales that it computed with, and those
are what ships.

With learned scales (LSQ, `glm5_port.quant.learned_scales`) every group's scale is a float32 parameter too.

Shape legend: ... any leading dimensions; I inputs of a row; g weights of a group; V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from glm5_port.errors import InputError
from glm5_port.model.bindings import BoundLayer
from glm5_port.quant.fake_quantize import FakeQuantize, Record, check_master, fake_quantize, record_of
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE, CompressedTensors
from glm5_port.quant.int4 import AMAX7, LEARNED, Int4Rule
from glm5_port.quant.packing import CODES_PER_WORD
from glm5_port.quant.places import assemble, choose, find_places

__all__ = [
    "FakeQuantize",
    "Prepared",
    "canonical_tensors",
    "check_current",
    "fake_quantize",
    "kl_to_teacher",
    "prepare_qat",
    "quantised_state",
    "remove_qat",
    "requantise",
    "rule_of_model",
    "scale_parameters",
]


# --- models ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare_qat` prepared.

    Attributes:
        rule: of all of them.
        learned_scales: whether scales are parameters.
        parameters: names in the model.
        weights: checkpoint names of the matrices in them.
        elements: how many numbers they are.
        components: part of the model -> how many matrices.
    """

    rule: Int4Rule
    learned_scales: bool
    parameters: tuple[str, ...]
    weights: tuple[str, ...]
    elements: int
    components: Mapping[str, int]

    def __str__(self) -> str:
        parts = ", ".join(f"{count:,} of the {component}" for component, count in self.components.items())
        scales = "learned scales" if self.learned_scales else "scales by the rule"
        return (
            f"INT4-aware training of {len(self.weights):,} matrices ({parts}) in {len(self.parameters):,} parameters, "
            f"{self.elements:,} weights: {self.rule}, {scales}"
        )


def prepare_qat(
    model: nn.Module,
    *,
    rule: Int4Rule = AMAX7,
    experts: bool = True,
    patterns: Sequence[str] = (),
    learned_scales: bool = False,
    convert_masters: bool = False,
) -> Prepared:
    """Lets weights of a model pass through `fake_quantize` in every forward pass. Parameters keep their names, and stay what
    optimizers, checkpoints of the training and gradient clipping see.

    Args:
        model: this project's, built with trainable=True, or transformers' `GlmMoeDsaForCausalLM`; float32.
        rule: how weights are quantised; recorded with the export.
        experts: prepares the routed experts.
        patterns: regular expressions; projections whose checkpoint name one of them finds are prepared as well. The same
            expressions are the `include` of an export.
        learned_scales: makes the scales float32 parameters (`scale_parameters`), beginning at the rule's. Give them a
            learning rate well below their own size, and no weight decay.
        convert_masters: turns bfloat16 parameters into float32 masters; layers still compute in bfloat16. Do it before an
            optimizer is made.

    Returns:
        What was prepared.

    Raises:
        InputError: a model of another kind, nothing to prepare or prepared already, a pattern that finds nothing, masters that
            are not float32, a group size that does not divide, or weights that are NaN, infinite or above 2^127. The model is
            then as it was.
    """
    if any(True for _ in _prepared_weights(model)):
        raise InputError("this model is prepared already: remove_qat(model) first, then prepare everything in one call")
    places = choose(find_places(model), experts=experts, patterns=patterns)
    if learned_scales and rule.name == "signed8":
        raise InputError("learned scales are positive, those of rule signed8 are not; begin with amax7 or mse")
    dtypes = [place.parameter.dtype for place in places]
    modules = []
    for place, dtype in zip(places, dtypes, strict=True):
        master = place.parameter.detach()
        if convert_masters and dtype == torch.bfloat16:
            master = master.to(torch.float32)
        check_master(master.dtype, dtype, place.name)
        record = record_of(master, None, rule, place.name)
        modules.append(
            FakeQuantize(place.name, rule, dtype, place.pieces, Record(None, record.packed, record.scales), learned_scales)
        )
    for place, module in zip(places, modules, strict=True):
        if place.parameter.dtype != torch.float32:
            place.parameter.data = place.parameter.data.to(torch.float32)
            place.parameter.grad = None
        for owner, attribute in place.uses:
            _attach(owner, attribute, module)
    weights = {piece.weight: place.component for place in places for piece in place.pieces}
    components = {component: list(weights.values()).count(component) for component in dict.fromkeys(weights.values())}
    return Prepared(
        rule=rule,
        learned_scales=learned_scales,
        parameters=tuple(place.name for place in places),
        weights=tuple(weights),
        elements=sum(place.parameter.numel() for place in places),
        components=components,
    )


def remove_qat(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Makes a model compute with its masters again, in the dtype that its layers had.

    Returns:
        `quantised_state` as it was.
    """
    state = quantised_state(model)
    for owner, attribute, module in list(_uses(model)):
        parameter = owner._parameters[attribute]
        _attach(owner, attribute, None)
        if parameter is not None and parameter.dtype != module.dtype:
            parameter.data = parameter.data.to(module.dtype)
            parameter.grad = None
    return state


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales of a prepared model, for a parameter group of their own."""
    return [module.scales for module in _prepared_weights(model) if module.scales is not None]


def requantise(model: nn.Module) -> None:
    """Makes codes and scales of the masters as they are now, as the next forward pass would; for masters that were written
    through `.data`, which torch does not see, or to ship the last optimizer step without a forward pass.

    Raises:
        InputError: the model is not prepared, or a master holds NaN or an infinity.
    """
    _require_prepared(model)
    for owner, attribute, module in _uses(model):
        master = owner._parameters[attribute]
        if master is not None:
            module.record = record_of(master, module.scales, module.rule, module.name)


def rule_of_model(model: nn.Module) -> Int4Rule:
    """The rule of what a prepared model computes with: its own, or "learned" where scales are trained.

    Raises:
        InputError: the model is not prepared.
    """
    _require_prepared(model)
    first = next(_prepared_weights(model))
    return first.rule if first.scales is None else Int4Rule(LEARNED, first.rule.group_size)


def check_current(model: nn.Module) -> None:
    """Refuses codes and scales that are not those of the masters as they are now.

    Raises:
        InputError: the model is not prepared, or an optimizer step came after its last forward pass; names a parameter.
    """
    _require_prepared(model)
    for owner, attribute, module in _uses(model):
        master, record = owner._parameters[attribute], module.record
        if master is not None and record is not None:
            now = record_of(master, module.scales, module.rule, module.name)
            if not (torch.equal(now.packed, record.packed) and torch.equal(now.scales, record.scales)):
                raise InputError(
                    f"{module.name} changed after the last forward pass: what would ship is not what was computed with\n"
                    "  Evaluate the model once more (which also says how good it is), or call requantise(model)."
                )


def quantised_state(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The codes and scales that the last forward pass computed with. An optimizer step after it is not in them: pass
    something through the model (the evaluation that one wants to have shipped), or call `requantise`.

    Returns:
        checkpoint name ("....weight") -> (packed [out, in / 8] int32, scales [out, in / g] bfloat16). Weights that no forward
        pass has used (an MTP layer that is not trained) are those of the preparation.

    Raises:
        InputError: the model is not prepared.
    """
    _require_prepared(model)
    parts = (
        (piece, {"packed": module.record.packed, "scales": module.record.scales})
        for module in _prepared_weights(model)
        if module.record is not None
        for piece in module.pieces
    )
    return {weight: (found["packed"], found["scales"]) for weight, found in assemble(parts).items()}


def canonical_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`quantised_state` as the tensors of a compressed-tensors `pack-quantized` checkpoint: what an export writes in place of
    each weight.

    Returns:
        (name, tensor): "....weight_packed" int32, "....weight_scale" bfloat16 and "....weight_shape" int32, in turn.
    """
    layout = CompressedTensors()
    for weight, (packed, scales) in quantised_state(model).items():
        yield weight + PACKED, packed
        yield weight + SCALE, scales
        yield from layout.constants(weight, (packed.shape[0], packed.shape[1] * CODES_PER_WORD)).items()


def _require_prepared(model: nn.Module) -> None:
    if not any(True for _ in _prepared_weights(model)):
        raise InputError("this model is not prepared: call prepare_qat(model) first")


def _prepared_weights(model: nn.Module) -> Iterator[FakeQuantize]:
    return (module for module in model.modules() if isinstance(module, FakeQuantize))


def _uses(model: nn.Module) -> Iterator[tuple[nn.Module, str, FakeQuantize]]:
    """(layer, parameter name, what the parameter passes through)."""
    for owner in model.modules():
        found = owner.transforms if isinstance(owner, BoundLayer) else getattr(owner, "_int4_modules", {})
        for attribute, module in list(found.items()):
            if isinstance(module, FakeQuantize):
                yield owner, attribute, module


# --- where a weight enters a layer -----------------------------------------------------------------------------------------


def _attach(owner: nn.Module, attribute: str, module: FakeQuantize | None) -> None:
    """Lets a weight pass through a module, or no longer (None)."""
    if isinstance(owner, BoundLayer):
        owner.transform(attribute, module)
        return
    modules = dict(getattr(owner, "_int4_modules", {}))
    if modules:
        owner.__class__ = type(owner).__bases__[0]
    if module is None:
        del modules[attribute]
        delattr(owner, f"{attribute}_int4")
    else:
        modules[attribute] = module
        owner.add_module(f"{attribute}_int4", module)
    owner.__dict__["_int4_modules"] = modules
    if modules:
        owner.__class__ = _quantising(type(owner), tuple(modules))  # type: ignore[arg-type]  # mypy: a class is hashable


@functools.cache
def _quantising(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A layer's class whose `forward` sees quantised weights under the names of its parameters. Everybody else sees the
    masters, and each weight is quantised once however often the layer reads it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._int4_values = {name: getattr(self, f"{name}_int4")(self._parameters[name]) for name in names}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self._int4_values = {}

    def weight(name: str) -> property:
        return property(lambda self: self._int4_values.get(name, self._parameters[name]))

    members = {"forward": forward, "_int4_values": MappingProxyType({}), "__module__": base.__module__}
    return type(base.__name__, (base,), members | {name: weight(name) for name in names})


# --- the loss --------------------------------------------------------------------------------------------------------------


def kl_to_teacher(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of temperature^2 * KL(teacher || student), both softened:

        p = softmax(teacher / temperature)    KL = sum over the vocabulary of p * (log p - log softmax(student / temperature))

    Args:
        student_logits: [..., V], of the quantised model.
        teacher_logits: [..., V], of the full-precision one; no gradient flows into them.
        temperature: above 1 weighs unlikely tokens more; its square keeps the size of gradients.
        mask: [...] bool, True where a token counts; None counts all. Logits of other tokens may be anything.

    Returns:
        [] float32 (float64 of float64 logits); 0 where the mask leaves no token.

    Raises:
        InputError: shapes that differ, a mask that is not bool, or a temperature that is not positive.

    Source: Hinton et al., arXiv 1503.02531.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise InputError(f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != student_logits.shape[:-1]):
        raise InputError(f"mask is {tuple(mask.shape)} {mask.dtype}; takes bool {tuple(student_logits.shape[:-1])}")
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits, teacher_logits.detach()
    count: Tensor | int = max(1, student.shape[:-1].numel())
    if mask is not None:
        student, teacher = (logits.masked_fill(~mask.unsqueeze(-1), 0.0) for logits in (student, teacher))
        count = mask.sum().clamp(min=1)
    student = torch.log_softmax(student.to(wide) / temperature, dim=-1)
    teacher = torch.log_softmax(teacher.to(wide) / temperature, dim=-1)
    chances = teacher.exp()
    terms = (chances * (teacher - student)).masked_fill(chances == 0, 0.0)
    return terms.sum() * temperature**2 / count
