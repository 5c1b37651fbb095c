"""Deliberately broken operators: the source of a reference with one place changed.

A mutant names the text that it replaces, which must stand exactly once in the module: a reference that is rewritten makes its
mutants fail loudly instead of testing nothing. Used by the tests of parity and of bisect.
"""

# ruff: noqa: E501 - the table shows each edit on one line
from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm5_port.operators import cache, cache_layouts
from glm5_port.registry import OPERATORS, PORTABLE, Implementation


@dataclass(frozen=True)
class Mutant:
    """A mistake somebody could make.

    Attributes:
        operator: whose reference is broken.
        mistake: what is wrong, for people.
        edits: text in the operator's module -> its replacement.
        layout_edits: the same for `glm5_port.operators.cache_layouts`, seen by this operator only.
    """

    operator: str
    mistake: str
    edits: Mapping[str, str] = field(default_factory=dict)
    layout_edits: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.operator}: {self.mistake}"

    def function(self) -> Callable[..., Any]:
        """The broken function, with the signature of the reference."""
        extra: dict[str, Any] = {"cache_layout": cache.cache_layout}  # a copy of that module would know no layouts
        if self.layout_edits:
            layouts = _edited(cache_layouts.__name__, self.layout_edits, {})
            broken = {(x.kind, x.name): x for x in vars(layouts).values() if type(x).__name__ == "CacheLayout"}
            extra["cache_layout"] = lambda kind, name: broken[kind, name]
        module = _edited(OPERATORS[self.operator].__module__, self.edits, extra)
        return getattr(module, self.operator)

    def implementation(self) -> Implementation:
        """The broken function as an implementation that nobody registered; it promises the rule that a mutant may break."""
        reference = OPERATORS[self.operator].implementations["reference"]
        return dataclasses.replace(
            reference,
            backend=PORTABLE,
            variant="mutant",
            function=self.function(),
            torch_op=None,
            promises=frozenset({"tie_rule"}),
        )


def _edited(module: str, edits: Mapping[str, str], extra: Mapping[str, Any]) -> types.ModuleType:
    """A private copy of an operator module with `edits` made. Operators that it declares become plain functions, whose
    `.reference` is themselves, so that they call each other's broken copies."""
    source = Path(importlib.import_module(module).__file__).read_text()
    for old, new in edits.items():
        if source.count(old) != 1:
            raise ValueError(f"{module}: {old!r} stands {source.count(old)} times in the source, not once: update the mutant")
        source = source.replace(old, new)
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    copy = types.ModuleType(f"{module}__mutant")
    copy.__dict__["register_layout"] = lambda layout: layout
    tree.body = [node for node in tree.body if not _imports(node, "register_layout")]
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    try:
        exec(compile(tree, f"<mutant of {module}>", "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
    copy.__dict__.update(extra)
    for name, value in vars(copy).items():
        if name in OPERATORS and isinstance(value, types.FunctionType):
            value.reference = value
    return copy


def _imports(node: ast.AST, name: str) -> bool:
    """Takes `name` out of an import statement; True when nothing else was imported by it."""
    if isinstance(node, ast.ImportFrom):
        node.names = [alias for alias in node.names if alias.name != name]
        return not node.names
    return False


MUTANTS = (
    Mutant("rms_norm", "eps ignored", {"keepdim=True) + eps)": "keepdim=True) + 0 * eps)"}),
    Mutant("rms_norm", "weight left out", {"scale * weight.to(x_wide.dtype)).to": "scale).to"}),
    Mutant("rms_norm", "mean subtracted, as LayerNorm does", {"x_wide.square().mean(": "(x_wide - x_wide.mean(-1, keepdim=True)).square().mean("}),
    Mutant("rms_norm", "sum of squares in the working dtype", {"x_wide = x.to(accumulation_dtype(x))": "x_wide = x"}),
    Mutant("add_rms_norm", "residual not returned", {"weight, eps), total": "weight, eps), x"}),
    Mutant("add_rms_norm", "residual left out of the norm", {"rms_norm.reference(total,": "rms_norm.reference(x,"}),
    Mutant("linear", "accumulated in bfloat16", {"F.linear(x.to(wide), weight.to(wide)).to(x.dtype)": "F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)"}),
    Mutant("linear", "last input channel left out", {"F.linear(x.to(wide), weight.to(wide))": "F.linear(x.to(wide)[..., 1:], weight.to(wide)[:, 1:])"}),
    Mutant("linear_per_head", "accumulated in bfloat16", {"hoi->tho\", x.to(wide), weight.to(wide)).to(x.dtype)": "hoi->tho\", x.bfloat16(), weight.bfloat16()).to(x.dtype)"}),
    Mutant("linear_per_head", "the matrix of the head before", {"hoi->tho\", x.to(wide), weight.to(wide))": "hoi->tho\", x.to(wide), weight.to(wide).roll(1, 0))"}),
    Mutant("gated_mlp", "gate and up swapped", {"gate, up =": "up, gate ="}),
    Mutant("gated_mlp", "gelu instead of silu", {"F.silu(gate)": "F.gelu(gate)"}),
    Mutant("rotate", "half-split pairs for interleaved ones", {"rotated[..., 0::2], rotated[..., 1::2]": "rotated[..., :pairs], rotated[..., pairs:]"}),
    Mutant("rotate", "pairs permuted when written back, as Hugging Face does", {"flatten(-2) if interleaved else": "transpose(-1, -2).flatten(-2) if interleaved else"}),
    Mutant("rotate", "turned the other way", {"first * cos_wide - second * sin_wide, second * cos_wide + first": "first * cos_wide + second * sin_wide, second * cos_wide - first"}),
    Mutant("rotate", "last channels instead of the first", {"x.split([start, 2 * pairs, x.shape[-1] - start - 2 * pairs], dim=-1)": "x.split([x.shape[-1] - 2 * pairs, 2 * pairs, 0], dim=-1)"}),
    Mutant("mla_project", "latent norm skipped", {"latent = rms_norm.reference(latent, kv_a_norm, latent_norm_eps)": "latent = latent.clone()"}),
    Mutant("mla_project", "rope key normalised too", {"rotate.reference(rope_key[:, None]": "rotate.reference(rms_norm.reference(rope_key, torch.ones_like(rope_key[0]), latent_norm_eps)[:, None]"}),
    Mutant("mla_project", "rope layout of the other kind", {"query_rope = rotate.reference(query_rope, cos, sin, interleaved=rope_interleaved": "query_rope = rotate.reference(query_rope, cos, sin, interleaved=not rope_interleaved"}),
    Mutant("mla_project", "rope part of a head first", {"query_nope, query_rope = query.split([nope_dim, rope_dim], dim=-1)": "query_rope, query_nope = query.split([rope_dim, nope_dim], dim=-1)"}),
    Mutant("mla_prologue", "query_residual before its norm is given on", {"query = _matmul(query_residual, q_b)": "query_residual = _matmul(hidden, q_a); query = _matmul(query_residual, q_b)"}),
    Mutant("mla_prologue", "w_uk of the next head", {"query_nope.to(wide), w_uk.to(wide)": "query_nope.to(wide), w_uk.to(wide).roll(1, 0)"}),
    Mutant("mla_prologue_into_cache", "cache row written one slot off", {"latent_cache, slots, cache_format": "latent_cache, torch.where(slots > 0, slots - 1, slots), cache_format"}),
    Mutant("mla_prologue_into_cache", "padding token written", {"latent_cache, slots, cache_format": "latent_cache, slots.clamp_min(0), cache_format"}),
    Mutant("write_cache", "written one slot off", {"torch.where(slots < 0, total, slots)": "torch.where(slots < 0, total, (slots + 1) % total)"}),
    Mutant("write_cache", "padding token written to slot 0", {"torch.where(slots < 0, total, slots)": "slots.clamp_min(0)"}),
    Mutant("write_cache", "fp8 scale left out", {}, {"parts = (to_e4m3(values), _bytes(scales, torch.float32, torch.uint8)": "parts = (to_e4m3(values), _bytes(torch.ones_like(scales), torch.float32, torch.uint8)"}),
    Mutant("write_cache", "int8 values cut instead of rounded", {}, {"0.0, x.round()": "0.0, x.trunc()"}),
    Mutant("write_cache", "index scale rounded down to a power of two", {}, {"(bits + 0x007FFFFF) & 0x7F800000": "bits & 0x7F800000"}),
    Mutant("mla_attention_expanded", "causal cut one too late", {"device=positions.device) <= positions": "device=positions.device) <= 1 + positions"}),
    Mutant("mla_attention_expanded", "causal cut one too early", {"device=positions.device) <= positions": "device=positions.device) < positions"}),
    Mutant("mla_attention_expanded", "scale left out", {'torch.einsum("uc,hvc->uhv", latent, w_uv.to(wide))': 'torch.einsum("uc,hvc->uhv", latent, w_uv.to(wide)); scale = 1.0'}),
    Mutant("mla_attention_absorbed", "causal cut one too late", {"device=positions.device) <= positions": "device=positions.device) <= 1 + positions"}),
    Mutant("mla_attention_absorbed", "other sequences seen", {"slots_at(block_table, torch.full_like(positions[0], sequence)": "slots_at(block_table, torch.full_like(positions[0], 0)"}),
    Mutant("mla_attention_absorbed", "rope part left out", {'torch.einsum("thc,uc->thu", query_latent.to(wide), latent)': 'torch.einsum("thc,uc->thu", query_latent.to(wide), latent); rope_key = 0 * rope_key'}),
    Mutant("attention_output", "w_uv of the next head", {"w_uv.to(wide)).to(latent_out.dtype)": "w_uv.to(wide).roll(1, 0)).to(latent_out.dtype)"}),
    Mutant("attention_output", "channels of all heads interleaved", {"_matmul(value.flatten(1), o)": "_matmul(value.transpose(1, 2).flatten(1), o)"}),
    Mutant("sparse_mla_attention", "-1 treated as position 0", {"visible = (indices >= 0) & (indices <=": "indices = indices.clamp_min(0); visible = (indices >= 0) & (indices <="}),
    Mutant("sparse_mla_attention", "causal cut left out", {"& (indices <= positions[:, None])": ""}),
    Mutant("sparse_mla_attention", "causal cut one too early", {"(indices <= positions[:, None])": "(indices < positions[:, None])"}),
    Mutant("sparse_mla_attention", "scale applied to half of the score", {"visible_softmax(scores * scale": "visible_softmax(scores * (scale * 0.5)"}),
    Mutant("sparse_mla_attention", "weights rounded to bfloat16", {"torch.einsum(\"thk,tkc->thc\", weights,": "torch.einsum(\"thk,tkc->thc\", weights.bfloat16().to(wide),"}),
    Mutant("indexer_prologue", "rope on the last channels", {
        "query_TJX = rotate.reference(query_TJX, cos, sin, interleaved=rope_interleaved, start=0)":
        "query_TJX = rotate.reference(query_TJX, cos, sin, interleaved=rope_interleaved, start=head_dim - 2 * cos.shape[-1])"}),
    Mutant("indexer_prologue", "key norm without its bias", {"k_norm_weight.to(wide), k_norm_bias.to(wide), k_norm_eps": "k_norm_weight.to(wide), None, k_norm_eps"}),
    Mutant("indexer_prologue", "scale of the heads left out", {"(heads * head_dim) ** -0.5": "head_dim ** -0.5"}),
    Mutant("indexer_prologue", "head weights rounded to the working dtype", {"(heads * head_dim) ** -0.5": "(heads * head_dim) ** -0.5\n    head_weights_TJ = head_weights_TJ.to(hidden.dtype).to(wide)"}),
    Mutant("indexer_scores", "ReLU missing", {"torch.relu(index_query.to(wide) @ keys_SX.T)": "(index_query.to(wide) @ keys_SX.T)"}),
    Mutant("indexer_scores", "ReLU after the sum of heads", {"torch.relu(index_query.to(wide) @ keys_SX.T)": "(index_query.to(wide) @ keys_SX.T)", "head_weights.to(wide), dots_TJS)": "head_weights.to(wide), dots_TJS).relu()"}),
    Mutant("indexer_scores", "causal cut one too late", {"positions_S <= positions_T.unsqueeze(1)": "positions_S <= 1 + positions_T.unsqueeze(1)"}),
    Mutant("indexer_scores", "heads summed in bfloat16", {"head_weights.to(wide), dots_TJS)": "head_weights.bfloat16(), dots_TJS.bfloat16()).to(wide)"}),
    Mutant("select_top_k", "ties to the higher position", {
        "(scores.detach() + 0.0).sort(dim=-1, descending=True, stable=True)": "(scores.detach() + 0.0).flip(-1).sort(dim=-1, descending=True, stable=True)",
        "ranked.indices[:, :top_k]": "positions - 1 - ranked.indices[:, :top_k]"}),
    Mutant("select_top_k", "ordered by score", {"order.masked_fill(best == float(\"-inf\"), positions).sort(dim=-1).values": "order.masked_fill(best == float(\"-inf\"), positions)"}),
    Mutant("select_top_k", "invisible positions selected", {"order.masked_fill(best == float(\"-inf\"), positions)": "order"}),
    Mutant("select_top_k", "-0.0 below 0.0", {"(scores.detach() + 0.0).sort": "torch.where((scores == 0) & scores.signbit(), -1e-30, scores.detach()).sort"}),
    Mutant("lightning_indexer", "ReLU missing", {"torch.relu(index_query.to(wide) @ keys_SX.T)": "(index_query.to(wide) @ keys_SX.T)"}),
    Mutant("lightning_indexer", "ties to the higher position", {
        "(scores.detach() + 0.0).sort(dim=-1, descending=True, stable=True)": "(scores.detach() + 0.0).flip(-1).sort(dim=-1, descending=True, stable=True)",
        "ranked.indices[:, :top_k]": "positions - 1 - ranked.indices[:, :top_k]"}),
    Mutant("lightning_indexer", "causal cut one too early", {"positions_S <= positions_T.unsqueeze(1)": "positions_S < positions_T.unsqueeze(1)"}),
    Mutant("lightning_indexer", "one position fewer than asked for", {"return select_top_k.reference(scores, top_k=top_k)": "return F.pad(select_top_k.reference(scores, top_k=top_k)[:, 1:], (0, 1), value=-1)"}),
    Mutant("route_experts", "ties to the higher id", {
        "ids_Tk = biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]":
        "ids_Tk = biased_TE.shape[1] - 1 - biased_TE.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]"}),
    Mutant("route_experts", "biased weights used to combine", {"scores_TE.gather(1, ids_Tk)": "biased_TE.gather(1, ids_Tk)"}),
    Mutant("route_experts", "bias left out of the choice", {"scores_TE + correction_bias.to(scores_TE.dtype), groups": "scores_TE + 0 * correction_bias.to(scores_TE.dtype), groups"}),
    Mutant("route_experts", "not renormalised", {"    if renormalise:": "    if False:"}),
    Mutant("route_experts", "scale left out", {"return weights_Tk * scale,": "return weights_Tk,"}),
    Mutant("route_experts", "scale before the renormalisation", {"weights_Tk = scores_TE.gather(1, ids_Tk)": "weights_Tk = scores_TE.gather(1, ids_Tk) * scale", "return weights_Tk * scale,": "return weights_Tk,"}),
    Mutant("route_experts", "groups scored by their best expert alone", {".values[..., :2].sum(-1)": ".values[..., 0]"}),
    Mutant("route_experts", "softmax instead of sigmoid", {"torch.sigmoid(F.linear(hidden.to(wide), gate.to(wide)))": "torch.softmax(F.linear(hidden.to(wide), gate.to(wide)), -1)"}),
    Mutant("expert_mlp", "half of the experts", {"for expert in range(experts):": "for expert in range((experts + 1) // 2):"}),
    Mutant("expert_mlp", "weighted by one", {"torch.where(chosen_Tk, route_weights, 0.0)": "torch.where(chosen_Tk, torch.ones_like(route_weights), 0.0)"}),
    Mutant("expert_mlp", "combined in bfloat16", {"total_TD = total_TD + term_TD": "total_TD = (total_TD + term_TD).bfloat16().to(wide)"}),
    Mutant("expert_mlp", "foreign ids taken modulo", {"chosen_Tk = ids == expert": "chosen_Tk = ids % experts == expert"}),
    Mutant("dispatch_tokens", "every row takes an expert's first copy", {"copies = (rows % placement.shape[1])": "copies = (rows % 1)"}),
    Mutant("dispatch_tokens", "foreign ids become the first expert", {"torch.where(used, placement[torch.where(used, ids, 0).long(), copies], -1)": "placement[torch.where(used, ids, 0).long(), copies]"}),
    Mutant("dispatch_tokens", "8 bits are not applied", {"in_eight_bits(hidden, bits if form != ALL_REDUCE else 16)": "in_eight_bits(hidden, 16)"}),
    Mutant("combine_tokens", "8 bits are not applied", {"in_eight_bits(results, bits if form == ALL_GATHER else 16)": "in_eight_bits(results, 16)"}),
    Mutant("combine_tokens", "8 bits in every form", {"in_eight_bits(results, bits if form == ALL_GATHER else 16)": "in_eight_bits(results, bits)"}),
    Mutant("int4_quantize_measured", "values are not rounded to bfloat16", {"unsqueeze(-1)).to(torch.bfloat16)).abs()": "unsqueeze(-1))).abs()"}),
    Mutant("int4_quantize_measured", "codes of magnitude 6 count as at the limit", {"codes.abs() >= 7": "codes.abs() >= 6"}),
    Mutant("int4_quantize_measured", "zero groups count as tiny ones", {"(~zero & ~ordinary)": "(~ordinary)"}),
    Mutant("int4_quantize_measured", "the largest error is not a share", {"errors.amax(-1) / amax, 0.0": "errors.amax(-1), 0.0"}),
    Mutant("int4_quantize", "halves away from zero", {"(w.abs() >= boundary) if k % 2 else (w.abs() > boundary)": "w.abs() >= boundary"}),
    Mutant("int4_quantize", "halves toward zero", {"(w.abs() >= boundary) if k % 2 else (w.abs() > boundary)": "w.abs() > boundary"}),
    Mutant("int4_quantize", "the master is not rounded to bfloat16", {"w = weight.to(torch.bfloat16).to(torch.float32)": "w = weight.to(torch.float32)"}),
    Mutant("int4_quantize", "sign of the scale forgotten", {"(w < 0) == (step < 0)": "w >= 0"}),
    Mutant("int4_quantize", "-8 never used", {'-8 if rule == "signed8" else -7': "-7"}),
    Mutant("int4_dequantize", "two's complement for offset binary", {"return dequantize(unpack_int4(packed), scales)": "return dequantize(((unpack_int4(packed) + 8) ^ 8) - 8, scales)"}),
    Mutant("int4_dequantize", "scales of the next group", {"return dequantize(unpack_int4(packed), scales)": "return dequantize(unpack_int4(packed), scales.roll(1, -1))"}),
    Mutant("int4_dequantize", "halves of each byte swapped", {"return dequantize(unpack_int4(packed), scales)": "return dequantize(unpack_int4(packed).unflatten(-1, (-1, 2)).flip(-1).flatten(-2), scales)"}),
    Mutant("int4_matmul", "weight not rounded to bfloat16", {
        "linear.reference(x, int4_dequantize.reference(packed, scales, group_size=group_size))":
        "linear.reference(x, (unpack_int4(packed).float().unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)).flatten(-2))"}),
    Mutant("int4_matmul", "activations rounded to bfloat16", {"return linear.reference(x, int4": "return linear.reference(x.bfloat16().to(x.dtype), int4"}),
    Mutant("int8_matmul", "scale of 128 steps", {"amax.isfinite(), amax / 127,": "amax.isfinite(), amax / 128,"}),
    Mutant("int8_matmul", "cut instead of rounded", {"(x / scales).round()": "(x / scales).trunc()"}),
    Mutant("int8_matmul", "halves away from zero", {"(x / scales).round()": "((x / scales).abs() + 0.5).floor().copysign(x)"}),
    Mutant("int8_matmul", "one scale for all tokens", {"x.abs().amax(-1, keepdim=True)": "x.abs().amax().expand(*x.shape[:-1], 1)"}),
    Mutant("int8_matmul", "infinite rows give numbers", {'amax / 127, float("nan")': "amax / 127, 1.0"}),
    Mutant("int8_matmul", "weight scale left out", {"* weight_scale.to(wide)": "+ 0 * weight_scale.to(wide)"}),
    Mutant("expert_mlp_int4", "gate and up swapped", {"ids, gate_up, down)": "ids, gate_up.roll(gate_up.shape[1] // 2, 1), down)"}),
    Mutant("expert_mlp_int4", "down projection of the next expert", {"ids, gate_up, down)": "ids, gate_up, down.roll(1, 0))"}),
    Mutant("expert_mlp_int4", "group size ignored", {"gate_up_packed, gate_up_scales, group_size=group_size)": "gate_up_packed, gate_up_scales[..., :1].expand(gate_up_scales.shape), group_size=group_size)"}),
    Mutant("expert_mlp_int4_w4a8", "gate and up swapped", {"silu_and_multiply(gate_up)": "silu_and_multiply(gate_up.roll(gate_up.shape[1] // 2, 1))"}),
    Mutant("expert_mlp_int4_w4a8", "activations not quantised", {"codes, row_scales = quantize_rows(x)": "codes, row_scales = x, torch.ones(x.shape[0], 1)"}),
    Mutant("expert_mlp_int4_w4a8", "groups have the row's scale", {"if by_groups:": "if by_groups and False:"}),
    Mutant("expert_mlp_int4_w4a8", "scales of the activation groups reversed", {"group_scales.to(wide)).flatten(-2)": "group_scales.to(wide).flip(-2)).flatten(-2)"}),
    Mutant("expert_mlp_int4_w4a8", "values between have one scale a row", {
        "down_packed[expert], down_scales[expert], by_groups=by_groups)": "down_packed[expert], down_scales[expert], by_groups=False)"}),
    Mutant("expert_mlp_int4_w4a8", "values between the products not quantised", {
        "int4_int8_product(silu_and_multiply(gate_up), down_packed[expert], down_scales[expert], by_groups=by_groups)":
        "linear.reference(silu_and_multiply(gate_up), dequantize(unpack_int4(down_packed[expert]), down_scales[expert]))"}),
    Mutant("expert_mlp_int4_w4a8", "scales of the groups reversed", {"scales.to(wide).unsqueeze(-1)": "scales.to(wide).flip(-1).unsqueeze(-1)"}),
    Mutant("expert_mlp_int4_w4a8", "activation scale left out", {"* row_scales.to(wide)": "+ 0 * row_scales.to(wide)"}),
)  # fmt: skip
