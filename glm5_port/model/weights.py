"""From checkpoint names to operators: which tensors each layer takes, and how they are cut and joined on the way.

Weights stream: one tensor (one expert) is read, handed to its operator's preparation and dropped before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from glm5_port.config import Glm5Config
from glm5_port.model import composed
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.layers import DecoderLayer, DenseAttention, DenseMlp, Indexer, MoeMlp, Norm, SparseAttention
from glm5_port.quant.int4 import dequantize_packed

Read = Callable[[str], Tensor]
"""Gives a checkpoint tensor by name, in the model's dtype and on its device (the router's bias in float32, parts of INT4 and
INT8 weights as they are stored)."""


def load_decoder_layer(layer: DecoderLayer, read: Read, prefix: str, config: Glm5Config, *, trainable: bool) -> None:
    """Fills one decoder layer from the tensors under `prefix` ("model.layers.3.")."""
    load_norm(layer.input_norm, read, prefix + "input_layernorm", trainable=trainable)
    load_norm(layer.attention_norm, read, prefix + "post_attention_layernorm", trainable=trainable)
    _load_attention(layer.attention, read, prefix + "self_attn.", config, trainable=trainable)
    if isinstance(layer.mlp, MoeMlp):
        _load_moe(layer.mlp, read, prefix + "mlp.", trainable=trainable)
    elif isinstance(layer.mlp, DenseMlp):
        _load_gated_mlp(layer.mlp.mlp, read, prefix + "mlp.", trainable=trainable)


def load_norm(norm: Norm, read: Read, name: str, *, trainable: bool) -> None:
    fill(norm.add_norm, {"weight": read(name + ".weight")}, trainable=trainable)


def fill(layer: BoundLayer, tensors: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Hands all weights of an operator without experts to its preparation."""
    layer.preparation.add(None, tensors)
    layer.finish_loading(trainable=trainable)


def split_kv_b(kv_b: Tensor, config: Glm5Config) -> tuple[Tensor, Tensor]:
    """kv_b_proj [H * (N + V), C] -> (w_uk [H, N, C], w_uv [H, V, C])."""
    per_head = kv_b.view(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
    w_uk, w_uv = per_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return w_uk.contiguous(), w_uv.contiguous()


def packed_expert_weights(read: Read, prefix: str) -> dict[str, Tensor]:
    """One INT4 expert: codes and scales of gate and up stacked row by row, which keeps every group whole. The shape tensor says
    nothing that the config does not, and was checked to be there."""
    gate, up, down = (f"{prefix}{name}_proj.weight" for name in ("gate", "up", "down"))
    return {
        "gate_up_packed": torch.cat([read(gate + "_packed"), read(up + "_packed")]),
        "gate_up_scales": torch.cat([read(gate + "_scale"), read(up + "_scale")]),
        "down_packed": read(down + "_packed"),
        "down_scales": read(down + "_scale"),
    }


def gated_mlp_weights(read: Read, prefix: str) -> dict[str, Tensor]:
    gate_up = torch.cat([read(prefix + "gate_proj.weight"), read(prefix + "up_proj.weight")])
    return {"gate_up": gate_up, "down": read(prefix + "down_proj.weight")}


def _load_projection(projection: composed.Projection, read: Read) -> None:
    """Fills a projection of a layer that is not trained, from the tensors that stand for its matrix."""
    tensors = {name: read(projection.name + part) for name, part in projection.stored.items()}
    if "weight_scale" in tensors:  # stored as a column beside the codes
        tensors["weight_scale"] = tensors["weight_scale"].flatten()
    fill(projection, tensors, trainable=False)


def _load_gated_mlp(mlp: BoundLayer | composed.Mlp, read: Read, prefix: str, *, trainable: bool) -> None:
    if isinstance(mlp, composed.Mlp):
        for projection in (mlp.gate, mlp.up, mlp.down):
            _load_projection(projection, read)
    else:
        fill(mlp, gated_mlp_weights(read, prefix), trainable=trainable)


def _load_attention(
    attention: DenseAttention | SparseAttention, read: Read, prefix: str, config: Glm5Config, *, trainable: bool
) -> None:
    """Forms of attention share their parameters; an implementation with a layout of its own makes its own copy."""

    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor, requires_grad=trainable)

    norms = {name: parameter(read(f"{prefix}{name[:-5]}_layernorm.weight")) for name in ("q_a_norm", "kv_a_norm")}
    kv_b = _floating(read, prefix + "kv_b_proj", config, norms["kv_a_norm"].dtype)
    w_uk, w_uv = (parameter(half) for half in split_kv_b(kv_b, config))
    if isinstance(attention.prologue, composed.AbsorbedQueries):
        _load_queries(attention.prologue.queries, read, norms)
        fill(attention.prologue.absorb, {"weight": w_uk.transpose(1, 2)}, trainable=trainable)
    else:
        matrices = {"q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa"}
        queries = norms | {name: parameter(read(f"{prefix}{module}.weight")) for name, module in matrices.items()}
        fill(attention.prologue, {**queries, "w_uk": w_uk}, trainable=trainable)
        if isinstance(attention, DenseAttention) and isinstance(attention.project, BoundLayer):
            fill(attention.project, queries, trainable=trainable)
    if isinstance(attention.output, composed.Output):
        fill(attention.output.values, {"weight": w_uv}, trainable=trainable)
        _load_projection(attention.output.o, read)
    else:
        o = parameter(read(prefix + "o_proj.weight"))
        fill(attention.output, {"w_uv": w_uv, "o": o}, trainable=trainable)
        if isinstance(attention, DenseAttention):
            fill(attention.expanded_output, {"weight": o}, trainable=trainable)
    if isinstance(attention, DenseAttention):
        fill(attention.expanded, {"w_uk": w_uk, "w_uv": w_uv}, trainable=trainable)
    elif attention.indexer is not None:
        _load_indexer(attention.indexer, read, prefix + "indexer.", trainable=trainable)


def _load_queries(queries: composed.Queries, read: Read, norms: Mapping[str, Tensor]) -> None:
    for projection in (queries.q_a, queries.q_b, queries.kv_a):
        _load_projection(projection, read)
    fill(queries.q_a_norm, {"weight": norms["q_a_norm"]}, trainable=False)
    fill(queries.kv_a_norm, {"weight": norms["kv_a_norm"]}, trainable=False)


def _floating(read: Read, module: str, config: Glm5Config, dtype: torch.dtype) -> Tensor:
    """A matrix in floating point, whatever it is stored in."""
    if config.is_int4(module):
        return dequantize_packed(read(f"{module}.weight_packed"), read(f"{module}.weight_scale")).to(dtype)
    if config.is_int8(module):
        return (read(f"{module}.weight").to(torch.float32) * read(f"{module}.weight_scale")).to(dtype)
    return read(f"{module}.weight")


def _load_indexer(indexer: Indexer, read: Read, prefix: str, *, trainable: bool) -> None:
    norm_weight, norm_bias = read(prefix + "k_norm.weight"), read(prefix + "k_norm.bias")
    weights_proj, project = read(prefix + "weights_proj.weight"), indexer.project
    if isinstance(project, composed.IndexQueries):
        for projection in (project.wq_b, project.wk):
            _load_projection(projection, read)
        fill(project.head_weights, {"weight": weights_proj.to(project.wide)}, trainable=trainable)
        project.k_norm_weight = nn.Parameter(norm_weight.to(project.wide), requires_grad=trainable)
        project.k_norm_bias = nn.Parameter(norm_bias.to(project.wide), requires_grad=trainable)
    else:
        matrices = {"wq_b": read(prefix + "wq_b.weight"), "wk": read(prefix + "wk.weight"), "weights_proj": weights_proj}
        fill(project, matrices | {"k_norm_weight": norm_weight, "k_norm_bias": norm_bias}, trainable=trainable)


def _load_moe(moe: MoeMlp, read: Read, prefix: str, *, trainable: bool) -> None:
    gate = {"gate": read(prefix + "gate.weight"), "correction_bias": read(prefix + "gate.e_score_correction_bias")}
    fill(moe.route, gate, trainable=trainable)
    for name, parameter in moe.route.named_parameters():
        if name == "correction_bias":  # it only steers the choice: no gradient, and no weight decay either
            parameter.requires_grad_(False)
    _load_gated_mlp(moe.shared, read, prefix + "shared_experts.", trainable=trainable)
    preparation = moe.experts.preparation
    weights_of = packed_expert_weights if moe.packing else gated_mlp_weights
    for slot, expert in enumerate(moe.held):
        preparation.add(slot, weights_of(read, f"{prefix}experts.{expert}."))
    moe.experts.finish_loading(trainable=trainable)
