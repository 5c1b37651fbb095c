"""The fused operators of a layer, composed of smaller ones: for layers some of whose matrices are stored in INT4 or INT8.

A fused operator takes floating-point matrices. Where the checkpoint holds one of them in INT4, the layer is made of the parts
here instead, each of which is called as the operator that it stands for, weights aside, and rounds where its reference rounds.
Every matrix is then a `Projection` of its own: `linear`, or `int4_matmul` or `int8_matmul` on its codes.

kv_b_proj is the exception: the absorbed form multiplies by its key half from the other side, where codes cannot be grouped. It is
decoded while loading, whatever it is stored in (29 MB a layer in GLM-5, 0.3 % of the weights), and multiplies head by head.

Shape legend: T tokens; D hidden; H heads; N nope, R rope and V value part of a head; C latent; Q query latent; J index heads; X
index dims; F intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.model.bindings import Binder, BoundLayer
from glm5_port.operators.linear import silu_and_multiply

QUERIES = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
OUTPUT = ("o_proj",)
INDEX = ("indexer.wq_b", "indexer.wk")
MLP = ("gate_proj", "up_proj", "down_proj")
"""The matrices that one fused operator takes, by module name below the attention or the MLP."""


def has_codes(config: Glm5Config, prefix: str, modules: Sequence[str]) -> bool:
    """Whether any of the modules below `prefix` is stored in INT4 or INT8."""
    return any(config.is_int4(prefix + module) or config.is_int8(prefix + module) for module in modules)


class Projection(BoundLayer):
    """y = x W^T of one matrix of the checkpoint: `linear`, or `int4_matmul` or `int8_matmul` where it is stored so.

    Attributes:
        name: of the matrix in checkpoints ("....weight").
        stored: argument of the operator -> what the name of its tensor adds to that.
    """

    def __init__(self, config: Glm5Config, bind: Binder, module: str, width_in: int, width_out: int) -> None:
        self.options: dict[str, Any] = {}
        operator, self.stored = ops.linear, {"weight": ""}
        if config.int4 is not None and config.is_int4(module):
            operator, self.stored = ops.int4_matmul, {"packed": "_packed", "scales": "_scale"}
            self.options["group_size"] = config.int4.group_size
        elif config.is_int8(module):
            operator, self.stored = ops.int8_matmul, {"weight": "", "weight_scale": "_scale"}
        super().__init__(bind(operator, width_in=width_in, width_out=width_out, **self.options))
        self.name = f"{module}.weight"

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x=x, **self.options)
        return y


class Mlp(nn.Module):
    """`gated_mlp` of three projections."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, width_between: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.gate = Projection(config, bind, prefix + "gate_proj", width, width_between)
        self.up = Projection(config, bind, prefix + "up_proj", width, width_between)
        self.down = Projection(config, bind, prefix + "down_proj", width_between, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(silu_and_multiply(torch.cat([self.gate(x_TD), self.up(x_TD)], dim=-1)))


class Queries(nn.Module):
    """`mla_project` of three projections."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str) -> None:
        super().__init__()
        width, query_latent, latent = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
        self.heads, self.rope_dim, self.latent_dim = config.num_attention_heads, config.qk_rope_head_dim, latent
        self.q_a = Projection(config, bind, prefix + "q_a_proj", width, query_latent)
        self.q_b = Projection(config, bind, prefix + "q_b_proj", query_latent, self.heads * config.qk_head_dim)
        self.kv_a = Projection(config, bind, prefix + "kv_a_proj_with_mqa", width, latent + self.rope_dim)
        self.q_a_norm = BoundLayer(bind(ops.rms_norm, width=query_latent))
        self.kv_a_norm = BoundLayer(bind(ops.rms_norm, width=latent))
        self.rotate = bind(ops.rotate)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, *, latent_norm_eps: float, rope_interleaved: bool, nope_dim: int
    ) -> tuple[Tensor, ...]:
        residual_TQ = self.q_a_norm(x=self.q_a(hidden), eps=latent_norm_eps)
        query_nope_THN, query_rope_THR = (
            self.q_b(residual_TQ).unflatten(-1, (self.heads, -1)).split([nope_dim, self.rope_dim], dim=-1)
        )
        latent_TC, rope_key_TR = self.kv_a(hidden).split([self.latent_dim, self.rope_dim], dim=-1)
        latent_TC = self.kv_a_norm(x=latent_TC, eps=latent_norm_eps)
        query_rope_THR = self.rotate(query_rope_THR, cos, sin, interleaved=rope_interleaved, start=0)
        rope_key_TR = self.rotate(rope_key_TR[:, None], cos, sin, interleaved=rope_interleaved, start=0)[:, 0]
        return query_nope_THN.contiguous(), query_rope_THR, latent_TC, rope_key_TR, residual_TQ


class AbsorbedQueries(nn.Module):
    """`mla_prologue_into_cache` of `Queries`, and the key half of kv_b_proj by heads."""

    def __init__(self, config: Glm5Config, bind: Binder, queries: Queries) -> None:
        super().__init__()
        self.queries = queries
        self.nope_dim = config.qk_nope_head_dim
        self.absorb = BoundLayer(bind(ops.linear_per_head, width_in=self.nope_dim, width_out=config.kv_lora_rank))
        self.write = bind(ops.write_cache)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        latent_cache: list[Tensor],
        slots: Tensor,
        *,
        latent_norm_eps: float,
        rope_interleaved: bool,
        cache_format: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query_nope_THN, query_rope_THR, latent_TC, rope_key_TR, residual_TQ = self.queries(
            hidden, cos, sin, latent_norm_eps=latent_norm_eps, rope_interleaved=rope_interleaved, nope_dim=self.nope_dim
        )
        self.write([latent_TC, rope_key_TR], latent_cache, slots, cache_format=cache_format)
        return self.absorb(x=query_nope_THN), query_rope_THR, residual_TQ


class Output(nn.Module):
    """`attention_output` of the value half of kv_b_proj by heads, and the projection after it."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str) -> None:
        super().__init__()
        self.values = BoundLayer(bind(ops.linear_per_head))
        width_in = config.num_attention_heads * config.v_head_dim
        self.o = Projection(config, bind, prefix + "o_proj", width_in, config.hidden_size)

    def forward(self, latent_out: Tensor) -> Tensor:
        return self.o(self.values(x=latent_out).flatten(1))


class IndexQueries(nn.Module):
    """`indexer_prologue` of two projections. Head weights stay float32 (or wider) from end to end."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str) -> None:
        super().__init__()
        width, heads, head_dim = config.hidden_size, config.index_n_heads, config.index_head_dim
        self.heads, self.head_dim = heads, head_dim
        self.wq_b = Projection(config, bind, prefix + "indexer.wq_b", config.q_lora_rank, heads * head_dim)
        self.wk = Projection(config, bind, prefix + "indexer.wk", width, head_dim)
        self.wide = torch.promote_types(bind.dtype, torch.float32)
        self.head_weights = BoundLayer(bind(ops.linear, dtype=self.wide, width_in=width, width_out=heads))
        self.rotate = bind(ops.rotate, head_dim=head_dim, interleaved=config.indexer_rope_interleave)
        self.k_norm_weight: nn.Parameter | None = None  # set while loading, and so is the bias
        self.k_norm_bias: nn.Parameter | None = None

    def forward(
        self, hidden: Tensor, query_residual: Tensor, cos: Tensor, sin: Tensor, *, k_norm_eps: float, rope_interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        query_TJX = self.wq_b(query_residual).unflatten(-1, (self.heads, self.head_dim))
        key_TX = self.wk(hidden).to(self.wide)
        key_TX = F.layer_norm(key_TX, (self.head_dim,), self.k_norm_weight, self.k_norm_bias, k_norm_eps).to(hidden.dtype)
        query_TJX = self.rotate(query_TJX, cos, sin, interleaved=rope_interleaved, start=0)
        key_TX = self.rotate(key_TX.unsqueeze(1), cos, sin, interleaved=rope_interleaved, start=0).squeeze(1)
        head_weights_TJ = self.head_weights(x=hidden.to(self.wide)) * (self.heads * self.head_dim) ** -0.5
        return query_TJX, key_TX, head_weights_TJ
