"""GLM-5 for training: the forward pass of this library's model, written for whole batches [B, S] with gradients.

It shares the weights (a dict by checkpoint name) and nothing else; tests/examples/test_tiny_code.py proves that its logits are
those of `glm5_port.load`. What the library does not need and training does: attention probabilities, which teach the indexer
(it gets no gradient from the language-model loss), and how often each expert was chosen, which moves the router's bias.

Shape legend: B sequences, S positions (U as keys), D hidden, H heads, N/R/V nope, rope and value dims, C latent, Q query latent,
J index heads, X index dims, E experts, T tokens (B * S).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.operators.rope import rotary_angles

DENSE, WARM_UP, SPARSE = "dense", "warm-up", "sparse"
"""Dense attention without indexers; dense attention that teaches the indexers; attention over what the indexers select."""


@dataclass(slots=True)
class Observed:
    """What one forward pass saw on the way.

    Attributes:
        expert_counts: router's name -> [E] tokens that chose each expert.
        index_scores: indexer's name -> [B, S, U] scores, with gradient.
        attention: indexer's name -> for each layer that follows it, [B, S, U] probabilities averaged over heads.
    """

    expert_counts: dict[str, Tensor] = field(default_factory=dict)
    index_scores: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, list[Tensor]] = field(default_factory=dict)

    def distillation_loss(self, visible_BSU: Mapping[str, Tensor]) -> Tensor:
        """Mean over indexers of KL(attention || softmax of the index scores), over the positions that attention could see."""
        losses = []
        for name, scores_BSU in self.index_scores.items():
            target_BSU = torch.stack(self.attention[name]).mean(0)
            log_q_BSU = scores_BSU.float().masked_fill(~visible_BSU[name], -1e30).log_softmax(-1)
            terms = torch.where(target_BSU > 0, target_BSU * (target_BSU.clamp_min(1e-20).log() - log_q_BSU), 0.0)
            losses.append(terms.sum(-1).mean())
        return torch.stack(losses).mean()


class Network:
    """One forward pass over a batch.

    Args:
        config: the architecture; one expert group.
        weights: checkpoint name -> tensor.
        mode: DENSE, WARM_UP or SPARSE.
    """

    def __init__(self, config: Glm5Config, weights: Mapping[str, Tensor], *, mode: str, positions: int) -> None:
        self.config = config
        self.weights = weights
        self.mode = mode
        self.observed = Observed()
        self.visible_BSU: dict[str, Tensor] = {}
        self.cos, self.sin = rotary_angles(torch.arange(positions), config.rope_theta, config.qk_rope_head_dim)
        self.causal_SU = torch.ones(positions, positions, dtype=torch.bool).tril()

    # -- the whole model -----------------------------------------------------------------------------------------------

    def trunk(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, D] hidden states after the final norm."""
        hidden_BSD = F.embedding(tokens_BS, self.weights["model.embed_tokens.weight"])
        owner = ""
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            owner = prefix if self.config.owns_indexer(layer) else owner
            hidden_BSD = self.block(prefix, owner, hidden_BSD, is_moe=self.config.is_moe(layer))
        return self.norm(hidden_BSD, "model.norm")

    def mtp(self, hidden_BSD: Tensor, next_tokens_BS: Tensor) -> Tensor:
        """[B, S, D]: the state that predicts the token after `next_tokens`."""
        prefix = f"model.layers.{self.config.num_hidden_layers}."
        embedded_BSD = F.embedding(next_tokens_BS, self.weights["model.embed_tokens.weight"])
        both = [self.norm(embedded_BSD, prefix + "enorm"), self.norm(hidden_BSD, prefix + "hnorm")]
        joined_BSD = self.linear(torch.cat(both, dim=-1), prefix + "eh_proj")
        return self.norm(self.block(prefix, prefix, joined_BSD, is_moe=True), prefix + "shared_head.norm")

    def logits(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden, "lm_head").float()

    # -- its parts -----------------------------------------------------------------------------------------------------

    def block(self, prefix: str, owner: str, hidden_BSD: Tensor, *, is_moe: bool) -> Tensor:
        normed_BSD = self.norm(hidden_BSD, prefix + "input_layernorm")
        hidden_BSD = hidden_BSD + self.attention(prefix, owner, normed_BSD)
        normed_BSD = self.norm(hidden_BSD, prefix + "post_attention_layernorm")
        feed_forward = self.experts if is_moe else self.mlp
        return hidden_BSD + feed_forward(normed_BSD, prefix + "mlp.")

    def attention(self, prefix: str, owner: str, x_BSD: Tensor) -> Tensor:
        config, name = self.config, prefix + "self_attn."
        batch, length, _ = x_BSD.shape
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        residual_BSQ = self.norm(self.linear(x_BSD, name + "q_a_proj"), name + "q_a_layernorm", config.latent_norm_eps)
        query_BSHX = self.linear(residual_BSQ, name + "q_b_proj").view(batch, length, -1, nope + rope)
        query_nope, query_rope = query_BSHX.split([nope, rope], dim=-1)
        latent_BSC, key_rope = self.linear(x_BSD, name + "kv_a_proj_with_mqa").split([config.kv_lora_rank, rope], dim=-1)
        latent_BSC = self.norm(latent_BSC, name + "kv_a_layernorm", config.latent_norm_eps)
        expanded_BSHX = self.linear(latent_BSC, name + "kv_b_proj").view(batch, length, -1, nope + value)
        key_nope, value_BSHV = expanded_BSHX.split([nope, value], dim=-1)
        key_rope = self.rotate(key_rope.unsqueeze(2)).expand(-1, -1, query_nope.shape[2], -1)
        query = torch.cat([query_nope, self.rotate(query_rope)], dim=-1).transpose(1, 2)
        key = torch.cat([key_nope, key_rope], dim=-1).transpose(1, 2)
        if owner == prefix and self.mode != DENSE:
            self.visible_BSU[owner] = self.index(prefix, x_BSD.detach(), residual_BSQ.detach())
        visible = self.causal_SU[:length, :length] if self.mode == DENSE else self.visible_BSU[owner].unsqueeze(1)
        scores_BHSU = (query * config.softmax_scale) @ key.transpose(2, 3)
        chances_BHSU = scores_BHSU.float().masked_fill(~visible, -1e30).softmax(-1)
        if self.mode != DENSE:
            self.observed.attention.setdefault(owner, []).append(chances_BHSU.detach().mean(1))
        out_BHSV = chances_BHSU.to(value_BSHV.dtype) @ value_BSHV.transpose(1, 2)
        return self.linear(out_BHSV.transpose(1, 2).flatten(2), name + "o_proj")

    def index(self, prefix: str, x_BSD: Tensor, residual_BSQ: Tensor) -> Tensor:
        """Scores every earlier position; returns [B, S, U], which of them attention may see."""
        config, name = self.config, prefix + "self_attn.indexer."
        batch, length, _ = x_BSD.shape
        heads, width, rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        query_BSJX = self.linear(residual_BSQ, name + "wq_b").view(batch, length, heads, width)
        key_BSX = self.linear(x_BSD, name + "wk").float()
        norm, bias = self.weights[name + "k_norm.weight"], self.weights[name + "k_norm.bias"]
        key_BSX = F.layer_norm(key_BSX, (width,), norm, bias, config.index_norm_eps)
        query_BSJX = torch.cat([self.rotate(query_BSJX[..., :rope]), query_BSJX[..., rope:]], dim=-1)
        key_BSX = torch.cat([self.rotate(key_BSX[..., None, :rope]).squeeze(2), key_BSX[..., rope:]], dim=-1)
        weights_BSJ = self.linear(x_BSD, name + "weights_proj") * (heads * width) ** -0.5
        dots_BSJU = (query_BSJX.flatten(1, 2) @ key_BSX.to(query_BSJX.dtype).transpose(1, 2)).relu_()
        dots_BSJU = dots_BSJU.view(batch * length, heads, length)
        scores_BSU = torch.bmm(weights_BSJ.reshape(batch * length, 1, heads), dots_BSJU).view(batch, length, length)
        self.observed.index_scores[prefix] = scores_BSU
        causal_SU = self.causal_SU[:length, :length]
        if self.mode == WARM_UP or length <= config.index_topk:
            return causal_SU.expand(batch, -1, -1)
        ranked = scores_BSU.detach().masked_fill(~causal_SU, float("-inf")).topk(config.index_topk, dim=-1).indices
        return torch.zeros_like(scores_BSU, dtype=torch.bool).scatter_(2, ranked, True) & causal_SU

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.silu(self.linear(x, name + "gate_proj")) * self.linear(x, name + "up_proj"), name + "down_proj")

    def experts(self, x_BSD: Tensor, name: str) -> Tensor:
        """Routed experts, each run once over the tokens that chose it, plus the shared expert."""
        config = self.config
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = torch.sigmoid(self.linear(x_TD, name + "gate").float())
        biased_TE = scores_TE.detach() + self.weights[name + "gate.e_score_correction_bias"]
        ids_TK = biased_TE.topk(config.num_experts_per_tok, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        if config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * config.routed_scaling_factor
        order = ids_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=config.n_routed_experts)
        self.observed.expert_counts[name + "gate.e_score_correction_bias"] = counts_E
        tokens = order // config.num_experts_per_tok
        parts = x_TD[tokens].split(counts_E.tolist())
        out = torch.cat([self.mlp(part, f"{name}experts.{expert}.") for expert, part in enumerate(parts)])
        weighted = out * weights_TK.flatten()[order, None].to(out.dtype)
        routed_TD = torch.zeros_like(x_TD, dtype=weighted.dtype).index_add_(0, tokens, weighted)
        return routed_TD.view_as(x_BSD) + self.mlp(x_BSD, name + "shared_experts.")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weights[name + ".weight"], eps or self.config.rms_norm_eps)

    def rotate(self, x_BSHR: Tensor) -> Tensor:
        """Turns neighbouring channels (2i, 2i+1) of [B, S, H, R] by the angles of their positions."""
        length = x_BSHR.shape[1]
        cos, sin = self.cos[:length, None], self.sin[:length, None]
        even, odd = x_BSHR.float()[..., 0::2], x_BSHR.float()[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).to(x_BSHR.dtype)
