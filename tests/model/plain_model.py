"""GLM-5 written once more, straight from the description of the architecture, with nothing else of this library: dense
formulas over a whole sequence in float64, one token at a time. Slow, and too plain to share a mistake with the operators.

Angles are float32 as everywhere (that is part of the model's definition); the rotation itself is a product of complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.config import Glm5Config

Selection = list[list[int]]
"""For each token the positions that it attends to."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, positions: Sequence[int], theta: float) -> Tensor:
    """[S, ..., R]: neighbours (2i, 2i+1) as one complex number, turned by position * theta^(-2i / R)."""
    dims = x.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * frequencies
    turns = torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
    turns = turns.reshape(len(positions), *[1] * (x.dim() - 2), dims // 2)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * turns).flatten(-2)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@dataclass
class PlainModel:
    """The trunk and the MTP layer over one whole sequence.

    Attributes:
        read: gives a checkpoint tensor by name.
    """

    config: Glm5Config
    read: Callable[[str], Tensor]

    def trunk(self, tokens: Sequence[int]) -> Tensor:
        """[S, D] hidden states after the final norm."""
        hidden = self.read("model.embed_tokens.weight")[list(tokens)]
        chosen: Selection | None = None
        for layer in range(self.config.num_hidden_layers):
            if self.config.indexer_types[layer] == "full":
                chosen = None
            is_moe = self.config.mlp_layer_types[layer] == "sparse"
            hidden, chosen = self.block(f"model.layers.{layer}.", hidden, chosen, is_moe=is_moe)
        return rms_norm(hidden, self.read("model.norm.weight"), self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.read("lm_head.weight").T

    def mtp(self, hidden: Tensor, next_tokens: Sequence[int], shared: Selection | None = None) -> tuple[Tensor, Selection]:
        """u_i for every position i, from h_i and t_{i+1}. `shared` overrides the selection of the tokens it holds, from the last
        one backwards: the positions that a recycled draft attends to are those of the first draft."""
        prefix, eps = f"model.layers.{self.config.num_hidden_layers}.", self.config.rms_norm_eps
        embedded = self.read("model.embed_tokens.weight")[list(next_tokens)]
        both = (
            rms_norm(embedded, self.read(prefix + "enorm.weight"), eps),
            rms_norm(hidden, self.read(prefix + "hnorm.weight"), eps),
        )
        joined = torch.cat(both, -1) @ self.read(prefix + "eh_proj.weight").T
        out, chosen = self.block(prefix, joined, None, is_moe=True, overriding=shared)
        return rms_norm(out, self.read(prefix + "shared_head.norm.weight"), eps), chosen

    def block(
        self, prefix: str, hidden: Tensor, chosen: Selection | None, *, is_moe: bool, overriding: Selection | None = None
    ) -> tuple[Tensor, Selection]:
        eps = self.config.rms_norm_eps
        normed = rms_norm(hidden, self.read(prefix + "input_layernorm.weight"), eps)
        attended, chosen = self.attention(prefix + "self_attn.", normed, chosen, overriding)
        hidden = hidden + attended
        normed = rms_norm(hidden, self.read(prefix + "post_attention_layernorm.weight"), eps)
        feed_forward = self.experts if is_moe else self.dense
        return hidden + feed_forward(prefix + "mlp.", normed), chosen

    def attention(
        self, prefix: str, x: Tensor, chosen: Selection | None, overriding: Selection | None
    ) -> tuple[Tensor, Selection]:
        config = self.config
        length, heads = len(x), config.num_attention_heads
        positions = range(length)
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        residual = rms_norm(
            x @ self.read(prefix + "q_a_proj.weight").T, self.read(prefix + "q_a_layernorm.weight"), config.latent_norm_eps
        )
        query = (residual @ self.read(prefix + "q_b_proj.weight").T).reshape(length, heads, nope + rope)
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], positions, config.rope_theta)], -1)
        compressed = x @ self.read(prefix + "kv_a_proj_with_mqa.weight").T
        latent = rms_norm(
            compressed[:, : config.kv_lora_rank], self.read(prefix + "kv_a_layernorm.weight"), config.latent_norm_eps
        )
        rope_key = rotate(compressed[:, config.kv_lora_rank :], positions, config.rope_theta)
        expanded = (latent @ self.read(prefix + "kv_b_proj.weight").T).reshape(length, heads, nope + value)
        key = torch.cat([expanded[..., :nope], rope_key[:, None].expand(-1, heads, -1)], -1)
        if chosen is None:
            chosen = self.select(prefix + "indexer.", x, residual)
        if overriding:
            chosen = chosen[: length - len(overriding)] + overriding
        rows = []
        for token, seen in enumerate(chosen):
            scores = torch.einsum("hn,uhn->hu", query[token], key[seen]) / (nope + rope) ** 0.5
            rows.append(torch.einsum("hu,uhv->hv", scores.softmax(-1), expanded[seen][..., nope:]).flatten())
        return torch.stack(rows) @ self.read(prefix + "o_proj.weight").T, chosen

    def select(self, prefix: str, x: Tensor, residual: Tensor) -> Selection:
        config = self.config
        length, heads, width, rope = len(x), config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        query = (residual @ self.read(prefix + "wq_b.weight").T).reshape(length, heads, width)
        key = x @ self.read(prefix + "wk.weight").T
        centred = key - key.mean(-1, keepdim=True)
        key = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        key = key * self.read(prefix + "k_norm.weight") + self.read(prefix + "k_norm.bias")
        query = torch.cat([rotate(query[..., :rope], range(length), config.rope_theta), query[..., rope:]], -1)
        key = torch.cat([rotate(key[..., :rope], range(length), config.rope_theta), key[..., rope:]], -1)
        weights = x @ self.read(prefix + "weights_proj.weight").T
        selection = []
        for token in range(length):
            dots = torch.relu(query[token] @ key[: token + 1].T / width**0.5)
            scores = (weights[token][:, None] / heads**0.5 * dots).sum(0).tolist()
            best = sorted(range(token + 1), key=lambda place: (-scores[place], place))  # ties: the lowest position
            selection.append(sorted(best[: config.index_topk]))
        return selection

    def dense(self, prefix: str, x: Tensor) -> Tensor:
        return mlp(x, *(self.read(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down")))

    def experts(self, prefix: str, x: Tensor) -> Tensor:
        config = self.config
        scores = 1 / (1 + torch.exp(-(x @ self.read(prefix + "gate.weight").T)))
        biased = scores + self.read(prefix + "gate.e_score_correction_bias")
        rows = []
        for token in range(len(x)):
            allowed = self._allowed(biased[token].tolist())
            ids = sorted(allowed, key=lambda expert: (-float(biased[token, expert]), expert))[: config.num_experts_per_tok]
            chosen = scores[token, ids]
            if config.norm_topk_prob:
                chosen = chosen / (chosen.sum() + 1e-20)
            rows.append(
                sum(
                    w * self.dense(f"{prefix}experts.{e}.", x[token])
                    for w, e in zip(chosen * config.routed_scaling_factor, ids, strict=True)
                )
            )
        return torch.stack(rows) + self.dense(prefix + "shared_experts.", x)

    def _allowed(self, biased: list[float]) -> list[int]:
        """The experts of the best groups; a group is as good as its two best experts together."""
        size = self.config.n_routed_experts // self.config.n_group
        groups = [list(range(first, first + size)) for first in range(0, len(biased), size)]
        ranked = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
        return [expert for group in ranked[: self.config.topk_group] for expert in group]
