"""From checkpoint names to operators: which tensors each layer takes, and how they are cut and joined on the way.

Weights stream: one tensor (one expert) is read, handed to its operator's preparation and dropped before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from glm5_port.config import Glm5Config
from glm5_port.model.bindings import BoundLayer
from glm5_port.model.layers import DecoderLayer, DenseAttention, DenseMlp, Indexer, MoeMlp, Norm, SparseAttention

Read = Callable[[str], Tensor]
"""Gives a checkpoint tensor by name, in the model's dtype and on its device (the router's bias in float32)."""


def load_decoder_layer(layer: DecoderLayer, read: Read, prefix: str, config: Glm5Config, *, trainable: bool) -> None:
    """Fills one decoder layer from the tensors under `prefix` ("model.layers.3.")."""
    load_norm(layer.input_norm, read, prefix + "input_layernorm", trainable=trainable)
    load_norm(layer.attention_norm, read, prefix + "post_attention_layernorm", trainable=trainable)
    _load_attention(layer.attention, read, prefix + "self_attn.", config, trainable=trainable)
    if isinstance(layer.mlp, MoeMlp):
        _load_moe(layer.mlp, read, prefix + "mlp.", config, trainable=trainable)
    elif isinstance(layer.mlp, DenseMlp):
        fill(layer.mlp.mlp, gated_mlp_weights(read, prefix + "mlp."), trainable=trainable)


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


def _load_attention(attention: nn.Module, read: Read, prefix: str, config: Glm5Config, *, trainable: bool) -> None:
    projections = {
        "q_a": read(prefix + "q_a_proj.weight"),
        "q_a_norm": read(prefix + "q_a_layernorm.weight"),
        "q_b": read(prefix + "q_b_proj.weight"),
        "kv_a": read(prefix + "kv_a_proj_with_mqa.weight"),
        "kv_a_norm": read(prefix + "kv_a_layernorm.weight"),
    }
    w_uk, w_uv = split_kv_b(read(prefix + "kv_b_proj.weight"), config)
    o = read(prefix + "o_proj.weight")
    if isinstance(attention, SparseAttention):
        fill(attention.prologue, {**projections, "w_uk": w_uk}, trainable=trainable)
        fill(attention.output, {"w_uv": w_uv, "o": o}, trainable=trainable)
        if attention.indexer is not None:
            _load_indexer(attention.indexer, read, prefix + "indexer.", trainable=trainable)
    elif isinstance(attention, DenseAttention):
        # Both forms share the parameters; an implementation with a layout of its own makes its own copy.
        projections = {name: nn.Parameter(tensor, requires_grad=trainable) for name, tensor in projections.items()}
        w_uk, w_uv, o = (nn.Parameter(tensor, requires_grad=trainable) for tensor in (w_uk, w_uv, o))
        fill(attention.project, projections, trainable=trainable)
        fill(attention.expanded, {"w_uk": w_uk, "w_uv": w_uv}, trainable=trainable)
        fill(attention.expanded_output, {"weight": o}, trainable=trainable)
        fill(attention.prologue, {**projections, "w_uk": w_uk}, trainable=trainable)
        fill(attention.absorbed_output, {"w_uv": w_uv, "o": o}, trainable=trainable)


def _load_indexer(indexer: Indexer, read: Read, prefix: str, *, trainable: bool) -> None:
    tensors = {
        "wq_b": read(prefix + "wq_b.weight"),
        "wk": read(prefix + "wk.weight"),
        "k_norm_weight": read(prefix + "k_norm.weight"),
        "k_norm_bias": read(prefix + "k_norm.bias"),
        "weights_proj": read(prefix + "weights_proj.weight"),
    }
    fill(indexer.project, tensors, trainable=trainable)


def _load_moe(moe: MoeMlp, read: Read, prefix: str, config: Glm5Config, *, trainable: bool) -> None:
    gate = {"gate": read(prefix + "gate.weight"), "correction_bias": read(prefix + "gate.e_score_correction_bias")}
    fill(moe.route, gate, trainable=trainable)
    for name, parameter in moe.route.named_parameters():
        if name == "correction_bias":  # it only steers the choice: no gradient, and no weight decay either
            parameter.requires_grad_(False)
    fill(moe.shared, gated_mlp_weights(read, prefix + "shared_experts."), trainable=trainable)
    preparation = moe.experts.preparation
    weights_of = packed_expert_weights if moe.packing else gated_mlp_weights
    for expert in range(config.n_routed_experts):
        preparation.add(expert, weights_of(read, f"{prefix}experts.{expert}."))
    moe.experts.finish_loading(trainable=trainable)
