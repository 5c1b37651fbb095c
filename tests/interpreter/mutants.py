# ruff: noqa: E501 - a mutant is one row
"""Triton kernels with one mistake each, which the parity cases must notice through the interpreter.

A mutant is a kernel module with one piece of text exchanged; it is imported in place of the module, and so are the modules that use
it. None touches memory that the kernel would not touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import glm5_port.backends.cuda as cuda

KERNELS = Path(cuda.__file__).parent / "kernels"


@dataclass(frozen=True)
class KernelMutant:
    """One mistake.

    Attributes:
        module: of `kernels/`, that is changed.
        name: the mistake, in words.
        old, new: text that stands once in the module, and what takes its place.
        operator: whose cases must notice.
        cases: names of cases, one of which must fail.
        family: the module that the operator's wrapper asks for.
        dtype: working dtype of the cases.
    """

    module: str
    name: str
    old: str
    new: str
    operator: str
    cases: tuple[str, ...]
    family: str
    dtype: str = "bfloat16"

    @property
    def id(self) -> str:
        return f"{self.module}: {self.name}"

    def source(self) -> str:
        text = (KERNELS / f"{self.module}.py").read_text()
        assert text.count(self.old) == 1, f"{self.id}: the text stands {text.count(self.old)} times in {self.module}.py"
        return text.replace(self.old, self.new)


def _mutants(module: str, family: str, rows: list[tuple[str, str, str, str, str]]) -> list[KernelMutant]:
    """Rows of (operator, cases, name, old, new)."""
    return [
        KernelMutant(module, name, old, new, operator, tuple(cases.split()), family) for operator, cases, name, old, new in rows
    ]


MUTANTS = [
    *_mutants("norm", "norm", [
        ("rms_norm", "odd_width", "the mean counts the padding", "WIDTH * 1.0", "BLOCK * 1.0"),
        ("rms_norm", "odd_width", "the last number of a row is left out", "columns < WIDTH", "columns < WIDTH - 1"),
        ("rms_norm", "tiny_values_eps_1e-5", "eps is forgotten", "mean_square + eps", "mean_square"),
        ("add_rms_norm", "one_token", "the residual is subtracted", "values += tl.load(residual", "values -= tl.load(residual"),
    ]),
    *_mutants("routing", "routing", [
        ("route_experts", "all_equal few_values", "ties go to the higher id", "| (BLOCK - 1 - ids)", "| ids"),
        ("route_experts", "one_token", "the correction is forgotten", "biased = scores + tl.load", "biased = scores + 0 * tl.load"),
        ("route_experts", "one_token", "biased scores are the weights", "tl.where(mine, scores, 0.0)", "tl.where(mine, biased, 0.0)"),
        ("route_experts", "groups few_values_in_groups", "a group's score is its best", "value_of((first >> 32).to(tl.int32)) + ", ""),
        ("route_experts", "negative_biased_scores", "negative scores are in the wrong order", "tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)", "bits"),
        ("route_experts", "odd_sizes", "the end of the hidden size is not cut off", "mask=(rows < tokens)[:, None] & (k < WIDTH)", "mask=(rows < tokens)[:, None] & (k < WIDTH - 1)"),
    ]),
    *_mutants("quantize", "quantize", [
        ("int4_quantize", "ties", "half is rounded away", "SNAP) - SNAP\n", "SNAP) - SNAP + 0.001\n"),
        ("int4_quantize", "matrix", "a seventh is an eighth", "* 4682", "* 4096"),
        ("int4_quantize", "outside_the_range", "small groups have scales of their own", "tl.where(amax_N < SMALLEST_AMAX", "tl.where(amax_N < 0"),
        ("int4_quantize", "group_8", "rows are one group", "(group % GROUPS_OF_ROW) * SIZE", "(group % GROUPS_OF_ROW) * 0"),
        ("int4_quantize", "signed8", "the extreme of signed8 is positive", "-(1 << 15), 0", "0, 0"),
        ("int4_quantize_measured", "matrix", "errors are of the exact product", "value_NP = round_to_bfloat16(code_NP.to(tl.float32) * scale_N[:, None]).to(tl.float32)", "value_NP = code_NP.to(tl.float32) * scale_N[:, None]"),
        ("int4_quantize_measured", "signed8", "only codes of 7 are at the limit", "(tl.abs(code_NP) >= 7)", "(code_NP >= 7)"),
        ("int4_quantize_measured", "group_8", "groups beyond the row count as zeros", "(there & (amax_N == 0))", "(amax_N == 0)"),
        ("int4_quantize_measured", "outside_the_range", "tiny groups have a relative error", "(amax_N >= SMALLEST_AMAX) & ", ""),
        ("int4_quantize_measured", "outside_the_range", "a bad row has statistics", "bad += (amax_N > LARGEST_AMAX)", "bad += (amax_N > 0x7FFF)"),
        ("int4_dequantize", "group_128", "all words have the first scale", "word // WORDS_OF_GROUP", "word * 0"),
        ("int4_dequantize", "every_code", "codes begin at 7", "& 15) - 8", "& 15) - 7"),
    ]),
    *_mutants("weights", "matmul", [
        ("int4_matmul", "one_token", "neighbours are exchanged", "tl.join(even, odd)", "tl.join(odd, even)"),
        ("int4_matmul", "one_token", "runs are taken for words", "((words >> (4 * J)) & 0x000F000F)", "((words >> (2 * J)) & 0x000F000F)"),
        ("int4_matmul", "identity", "weights are not rounded to bfloat16", "even = round_to_bfloat16((even.to(tl.float32) - 136.0) * wide)", "even = (even.to(tl.float32) - 136.0) * wide"),
        ("int4_matmul", "one_token", "codes begin at 7", "odd = round_to_bfloat16((odd.to(tl.float32) - 136.0)", "odd = round_to_bfloat16((odd.to(tl.float32) - 135.0)"),
    ]),
    *_mutants("matmul", "matmul", [
        ("int4_matmul", "group_128 three_dims", "all groups have the first scale", "(start // GROUP) * OUTPUTS", "(start // WIDTH) * OUTPUTS"),
        ("int4_matmul", "per_channel", "the last input of a row is left out", "& (k < WIDTH)[:, None], other=0.0", "& (k < WIDTH - 1)[:, None], other=0.0"),
        ("int8_matmul", "ties", "codes are cut off", "(tl.div_rn(values, scale) + 12582912.0) - 12582912.0", "tl.div_rn(values, scale)"),
        ("int8_matmul", "integers", "codes end at 128", "tl.div_rn(amax, 127.0)", "tl.div_rn(amax, 128.0)"),
        ("int8_matmul", "odd_widths", "the last code of a row is left out", "mask=(r < rows)[:, None] & (k < WIDTH)[None, :], other=0)", "mask=(r < rows)[:, None] & (k < WIDTH - 1)[None, :], other=0)"),
        ("int8_matmul", "not_finite", "NaN is not noticed", "finite = finite & (tl.abs(values) < float(\"inf\"))", "finite = finite & (tl.abs(values) != float(\"inf\"))"),
    ]),
    *_mutants("linear", "linear", [
        ("linear", "odd_widths", "the last input of a row is left out", "there = start + step < WIDTH", "there = start + step < WIDTH - 1"),
        ("linear", "weight_is_a_view", "rows of the weight lie side by side", "n.to(tl.int64) * weight_stride", "n.to(tl.int64) * (weight_stride // 2)"),
        ("linear_per_head", "weight_is_a_view", "inputs of the weight lie side by side", "step.to(tl.int64) * weight_step", "step.to(tl.int64) * 1"),
        ("linear_per_head", "one_token", "every head has the first one's weight", "weight + head * weight_head_stride", "weight + head * 0"),
        ("linear_per_head", "part_of_a_head", "heads are as wide as what is read of them", "head * x_head_stride", "head * WIDTH"),
        ("linear_per_head", "odd_widths", "heads change places in the result", "* heads + head) * OUTPUTS", "* heads + heads - 1 - head) * OUTPUTS"),
        ("linear", "odd_widths", "every segment is the first", "(run * SEGMENTS + segment) * (SEGMENT * BLOCK_K)", "segment * (SEGMENT * BLOCK_K)"),
        ("gated_mlp", "one_token", "gate and up are exchanged", "narrow(silu_times(gate, up), between.dtype.element_ty)", "narrow(silu_times(up, gate), between.dtype.element_ty)"),
        ("gated_mlp", "odd_widths", "up begins a channel early", "row * (2 * WIDTH) + WIDTH + channel", "row * (2 * WIDTH) + WIDTH - 1 + channel"),
    ]),
    *_mutants("experts", "experts", [
        ("expert_mlp", "one_token", "gate and up are exchanged", "narrow(silu_times(gate, up), between.dtype.element_ty)", "narrow(silu_times(up, gate), between.dtype.element_ty)"),
        ("expert_mlp", "ids_out_of_range", "ids below 0 count", "known = (id >= 0) & (id < EXPERTS)\n        weight", "known = id < EXPERTS\n        weight"),
        ("expert_mlp", "many_rows_per_expert", "places in a block begin again with each chunk", "listed = first * BLOCK_B\n", "listed = first * 0\n"),
        ("expert_mlp", "unread_weights", "weights that nobody may read are read", "mask=known, other=0.0)", "mask=token < tokens, other=0.0)"),
        ("expert_mlp", "odd_sizes", "a token is a routed row", "(row // CHOICES)[None, :] * x_stride", "row[None, :] * x_stride % x_stride"),
        ("expert_mlp_int4", "one_token", "gate and up are exchanged in INT4", "narrow(silu_times(gate, up), dtype)", "narrow(silu_times(up, gate), dtype)"),
        ("expert_mlp_int4", "group_64", "up has the scales of gate", "run_of_scales(scales, start, BETWEEN + n,", "run_of_scales(scales, start, n,"),
        ("expert_mlp_int4", "one_token", "every expert has the first one's words", "words + expert * (TILES * 2 * BETWEEN * WORDS)", "words + expert * 0"),
        ("expert_mlp_int4_w4a8", "one_token", "rows have no scale", "sums = sums * tl.load(row_scales + row, mask=used, other=0.0)[None, :]", "sums = sums * 1.0"),
    ]),
]  # fmt: skip
"""Norms, routing, quantiser, products and experts, each with mistakes."""
