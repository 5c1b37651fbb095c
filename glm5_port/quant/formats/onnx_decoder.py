"""GLM-5 as ONNX graphs over the data files of an export: the decoder with its caches, and the MTP layer.

    inputs    input_ids, position_ids [B, S] int64; past.<layer>.latent [B, P, C], past.<layer>.rope_key [B, P, R], and
              past.<layer>.index_key [B, P, X] of the layers that own an indexer
    outputs   logits [B, S, vocabulary], hidden_states [B, S, D] after the final norm, present.<layer>.* [B, P + S, ...]

All sequences of a batch have the same past: new token s sees cache rows 0 .. P + s, and position_ids only say how it is rotated.
The caches of a first call have P = 0. Attention is absorbed: every token reads the min(index_topk, P + S) latent rows that its
indexer, or that of the layer it shares with, selects: highest score, then lowest position, as the standard promises of `TopK`.

Shape legend: B sequences; S new tokens; P cached ones; L = P + S; T = B S rows; D hidden; H heads; C latent; N nope part of a
head; R rope part; V value part; J index heads; X index dims; K selected positions; E experts; k choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glm5_port.backends.onnxruntime.int4 import qmoe_node
from glm5_port.config import Glm5Config
from glm5_port.model.tensors import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from glm5_port.quant.formats.onnx_data import CODES, SCALES, DataFile
from glm5_port.quant.formats.onnx_graph import Graph

TOKENS, POSITIONS, LOGITS, HIDDEN, PREVIOUS = "input_ids", "position_ids", "logits", "hidden_states", "previous_hidden_states"
_BATCH, _NEW, _PAST, _ALL = "batch", "sequence", "past", "past + sequence"


def decoder_graph(config: Glm5Config, files: Sequence[DataFile]) -> bytes:
    """The trunk: embedding, layers, final norm and head.

    Args:
        config: the model, with the latent-norm eps that is wanted.
        files: of `data_files`.

    Returns:
        The bytes of the .onnx file, which belongs beside the data files.

    Raises:
        InputError: onnx is not installed.
        CheckpointError: the files lack a weight.
    """
    graph = _Decoder(config, files)
    step = graph.step(layers=config.layers)
    x, indices = graph.embedded(), ""
    for layer in config.layers:
        x, indices = graph.layer(layer, x, indices, step)
    graph.head(x, FINAL_NORM)
    return graph.serialised("decoder", graph.notes())


def mtp_graph(config: Glm5Config, files: Sequence[DataFile]) -> bytes:
    """The MTP layer, which drafts the token after next. It has one input more: previous_hidden_states [B, S, D], those of the
    trunk (or, for a further draft, its own) at position i; input_ids are the tokens at i + 1, position_ids i. Its indexer runs in
    every call.

    Args:
        config: as for `decoder_graph`; it has an MTP layer.
        files: of `data_files`.

    Returns:
        The bytes of the .onnx file.

    Raises:
        As `decoder_graph`.
    """
    layer = config.num_hidden_layers
    graph, prefix = _Decoder(config, files), layer_prefix(layer)
    step = graph.step(layers=(layer,))
    hidden = graph.input(PREVIOUS, [_BATCH, _NEW, config.hidden_size])
    rows = graph.node("Reshape", hidden, graph.numbers([-1, config.hidden_size]))
    embedded = graph.rms_norm(graph.embedded(), f"{prefix}enorm.weight", config.rms_norm_eps)
    carried = graph.rms_norm(rows, f"{prefix}hnorm.weight", config.rms_norm_eps)
    x = graph.linear(graph.node("Concat", embedded, carried, axis=-1), f"{prefix}eh_proj.weight")
    x, _ = graph.layer(layer, x, "", step)
    graph.head(x, f"{prefix}shared_head.norm.weight")
    return graph.serialised("mtp", graph.notes())


def experts_graph(config: Glm5Config, layer: int, files: Sequence[DataFile]) -> bytes:
    """The router and the routed experts of one layer: "hidden" [rows, D] to "routed" [rows, D]. Without the shared expert.

    Args:
        config: as for `decoder_graph`.
        layer: which.
        files: of `data_files`.

    Returns:
        The bytes of the .onnx file.

    Raises:
        As `decoder_graph`.
    """
    graph = _Decoder(config, files)
    hidden = graph.input("hidden", ["rows", config.hidden_size])
    graph.output(graph.routed(hidden, f"{layer_prefix(layer)}mlp."), "routed", ["rows", config.hidden_size])
    return graph.serialised(f"layer_{layer}", graph.notes())


@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer of one call shares: values of a graph.

    Attributes:
        tokens: [B, S] as a shape.
        angles: cosine and sine, [B, S, 1, R / 2].
        places: of the new tokens in the cache, [S, 1].
        visible: which cache rows a new token sees, [S, L].
        selected: how many rows it reads, [1].
    """

    tokens: str
    angles: tuple[str, str]
    places: str
    visible: str
    selected: str


class _Decoder(Graph):
    """A graph of GLM-5 layers. Rows of the residual stream are [T, D]."""

    def __init__(self, config: Glm5Config, files: Sequence[DataFile]) -> None:
        super().__init__(files)
        self._config = config

    def notes(self) -> dict[str, str]:
        """Metadata: what cannot be seen in the graph."""
        return {"architecture": "glm-dsa", "index_topk": str(self._config.index_topk)}

    def step(self, layers: Sequence[int]) -> _Step:
        """Declares the inputs that every call has, and what follows from them.

        Args:
            layers: whose caches are inputs.
        """
        config = self._config
        tokens = self.once("Shape", self.input(TOKENS, [_BATCH, _NEW], integers=True))
        positions = self.input(POSITIONS, [_BATCH, _NEW], integers=True)
        for layer in layers:
            for kind, width in self._cache_widths(layer).items():
                self.input(f"past.{layer}.{kind}", [_BATCH, _PAST, width])
        zero, one = self.numbers(0), self.numbers(1)
        past = self.node("Squeeze", self.node("Shape", f"past.{layers[0]}.latent", start=1, end=2))
        all_tokens = self.node("Add", past, self.node("Gather", tokens, one))
        places = self.node("Unsqueeze", self.node("Range", past, all_tokens, one), self.numbers([-1]))
        visible = self.node("LessOrEqual", self.node("Range", zero, all_tokens, one), places)
        whole = self.node("Unsqueeze", all_tokens, self.numbers([0]))
        return _Step(
            tokens=tokens,
            angles=self._angles(positions),
            places=places,
            visible=visible,
            selected=self.node("Min", whole, self.numbers([config.index_topk])),
        )

    def embedded(self) -> str:
        """Rows [T, D] of the token ids."""
        ids = self.node("Reshape", TOKENS, self.numbers([-1]))
        return self.rows(EMBEDDING, ids)

    def head(self, x: str, norm: str) -> None:
        """The last norm and the head, as outputs."""
        config, tokens = self._config, self.once("Shape", TOKENS)
        hidden = self.rms_norm(x, norm, config.rms_norm_eps)
        logits = self.linear(hidden, LM_HEAD)
        ends = ((logits, LOGITS, config.vocab_size), (hidden, HIDDEN, config.hidden_size))
        for value, name, width in ends:
            self.output(self.reshape(value, tokens, [width]), name, [_BATCH, _NEW, width])

    def _angles(self, positions: str) -> tuple[str, str]:
        """As `rotary_angles`: frequency and product both in float32, the frequencies by torch, whose last bits numpy's powers do
        not have; at a position of a million that is 0.03 radian."""
        dims = self._config.qk_rope_head_dim
        frequencies = 1.0 / self._config.rope_theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        wide = self.node("Cast", positions, to=self.float32)
        angles = self.node("Mul", self.node("Unsqueeze", wide, self.numbers([-1, -2])), self.floats(frequencies.numpy()))
        return self.node("Cos", angles), self.node("Sin", angles)

    def _cache_widths(self, layer: int) -> dict[str, int]:
        config = self._config
        widths = {"latent": config.kv_lora_rank, "rope_key": config.qk_rope_head_dim}
        return widths | ({"index_key": config.index_head_dim} if config.owns_indexer(layer) else {})

    # -- a layer -------------------------------------------------------------------------------------------------------

    def layer(self, layer: int, x: str, indices: str, step: _Step) -> tuple[str, str]:
        """One decoder layer.

        Args:
            layer: its number.
            x: residual rows [T, D].
            indices: what the layer below selected, [B, S, K].
            step: of the call.

        Returns:
            The residual rows after it, and the selection that the next layer may share.
        """
        config, prefix = self._config, layer_prefix(layer)
        normed = self.rms_norm(x, f"{prefix}input_layernorm.weight", config.rms_norm_eps)
        attended, indices = self._attention(layer, normed, indices, step)
        x = self.node("Add", x, attended)
        normed = self.rms_norm(x, f"{prefix}post_attention_layernorm.weight", config.rms_norm_eps)
        if config.is_moe(layer):
            shared = self.mlp(normed, f"{prefix}mlp.shared_experts.")
            return self.node("Add", x, self.node("Add", self.routed(normed, f"{prefix}mlp."), shared)), indices
        return self.node("Add", x, self.mlp(normed, f"{prefix}mlp.")), indices

    def _attention(self, layer: int, hidden: str, indices: str, step: _Step) -> tuple[str, str]:
        config, prefix = self._config, f"{layer_prefix(layer)}self_attn."
        heads, latent_dim, rope_dim = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        eps, turn = config.latent_norm_eps, config.rope_interleave
        residual = self.rms_norm(self.linear(hidden, f"{prefix}q_a_proj.weight"), f"{prefix}q_a_layernorm.weight", eps)
        query = self.reshape(self.linear(residual, f"{prefix}q_b_proj.weight"), step.tokens, [heads, config.qk_head_dim])
        query_nope, query_rope = self.cut(query, [config.qk_nope_head_dim, rope_dim])
        query_rope = self.rotate(query_rope, step.angles, (rope_dim, 0), interleaved=turn)
        joint = self.linear(hidden, f"{prefix}kv_a_proj_with_mqa.weight")
        latent, rope_key = self.cut(self.reshape(joint, step.tokens, [1, latent_dim + rope_dim]), [latent_dim, rope_dim])
        latent = self.rms_norm(latent, f"{prefix}kv_a_layernorm.weight", eps)
        rope_key = self.rotate(rope_key, step.angles, (rope_dim, 0), interleaved=turn)
        latents, rope_keys = self._cached(layer, "latent", latent), self._cached(layer, "rope_key", rope_key)
        if config.owns_indexer(layer):
            indices = self._select(layer, hidden, residual, step)
        w_uk, w_uv = self._absorbed(prefix)
        query_latent = self._by_head(query_nope, w_uk)
        out = self._attend(query_latent, query_rope, latents, rope_keys, indices, step)
        values = self._by_head(out, self.node("Transpose", w_uv, perm=[0, 2, 1]))
        rows = self.node("Reshape", values, self.numbers([-1, heads * config.v_head_dim]))
        return self.linear(rows, f"{prefix}o_proj.weight"), indices

    def _cached(self, layer: int, kind: str, new: str) -> str:
        """past | new [B, S, 1, W], which is also an output."""
        name, width = f"{layer}.{kind}", self._cache_widths(layer)[kind]
        whole = self.node("Concat", f"past.{name}", self.node("Squeeze", new, self.numbers([2])), axis=1)
        self.output(whole, f"present.{name}", [_BATCH, _ALL, width])
        return str(whole)

    def _absorbed(self, prefix: str) -> tuple[str, str]:
        """kv_b as W_UK [H, N, C] and W_UV [H, V, C]."""
        config = self._config
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        sizes = self.numbers([config.num_attention_heads, nope + value, config.kv_lora_rank])
        whole = self.node("Reshape", self.weight(f"{prefix}kv_b_proj.weight"), sizes)
        w_uk, w_uv = self.node("Split", whole, self.numbers([nope, value]), outputs=2, axis=1)
        return w_uk, w_uv

    def _by_head(self, x: str, weight: str) -> str:
        """x[b, s, h] @ weight[h] of x [B, S, H, *]."""
        heads_first = self.node("MatMul", self.node("Transpose", x, perm=[0, 2, 1, 3]), weight)
        return str(self.node("Transpose", heads_first, perm=[0, 2, 1, 3]))

    def _select(self, layer: int, hidden: str, residual: str, step: _Step) -> str:
        """The lightning indexer: positions [B, S, K] by descending score; those beyond the token's own place are cut later."""
        config, prefix = self._config, f"{layer_prefix(layer)}self_attn.indexer."
        heads, dims, rope_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        sizes, turn = (rope_dim, dims - rope_dim), config.indexer_rope_interleave
        query = self.reshape(self.linear(residual, f"{prefix}wq_b.weight"), step.tokens, [heads, dims])
        query = self.rotate(query, step.angles, sizes, interleaved=turn)
        norm = [self.weight(f"{prefix}k_norm.{part}") for part in ("weight", "bias")]
        key = self.linear(hidden, f"{prefix}wk.weight")
        key = self.node("LayerNormalization", key, *norm, axis=-1, epsilon=config.index_norm_eps)
        key = self.rotate(self.reshape(key, step.tokens, [1, dims]), step.angles, sizes, interleaved=turn)
        keys = self.node("Unsqueeze", self._cached(layer, "index_key", key), self.numbers([1]))
        dots = self.node("Relu", self.node("MatMul", query, self.node("Transpose", keys, perm=[0, 1, 3, 2])))
        weights = self.linear(hidden, f"{prefix}weights_proj.weight")
        weights = self.node("Mul", weights, self.floats((heads * dims) ** -0.5))
        scores = self.node("MatMul", self.reshape(weights, step.tokens, [1, heads]), dots)
        scores = self.node("Squeeze", scores, self.numbers([2]))
        visible = self.node("Where", step.visible, scores, self.floats(-np.inf))
        return str(self.node("TopK", visible, step.selected, outputs=2, axis=-1)[1])

    def _attend(self, query_latent: str, query_rope: str, latents: str, rope_keys: str, indices: str, step: _Step) -> str:
        """softmax over the selected rows of scale * (query . row) times the latents: [B, S, H, C]."""
        last = self.numbers([-1])
        chosen = self.once("Unsqueeze", indices, last)
        rows, ropes = (self.node("GatherND", cache, chosen, batch_dims=1) for cache in (latents, rope_keys))
        parts = [
            self.node("MatMul", query, self.node("Transpose", keys, perm=[0, 1, 3, 2]))
            for query, keys in ((query_latent, rows), (query_rope, ropes))
        ]
        scores = self.node("Mul", self.node("Add", *parts), self.floats(self._config.softmax_scale))
        seen = self.once("Unsqueeze", self.once("LessOrEqual", indices, step.places), self.numbers([2]))
        weights = self.node("Softmax", self.node("Where", seen, scores, self.floats(-np.inf)), axis=-1)
        return str(self.node("MatMul", weights, rows))

    # -- experts -------------------------------------------------------------------------------------------------------

    def routed(self, hidden: str, prefix: str) -> str:
        """The weighted sum of the chosen experts, [T, D]."""
        affinities = self.sigmoid(self.linear(hidden, f"{prefix}gate.weight"))
        scores = self.node("Add", affinities, self.weight(f"{prefix}gate.e_score_correction_bias"))
        scores = self._within_groups(scores)
        mix = self._int4_experts if self.has(f"{prefix}experts.gate_up{CODES}") else self._float_experts
        mixed = mix(hidden, scores, affinities, f"{prefix}experts.")
        return str(self.node("Mul", mixed, self.floats(self._config.routed_scaling_factor)))

    def _within_groups(self, scores: str) -> str:
        """-inf for experts outside of the best groups, each scored by its two best experts."""
        config = self._config
        groups, experts = config.n_group, config.n_routed_experts
        if groups == config.topk_group:
            return scores
        grouped = self.node("Reshape", scores, self.numbers([-1, groups, experts // groups]))
        best = self.node("TopK", grouped, self.numbers([2]), outputs=2, axis=-1)[0]
        totals = self.node("ReduceSum", best, self.numbers([-1]), keepdims=0)
        kept = self.node("TopK", totals, self.numbers([config.topk_group]), outputs=2, axis=-1)[1]
        marks = self.node("ScatterElements", self.filled(totals, -np.inf), kept, self.filled(kept, 0.0), axis=1)
        marked = self.node("Add", grouped, self.node("Unsqueeze", marks, self.numbers([-1])))
        return str(self.node("Reshape", marked, self.numbers([-1, experts])))

    def _int4_experts(self, hidden: str, scores: str, affinities: str, prefix: str) -> str:
        config, names = self._config, {"x": hidden, "scores": scores, "route_weights": affinities}
        blocks = {}
        for stack in (f"{prefix}gate_up", f"{prefix}down"):
            blocks[stack] = 2 * self.shape_of(stack + CODES)[2] // self.shape_of(stack + SCALES)[2]
        block = min(blocks.values())  # one for both products
        for stack, own in blocks.items():
            names[f"{stack.removeprefix(prefix)}_codes"] = self.stored(stack + CODES)
            names[f"{stack.removeprefix(prefix)}_scales"] = self._repeated(stack + SCALES, own // block)
        choices = {"top_k": config.num_experts_per_tok, "group_size": block}
        return self.add_node(qmoe_node(names, f"{prefix}mixed", renormalise=config.norm_topk_prob, **choices))

    def _repeated(self, name: str, times: int) -> str:
        """Scales [E, rows, groups] with each repeated."""
        experts, rows, groups = self.shape_of(name)
        if times == 1:
            return self.weight(name)
        column = self.node("Unsqueeze", self.weight(name), self.numbers([-1]))
        wide = self.node("Expand", column, self.numbers([experts, rows, groups, times]))
        return str(self.node("Reshape", wide, self.numbers([experts, rows, groups * times])))

    def _float_experts(self, hidden: str, scores: str, affinities: str, prefix: str) -> str:
        """Every expert computes every row: there is no standard operator that does less."""
        config = self._config
        ids = self.node("TopK", scores, self.numbers([config.num_experts_per_tok]), outputs=2, axis=-1)[1]
        weights = self.node("GatherElements", affinities, ids, axis=1)
        if config.norm_topk_prob:
            total = self.node("ReduceSum", weights, self.numbers([-1]), keepdims=1)
            weights = self.node("Div", weights, self.node("Add", total, self.floats(1e-20)))
        mixed = self.node("ScatterElements", self.filled(affinities, 0.0), ids, weights, axis=1)

        def product(x: str, projection: str) -> str:
            return str(self.node("MatMul", x, self.node("Transpose", self.weight(prefix + projection), perm=[0, 2, 1])))

        rows = self.node("Unsqueeze", hidden, self.numbers([0]))
        results = product(self.gated(product(rows, "gate"), product(rows, "up")), "down")
        columns = self.node("Unsqueeze", self.node("Transpose", mixed, perm=[1, 0]), self.numbers([-1]))
        return str(self.node("ReduceSum", self.node("Mul", results, columns), self.numbers([0]), keepdims=0))
