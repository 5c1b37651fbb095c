"""The parts of a GLM-5 decoder layer, composed of operators. No device is named here.

Shape legend: T packed tokens of a step, D hidden, H heads, C latent (512), R rope dims (64), V value dims, Q query latent (2048),
J index heads, X index dims, K selected positions or experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from glm5_port import operators as ops
from glm5_port.config import Glm5Config
from glm5_port.model import composed
from glm5_port.model.bindings import Binder, BoundLayer
from glm5_port.model.cache import DECODE, PREFILL, Batch, LayerCache
from glm5_port.model.ranks import Part, Ranks
from glm5_port.model.tensors import layer_prefix
from glm5_port.quant.int4 import PER_CHANNEL

WIDE, INT8, INT8_GROUPS = "wide", "int8", "int8_groups"
"""Activations of INT4 experts: the working dtype (W4A16), or quantised as they come (W4A8) with one scale for each token, or for
each of its groups, which are those of the weights."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every layer of a model shares beside its config.

    Attributes:
        dense_attention: attends to every earlier position, without an indexer.
        cache_format: how latents, rope keys and index keys are stored.
        int4_activations: of INT4 experts, `WIDE`, `INT8` or `INT8_GROUPS`.
        ranks: how work is shared with other ranks.
        part: what of the model is here.
    """

    dense_attention: bool
    cache_format: str
    int4_activations: str
    ranks: Ranks
    part: Part


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward step shares.

    Attributes:
        batch: where the tokens stand.
        cos_TR, sin_TR: rotary angles of the tokens, [T, R/2].
    """

    batch: Batch
    cos_TR: Tensor
    sin_TR: Tensor


class Indexer(nn.Module):
    """Computes this layer's index keys, stores them, and selects the positions that attention may read."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, options: Options) -> None:
        super().__init__()
        if composed.has_codes(config, prefix, composed.INDEX):
            self.project: BoundLayer | composed.IndexQueries = composed.IndexQueries(config, bind, prefix)
        else:
            self.project = BoundLayer(bind(ops.indexer_prologue))
        self.write = bind(ops.write_cache, kind="index", widths=(config.index_head_dim,))
        self.select = {phase: bind(ops.lightning_indexer, phase=phase) for phase in (PREFILL, DECODE)}
        self.top_k = config.index_topk
        self.k_norm_eps = config.index_norm_eps
        self.rope_interleaved = config.indexer_rope_interleave
        self.cache_format = options.cache_format
        self.ranks = options.ranks

    def forward(self, hidden_TD: Tensor, query_residual_TQ: Tensor, step: Step, index_cache: list[Tensor]) -> Tensor:
        index_query_TJX, index_key_TX, head_weights_TJ = self.project(
            hidden=hidden_TD,
            query_residual=query_residual_TQ,
            cos=step.cos_TR,
            sin=step.sin_TR,
            k_norm_eps=self.k_norm_eps,
            rope_interleaved=self.rope_interleaved,
        )
        batch = step.batch
        self.write([index_key_TX], index_cache, batch.slots_T, cache_format=self.cache_format)
        self.ranks.share_cache(index_cache, batch)
        return self.select[batch.phase](
            index_query_TJX,
            head_weights_TJ,
            index_cache,
            batch.block_table_BN,
            batch.query_starts_B1,
            batch.lengths_B,
            top_k=self.top_k,
            cache_format=self.cache_format,
        )


class Attention(nn.Module):
    """What both forms of MLA share: absorbed queries of a step, whose latents and rope keys go into the cache on the way.

    Attributes:
        queries: what projects queries and latents where a matrix of theirs is stored in INT4, else None.
    """

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, options: Options) -> None:
        super().__init__()
        self.queries = composed.Queries(config, bind, prefix) if composed.has_codes(config, prefix, composed.QUERIES) else None
        if self.queries is not None:
            self.prologue: BoundLayer | composed.AbsorbedQueries = composed.AbsorbedQueries(config, bind, self.queries)
        else:
            self.prologue = BoundLayer(bind(ops.mla_prologue_into_cache))
        if composed.has_codes(config, prefix, composed.OUTPUT):
            self.output: BoundLayer | composed.Output = composed.Output(config, bind, prefix)
        else:
            self.output = BoundLayer(bind(ops.attention_output))
        self.latent_norm_eps = config.latent_norm_eps
        self.rope_interleaved = config.rope_interleave
        self.scale = config.softmax_scale
        self.cache_format = options.cache_format
        self.ranks = options.ranks

    def into_cache(self, hidden_TD: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: absorbed queries [T, H, C], rope queries [T, H, R], the normalised query latent [T, Q]."""
        queries: tuple[Tensor, Tensor, Tensor] = self.prologue(
            hidden=hidden_TD,
            cos=step.cos_TR,
            sin=step.sin_TR,
            latent_cache=cache.latent,
            slots=step.batch.slots_T,
            latent_norm_eps=self.latent_norm_eps,
            rope_interleaved=self.rope_interleaved,
            cache_format=self.cache_format,
        )
        self.ranks.share_cache(cache.latent, step.batch)
        return queries


class SparseAttention(Attention):
    """MLA in absorbed form over the positions that this layer's indexer, or an earlier layer's (IndexShare), selected."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, options: Options, *, owns_indexer: bool) -> None:
        super().__init__(config, bind, prefix, options)
        self.attend = {phase: bind(ops.sparse_mla_attention, phase=phase) for phase in (PREFILL, DECODE)}
        self.indexer = Indexer(config, bind, prefix, options) if owns_indexer else None

    def forward(
        self, hidden_TD: Tensor, step: Step, cache: LayerCache, indices_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch = step.batch
        query_latent_THC, query_rope_THR, query_residual_TQ = self.into_cache(hidden_TD, step, cache)
        if self.indexer is not None and cache.index is not None and indices_TK is None:
            indices_TK = self.indexer(hidden_TD, query_residual_TQ, step, cache.index)
        latent_out_THC = self.attend[batch.phase](
            query_latent_THC,
            query_rope_THR,
            cache.latent,
            indices_TK,
            batch.block_table_BN,
            batch.query_starts_B1,
            batch.lengths_B,
            scale=self.scale,
            cache_format=self.cache_format,
        )
        return self.output(latent_out=latent_out_THC), indices_TK


class DenseAttention(Attention):
    """MLA over every earlier position: the same function as `SparseAttention` when the declared context fits into index_topk,
    where selection keeps everything. Expanded heads in prefill, the absorbed form in decode. Needs no indexer."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, options: Options) -> None:
        super().__init__(config, bind, prefix, options)
        self.project = BoundLayer(bind(ops.mla_project)) if self.queries is None else self.queries
        self.write = bind(ops.write_cache)
        self.expanded = BoundLayer(bind(ops.mla_attention_expanded, phase=PREFILL))
        self.absorbed = bind(ops.mla_attention_absorbed, phase=DECODE)
        if isinstance(self.output, composed.Output):
            self.expanded_output: BoundLayer = self.output.o
        else:
            width_in = config.num_attention_heads * config.v_head_dim
            self.expanded_output = BoundLayer(bind(ops.linear, width_in=width_in, width_out=config.hidden_size))
        self.nope_dim = config.qk_nope_head_dim

    def forward(
        self, hidden_TD: Tensor, step: Step, cache: LayerCache, indices_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        attend = self._decode if step.batch.phase == DECODE else self._prefill
        return attend(hidden_TD, step, cache), None

    def _prefill(self, hidden_TD: Tensor, step: Step, cache: LayerCache) -> Tensor:
        batch = step.batch
        query_nope_THN, query_rope_THR, latent_TC, rope_key_TR, _ = self.project(
            hidden=hidden_TD,
            cos=step.cos_TR,
            sin=step.sin_TR,
            latent_norm_eps=self.latent_norm_eps,
            rope_interleaved=self.rope_interleaved,
            nope_dim=self.nope_dim,
        )
        self.write([latent_TC, rope_key_TR], cache.latent, batch.slots_T, cache_format=self.cache_format)
        self.ranks.share_cache(cache.latent, batch)
        out_THV = self.expanded(
            query_nope=query_nope_THN,
            query_rope=query_rope_THR,
            latent_cache=cache.latent,
            block_table=batch.block_table_BN,
            query_starts=batch.query_starts_B1,
            lengths=batch.lengths_B,
            scale=self.scale,
            cache_format=self.cache_format,
        )
        output_TD: Tensor = self.expanded_output(out_THV.flatten(1))
        return output_TD

    def _decode(self, hidden_TD: Tensor, step: Step, cache: LayerCache) -> Tensor:
        batch = step.batch
        query_latent_THC, query_rope_THR, _ = self.into_cache(hidden_TD, step, cache)
        latent_out_THC = self.absorbed(
            query_latent_THC,
            query_rope_THR,
            cache.latent,
            batch.block_table_BN,
            batch.query_starts_B1,
            batch.lengths_B,
            scale=self.scale,
            cache_format=self.cache_format,
        )
        output_TD: Tensor = self.output(latent_out=latent_out_THC)
        return output_TD


def gated_mlp(config: Glm5Config, bind: Binder, prefix: str, width_between: int) -> BoundLayer | composed.Mlp:
    """`gated_mlp` with the matrices below `prefix`, whatever they are stored in."""
    if composed.has_codes(config, prefix, composed.MLP):
        return composed.Mlp(config, bind, prefix, width_between)
    return BoundLayer(bind(ops.gated_mlp, width_between=width_between))


class DenseMlp(nn.Module):
    """The gated MLP of the first layers."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, ranks: Ranks) -> None:
        super().__init__()
        self.mlp = gated_mlp(config, bind, prefix, config.intermediate_size)
        self.ranks = ranks

    def forward(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        return self.ranks.add_up(self.mlp(self.ranks.gather(hidden_TD, batch)), batch)


class MoeMlp(nn.Module):
    """Routed experts, in floating point or INT4, plus the shared expert, which is neither gated nor scaled."""

    def __init__(self, config: Glm5Config, bind: Binder, prefix: str, number: int, options: Options) -> None:
        super().__init__()
        self.route = BoundLayer(bind(ops.route_experts))
        int4 = config.int4 if config.has_int4_experts(number) else None
        self.packing: dict[str, Any] = {} if int4 is None else {"group_size": int4.group_size}
        if int4 is None:
            experts = ops.expert_mlp
        elif options.int4_activations == WIDE:
            experts = ops.expert_mlp_int4
        else:
            experts = ops.expert_mlp_int4_w4a8
            self.packing["activation_group_size"] = PER_CHANNEL if options.int4_activations == INT8 else int4.group_size
        part = options.part
        self.held = tuple(part.experts(number))
        self.experts = BoundLayer(bind(experts, experts=len(self.held), width_between=part.expert_width, **self.packing))
        self.shared = gated_mlp(config, bind, prefix + "shared_experts.", part.shared_width)
        self.exchange = options.ranks.exchange(bind, number, config)
        self.routing = {
            "top_k": config.num_experts_per_tok,
            "groups": config.n_group,
            "groups_kept": config.topk_group,
            "renormalise": config.norm_topk_prob,
            "scale": config.routed_scaling_factor,
        }

    def forward(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        route_weights_TK, ids_TK = self.route(hidden=hidden_TD, **self.routing)
        return self.exchange(hidden_TD, route_weights_TK, ids_TK, batch, self._routed, self.shared)

    def _routed(self, *, hidden: Tensor, route_weights: Tensor, ids: Tensor) -> Tensor:
        routed_TD: Tensor = self.experts(hidden=hidden, route_weights=route_weights, ids=ids, **self.packing)
        return routed_TD


class DecoderLayer(nn.Module):
    """norm, attention, norm, MLP around a residual stream that is carried as (block output, residual). Layer `number` of the
    config says which attention and which MLP, and what their matrices are stored in."""

    def __init__(self, config: Glm5Config, bind: Binder, number: int, options: Options) -> None:
        super().__init__()
        attention, mlp = layer_prefix(number) + "self_attn.", layer_prefix(number) + "mlp."
        self.input_norm = Norm(config, bind)
        if options.dense_attention:
            self.attention: DenseAttention | SparseAttention = DenseAttention(config, bind, attention, options)
        else:
            self.attention = SparseAttention(config, bind, attention, options, owns_indexer=config.owns_indexer(number))
        self.attention_norm = Norm(config, bind)
        if config.is_moe(number):
            self.mlp: nn.Module = MoeMlp(config, bind, mlp, number, options)
        else:
            self.mlp = DenseMlp(config, bind, mlp, options.ranks)
        self.ranks = options.ranks

    def forward(
        self, block_TD: Tensor, residual_TD: Tensor, step: Step, cache: LayerCache, indices_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Args: block_TD, the previous block's output, not yet added to residual_TD; indices_TK, an earlier layer's selection
        or None. Returns: this layer's MLP output, the residual before it, and the selection that the next layer may share."""
        ranks, batch = self.ranks, step.batch
        normed_TD, residual_TD = self.input_norm(block_TD, residual_TD)
        attention_TD, indices_TK = self.attention(ranks.gather(normed_TD, batch), step, cache, indices_TK)
        normed_TD, residual_TD = self.attention_norm(ranks.add_up(attention_TD, batch), residual_TD)
        return self.mlp(normed_TD, batch), residual_TD, indices_TK


class Norm(nn.Module):
    """add_rms_norm with the block eps: adds the block's output to the residual and normalises the sum."""

    def __init__(self, config: Glm5Config, bind: Binder) -> None:
        super().__init__()
        self.add_norm = BoundLayer(bind(ops.add_rms_norm))
        self.eps = config.rms_norm_eps

    def forward(self, block_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        normed_TD, total_TD = self.add_norm(x=block_TD, residual=residual_TD, eps=self.eps)
        return normed_TD, total_TD
