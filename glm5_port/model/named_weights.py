"""A trained model's weights under their checkpoint names, one at a time: the inverse of `glm5_port.model.weights`.

What a model does not hold (an MTP layer that was not loaded, indexers where attention is dense) is read from the checkpoint that
it came from.

Shape legend: E experts; F intermediate width; D hidden; H heads; N nope and V value part of a head; C latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm5_port.config import Glm5Config
from glm5_port.errors import CheckpointError, InputError, did_you_mean
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.build import stored_dtype
from glm5_port.model.checkpoint import Checkpoint
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.layers import DecoderLayer, DenseMlp, MoeMlp
from glm5_port.model.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, TensorSpec, expected_tensors, layer_prefix

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""What checkpoints are written in, and what safetensors calls it."""

Held = Iterator[tuple[str, Callable[[], Tensor]]]
"""(checkpoint name, what gives the tensor): views of parameters where that is possible."""


class NamedWeights:
    """Every tensor of the checkpoint that a model would be written as.

    Args:
        model: this project's, built with trainable=True, or transformers' `GlmMoeDsaForCausalLM`.
        source: directory of the checkpoint that it came from; None takes the one that `load` read it from, if any.
        dtype: of what `tensor` gives; None is that of the model. The routers' correction biases are float32 always.

    Attributes:
        config: of the model, without any quantisation.
        specs: name -> TensorSpec, in the order of the layers.
        source: the directory, or None.
        carried: names that are read from the source.

    Raises:
        InputError: a model of another kind or built for inference, a dtype that checkpoints do not have, or tensors that neither
            the model nor a source holds.
        ConfigError, CheckpointError: the source is no whole checkpoint of this model.
    """

    def __init__(
        self, model: nn.Module, *, source: str | PathLike[str] | None = None, dtype: torch.dtype | str | None = None
    ) -> None:
        self.config, held = _held(model)
        self.dtype = _written_dtype(dtype or next(model.parameters()).dtype)
        self.source = Path(source) if source is not None else getattr(model, "source", None)
        self._held = dict(held)
        self._checkpoint = None if self.source is None else _opened(self.source, self.config)
        self.specs = dict(self._specs())
        self.carried = tuple(name for name in self.specs if name not in self._held)

    def tensor(self, name: str) -> Tensor:
        """One tensor, contiguous, on the CPU.

        Raises:
            InputError: it holds NaN or infinity in this dtype.
        """
        dtype = stored_dtype(name, self.dtype)
        if name in self._held:
            tensor = self._held[name]().detach().to("cpu", dtype).contiguous()
        elif self._checkpoint is not None:
            tensor = self._checkpoint.tensor(name, dtype)
        if not tensor.isfinite().all():
            index = [int(i) for i in (~tensor.isfinite()).nonzero()[0]]
            raise InputError(
                f"{name}{index} is {tensor[tuple(index)].item()} in {str(dtype).removeprefix('torch.')}: nothing is written\n"
                "  The training that made it is broken, or this dtype is too narrow for it."
            )
        return tensor

    def masters(self, name: str) -> Tensor:
        """One tensor as the model holds it (in float32 where it comes from the source), on the CPU."""
        if name in self._held:
            return self._held[name]().detach().cpu().contiguous()
        return self.tensor(name)

    def _specs(self) -> Iterator[tuple[str, TensorSpec]]:
        """What is written: an MTP layer if the model or its source has one, everything else in any case."""
        mtp = self.config.mtp_layer is not None
        prefix = layer_prefix(self.config.num_hidden_layers)
        lacking = []
        for name, spec in expected_tensors(self.config, mtp=mtp).items():
            if name in self._held or (self._checkpoint is not None and name in self._checkpoint.tensors):
                yield name, spec
            elif not name.startswith(prefix):
                lacking.append(name)
        if lacking:
            raise InputError(
                f"this model does not hold {len(lacking):,} tensors of its checkpoint, for example {lacking[0]}\n"
                "  A model with max_context at or below index_topk has no indexers. Give source=, the checkpoint it came from."
            )


def _written_dtype(asked: torch.dtype | str) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    name = str(asked).removeprefix("torch.")
    if name not in known:
        raise InputError(f"dtype={name}: no dtype of checkpoints{did_you_mean(name, known)}\n  supported: {', '.join(known)}")
    return known[name]


def _opened(source: Path, config: Glm5Config) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    checkpoint.check(expected_tensors(checkpoint.config, mtp=checkpoint.has_mtp))
    ours, theirs = expected_tensors(config, mtp=False), expected_tensors(without_storage(checkpoint.config), mtp=False)
    if ours != theirs or checkpoint.config.int4 is not None or checkpoint.config.int8 is not None:
        raise CheckpointError(f"{source} is not the checkpoint that this model came from: its tensors have other names or shapes")
    return checkpoint


def without_storage(config: Glm5Config) -> Glm5Config:
    """The config of the same model in floating point."""
    return dataclasses.replace(config, quantization=None, int4=None, int8=None)


def _held(model: nn.Module) -> tuple[Glm5Config, Held]:
    if isinstance(model, Glm5Model):
        if not model.trainable:
            raise InputError(
                "this model was built for inference: its weights may lie in a layout of the chosen implementation.\n"
                "  Build it with trainable=True: weights are then canonical parameters."
            )
        return without_storage(model.config), _glm5(model)
    if getattr(getattr(model, "config", None), "model_type", None) == "glm_moe_dsa" and hasattr(model, "lm_head"):
        described: Any = model.config
        config = without_storage(Glm5Config.from_dict(described.to_dict()))
        return config, _transformers(model, config)
    raise InputError(
        f"{type(model).__name__} is not known here\n"
        "  supported: glm5_port's own model (glm5_port.load(..., trainable=True)) and transformers' GlmMoeDsaForCausalLM, "
        "neither of them wrapped"
    )


# -- this project's model ----------------------------------------------------------------------------------------------------


def _glm5(model: Glm5Model) -> Held:
    if not model.ranks.alone or model.norm is None or model.head is None:
        raise InputError("this model is shared by several ranks, and this one holds a part of it\n  Load it without a plan.")
    yield EMBEDDING, lambda: _parameter(model, "embedding")
    for number, layer in enumerate(model.layers):
        yield from _layer(layer, layer_prefix(number))  # type: ignore[arg-type]
    norm, head = model.norm.add_norm, model.head
    yield FINAL_NORM, lambda: _parameter(norm, "weight")
    yield LM_HEAD, lambda: _parameter(head, "weight")
    if (mtp := model.mtp) is not None:
        prefix = layer_prefix(model.config.num_hidden_layers)
        yield from _layer(mtp.layer, prefix)
        yield f"{prefix}enorm.weight", lambda: _parameter(mtp.embedding_norm, "weight")
        yield f"{prefix}hnorm.weight", lambda: _parameter(mtp.hidden_norm, "weight")
        yield f"{prefix}eh_proj.weight", lambda: _parameter(mtp.join, "weight")
        yield f"{prefix}shared_head.norm.weight", lambda: _parameter(mtp.norm.add_norm, "weight")


_QUERIES = {
    "q_a_proj": "q_a",
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_a_layernorm": "kv_a_norm",
}
_INDEXER = {
    "wq_b.weight": "wq_b",
    "wk.weight": "wk",
    "k_norm.weight": "k_norm_weight",
    "k_norm.bias": "k_norm_bias",
    "weights_proj.weight": "weights_proj",
}


def _layer(layer: DecoderLayer, prefix: str) -> Held:
    attention, mlp = layer.attention, layer.mlp
    yield f"{prefix}input_layernorm.weight", lambda: _parameter(layer.input_norm.add_norm, "weight")
    yield f"{prefix}post_attention_layernorm.weight", lambda: _parameter(layer.attention_norm.add_norm, "weight")
    for name, argument in _QUERIES.items():
        yield f"{prefix}self_attn.{name}.weight", lambda a=argument: _parameter(attention.prologue, a)  # type: ignore[misc]
    yield f"{prefix}self_attn.kv_b_proj.weight", lambda: _join_kv_b(attention.prologue, attention.output)
    yield f"{prefix}self_attn.o_proj.weight", lambda: _parameter(attention.output, "o")
    indexer = getattr(attention, "indexer", None)
    if indexer is not None:
        for name, argument in _INDEXER.items():
            yield f"{prefix}self_attn.indexer.{name}", lambda a=argument: _parameter(indexer.project, a)  # type: ignore[misc]
    if isinstance(mlp, DenseMlp):
        yield from _gated_mlp(mlp.mlp, f"{prefix}mlp.")
    elif isinstance(mlp, MoeMlp):
        route, experts = mlp.route, mlp.experts
        yield f"{prefix}mlp.gate.weight", lambda: _parameter(route, "gate")
        yield f"{prefix}mlp.gate.e_score_correction_bias", lambda: _parameter(route, "correction_bias")
        yield from _gated_mlp(mlp.shared, f"{prefix}mlp.shared_experts.")
        for expert in range(_parameter(experts, "down").shape[0]):
            yield from _gated_mlp(experts, f"{prefix}mlp.experts.{expert}.", expert)


def _gated_mlp(layer: nn.Module, prefix: str, expert: int | None = None) -> Held:
    """gate's rows, then up's, in one parameter: [2F, D], of experts [E, 2F, D]; down in another."""
    index = ... if expert is None else expert
    yield f"{prefix}gate_proj.weight", lambda: _parameter(layer, "gate_up")[index].chunk(2)[0]
    yield f"{prefix}up_proj.weight", lambda: _parameter(layer, "gate_up")[index].chunk(2)[1]
    yield f"{prefix}down_proj.weight", lambda: _parameter(layer, "down")[index]


def _join_kv_b(prologue: nn.Module, output: nn.Module) -> Tensor:
    """w_uk [H, N, C] above w_uv [H, V, C] in every head."""
    return torch.cat([_parameter(prologue, "w_uk"), _parameter(output, "w_uv")], dim=1).flatten(0, 1)


def _parameter(module: nn.Module, name: str) -> Tensor:
    """The master: a transform that it passes through in forward passes changes nothing here."""
    parameter = module._parameters.get(name)
    if parameter is None:
        kind = module.bound if isinstance(module, BoundLayer) else type(module).__name__
        raise InputError(f"{kind} has no canonical weight {name}")
    return parameter


# -- transformers ------------------------------------------------------------------------------------------------------------


def _transformers(model: nn.Module, config: Glm5Config) -> Held:
    """Its names are those of checkpoints, but for the experts, which it stacks."""
    known = expected_tensors(config, mtp=False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in known:
            yield name, lambda t=tensor: t  # type: ignore[misc]
        elif name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert in range(config.n_routed_experts):
                yield f"{prefix}{expert}.gate_proj.weight", lambda t=tensor, e=expert: t[e].chunk(2)[0]  # type: ignore[misc]
                yield f"{prefix}{expert}.up_proj.weight", lambda t=tensor, e=expert: t[e].chunk(2)[1]  # type: ignore[misc]
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert in range(config.n_routed_experts):
                yield f"{prefix}{expert}.down_proj.weight", lambda t=tensor, e=expert: t[e]  # type: ignore[misc]
