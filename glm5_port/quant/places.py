"""Where the weights of a checkpoint lie in a model that is trained: in this project's model and in transformers'.

A parameter may hold many weights (the fused experts), and a weight may be spread over two parameters (kv_b_proj).
Only projections are listed: routers, norms, embeddings and the indexer's head weights are never quantised.

Shape legend: E experts, F intermediate width, D hidden; ... any leading dimensions; I inputs of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glm5_port.config import Glm5Config
from glm5_port.errors import InputError
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import PROJECTION, expected_tensors, layer_prefix

ROUTED_EXPERTS = "routed experts"

_ATTENTION = {
    "q_a": "q_a_proj",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "w_uk": "kv_b_proj",
    "w_uv": "kv_b_proj",
    "o": "o_proj",
    "weight": "o_proj",
    "wq_b": "indexer.wq_b",
    "wk": "indexer.wk",
}
"""Argument of an operator in `layer.attention` -> the weight that it is, or is a part of."""

_MLPS = {"mlp.mlp": "mlp.", "mlp.shared": "mlp.shared_experts.", "mlp.experts": "mlp.experts."}
"""Path of a bound operator below its layer -> what the names of its weights begin with."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A checkpoint weight, or a part of one, inside a parameter.

    Attributes:
        weight: its checkpoint name ("....weight").
        index: where it lies in the dimensions before the last; empty for the whole parameter.
    """

    weight: str
    index: tuple[int | slice, ...] = ()


@dataclass(slots=True)
class Place:
    """A parameter that holds weights which can be quantised.

    Attributes:
        name: of the parameter in the model.
        parameter: itself, [..., I].
        uses: (module, attribute) of every layer that computes with it; two forms of attention share theirs.
        pieces: the checkpoint weights in it.
        component: the part of the model that they belong to.
    """

    name: str
    parameter: nn.Parameter
    uses: list[tuple[nn.Module, str]]
    pieces: tuple[Piece, ...]
    component: str


def find_places(model: nn.Module) -> list[Place]:
    """Every parameter of a model whose weights can be quantised, in the order of the layers.

    Args:
        model: a `Glm5Model` built with trainable=True, or a transformers `GlmMoeDsaForCausalLM`.

    Raises:
        InputError: another kind of model, or one built for inference.
    """
    if isinstance(model, Glm5Model):
        if not model.trainable:
            raise InputError(
                "this model was built for inference: its weights may lie in a layout of the chosen implementation.\n"
                "  Build it with trainable=True: weights are then canonical parameters."
            )
        expected = expected_tensors(model.config, mtp=model.mtp is not None)
        found = _glm5_uses(model)
    elif getattr(getattr(model, "config", None), "model_type", None) == "glm_moe_dsa" and hasattr(model, "lm_head"):
        config: Any = model.config
        expected = expected_tensors(Glm5Config.from_dict(config.to_dict()), mtp=False)
        found = _transformers_uses(model)
    else:
        raise InputError(
            f"{type(model).__name__} is not known here\n"
            "  supported: glm5_port's own model (glm5_port.load(..., trainable=True)) and transformers' GlmMoeDsaForCausalLM, "
            "neither of them wrapped"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, Place] = {}
    for module, attribute, parameter, pieces in found:
        spec = expected.get(pieces[0].weight)
        if spec is None or spec.kind != PROJECTION:
            continue
        key = id(parameter)
        place = places.setdefault(key, Place(names[key], parameter, [], pieces, spec.component))
        place.uses.append((module, attribute))
    return list(places.values())


def choose(places: Sequence[Place], *, experts: bool, patterns: Sequence[str]) -> list[Place]:
    """The places whose weights are asked for.

    Args:
        places: all of them.
        experts: whether the routed experts are.
        patterns: regular expressions, looked for in checkpoint names, as `include` of an export.

    Raises:
        InputError: a pattern that is no regular expression or finds nothing, weights that share a parameter (or a weight that
            is spread over two) of which only some were asked for, or nothing at all.
    """
    weights = [piece.weight for place in places for piece in place.pieces]
    chosen = {piece.weight for place in places if experts and place.component == ROUTED_EXPERTS for piece in place.pieces}
    for pattern in patterns:
        try:
            matches = {weight for weight in weights if re.search(pattern, weight)}
        except re.error as error:
            raise InputError(f"{pattern!r} is no regular expression: {error}") from error
        if not matches:
            raise InputError(f"patterns: {pattern!r} finds no projection that can be quantised\n  names look like {weights[0]}")
        chosen |= matches
    result = []
    for place in places:
        missing = [piece.weight for piece in place.pieces if piece.weight not in chosen]
        if not missing:
            result.append(place)
        elif len(missing) < len(place.pieces):
            raise InputError(
                f"patterns: only some of the weights in {place.name} were asked for; {missing[0]} was not.\n"
                "  They are one parameter here and are quantised together: write a pattern that finds all of them, or none."
            )
    if not result:
        raise InputError(
            "nothing would be quantised: "
            + ("this model has no routed experts and there are no patterns" if experts else "experts=False, and no patterns")
        )
    return result


def assemble(parts: Iterable[tuple[Piece, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Checkpoint weights from the pieces of parameters.

    Args:
        parts: each piece with the tensors of its whole parameter ([..., anything]), in order.

    Returns:
        weight -> the tensors, each [out, anything] and contiguous.
    """
    pieces: dict[str, list[dict[str, Tensor]]] = {}
    for piece, tensors in parts:
        pieces.setdefault(piece.weight, []).append({name: tensor[piece.index] for name, tensor in tensors.items()})
    return {weight: {name: _joined([part[name] for part in found]) for name in found[0]} for weight, found in pieces.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """kv_b_proj is w_uk [H, N, I] above w_uv [H, V, I] in every head; everything else is one part already."""
    whole = parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=-2)
    return whole.reshape(-1, whole.shape[-1]).contiguous()


_Use = tuple[nn.Module, str, nn.Parameter, tuple[Piece, ...]]


def _glm5_uses(model: Glm5Model) -> Iterator[_Use]:
    layers = [(layer_prefix(number), layer) for number, layer in enumerate(model.layers)]
    if model.mtp is not None:
        layers.append((layer_prefix(model.config.num_hidden_layers), model.mtp.layer))
    for prefix, layer in layers:
        for path, module in layer.named_modules():
            if not isinstance(module, BoundLayer):
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                if path in _MLPS:
                    yield module, attribute, parameter, _mlp_pieces(prefix + _MLPS[path], attribute, parameter)
                elif path.startswith("attention.") and attribute in _ATTENTION:
                    yield module, attribute, parameter, (Piece(f"{prefix}self_attn.{_ATTENTION[attribute]}.weight"),)


def _transformers_uses(model: nn.Module) -> Iterator[_Use]:
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and isinstance(weight, nn.Parameter):
            yield module, "weight", weight, (Piece(f"{path}.weight"),)
        for attribute in ("gate_up_proj", "down_proj"):
            parameter = module._parameters.get(attribute)
            if isinstance(parameter, nn.Parameter):
                yield module, attribute, parameter, _mlp_pieces(path + ".", attribute.removesuffix("_proj"), parameter)


def _mlp_pieces(prefix: str, attribute: str, parameter: Tensor) -> tuple[Piece, ...]:
    """gate_up [2F, D] or [E, 2F, D] holds gate's rows, then up's; down [D, F] or [E, D, F]."""
    middle = parameter.shape[-2] // 2
    rows: dict[str, tuple[slice, ...]] = (
        {"gate_proj": (slice(0, middle),), "up_proj": (slice(middle, None),)} if attribute == "gate_up" else {"down_proj": ()}
    )
    if parameter.dim() == 2:
        return tuple(Piece(f"{prefix}{name}.weight", index) for name, index in rows.items())
    return tuple(
        Piece(f"{prefix}{expert}.{name}.weight", (expert, *index))
        for expert in range(parameter.shape[0])
        for name, index in rows.items()
    )
