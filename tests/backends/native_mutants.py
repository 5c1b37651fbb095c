"""Deliberately broken specifications of the native kernels: a family's scalar.cpp, or its header as scalar.cpp sees it, with one
place changed; and deliberately broken kernels of the tile unit, as its emulation runs them.

A mutant names the text that it replaces, which must stand exactly once: a specification that is rewritten makes its mutants fail
loudly instead of testing nothing. Every one compiles, and touches no memory that the specification would not touch.
"""

# ruff: noqa: E501 - the table shows each edit on one line
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).parents[2] / "glm5_port" / "backends" / "cpu" / "native"
TILES = "matrix.cpp.avx512_bf16.cpp"
"""The unit of a family that holds its kernels of tiles over the emulation."""


@dataclass(frozen=True)
class NativeMutant:
    """A mistake somebody could make.

    Attributes:
        family: folder of the kernels.
        mistake: what is wrong, for people.
        text: what stands exactly once in the file.
        replacement: what stands there instead.
        file: in the folder.
        unit: what is compiled again: the specification, or TILES.
    """

    family: str
    mistake: str
    text: str
    replacement: str
    file: str = "scalar.cpp"
    unit: str = "scalar.cpp"

    @property
    def id(self) -> str:
        return f"{self.family}: {self.mistake}"

    def source(self) -> str:
        """The broken file.

        Raises:
            ValueError: the text stands there never or more than once.
        """
        source = (NATIVE / self.family / self.file).read_text()
        if (count := source.count(self.text)) != 1:
            raise ValueError(f"{self.id}: {self.text!r} stands {count} times in {self.family}/{self.file}, not once")
        return source.replace(self.text, self.replacement)


def _mutants(family: str, edits: list[tuple[str, ...]]) -> list[NativeMutant]:
    return [NativeMutant(family, *edit) for edit in edits]


MUTANTS = [
    *_mutants("quantize", [
        ("the sign counts in a magnitude", ".bits & 0x7FFF;", ".bits;"),
        ("half is rounded away from zero", "std::nearbyint(w / s)", "std::round(w / s)"),
        ("the first group is taken for the second", "weight + group * call.group", "weight + (group == 1 ? 0 : group) * call.group"),
        ("the last of a group is not looked at for its size", "i < call.group; ++i) {\n      const int32_t", "i < call.group - 1; ++i) {\n      const int32_t"),
        ("nibbles are in reverse", "4 * static_cast<int>(place % 8)", "28 - 4 * static_cast<int>(place % 8)"),
        ("codes begin at 7", "static_cast<uint32_t>(code + 8)", "static_cast<uint32_t>(code + 7)"),
        ("rows are taken for dense", "row * call.stride", "row * call.width"),
        ("only one end is a limit", "code == 7 || code == -7", "code == 7"),
        ("codes that are read begin at 7", "& 15) - 8;", "& 15) - 7;"),
        ("nibbles are read in reverse", "(4 * (i % 8))", "(28 - 4 * (i % 8))"),
        ("words that are read are taken for dense", "row * call.packed_stride", "row * (call.width / 8)"),
        ("scales that are read are taken for dense", "row * call.scale_stride", "row * (call.width / call.group)"),
        ("a group that is read has the scale of the first", "row * call.scale_stride + i / call.group", "row * call.scale_stride"),
        ("values are cut off", "round_to_bf16(code * scale)", "bf16{static_cast<uint16_t>(bits_of(code * scale) >> 16)}"),
        ("what is lost is not rounded", "std::fabs(w - widen(round_to_bf16(static_cast<float>(code * s))))", "std::fabs(w - code * s)"),
    ]),
    *_mutants("indexer", [
        ("a token sees the next", "visible(call, tile, 0)", "visible(call, tile, 1)"),
        ("a token does not see itself", "tile.first_position + i + 1", "tile.first_position + i", "indexer.h"),
        ("negative products count", "dot < 0 ? 0 : dot", "dot"),
        ("NaN is rectified to zero", "dot < 0 ? 0 : dot", "dot > 0 ? dot : 0"),
        ("the last channel is left out", "c < call.head_dim", "c < call.head_dim - 1"),
        ("codes of int8 keys are taken for numbers", "widen(static_cast<const int8_t*>(rows.key())[c]) * rows.scale()", "widen(static_cast<const int8_t*>(rows.key())[c])"),
        ("heads are taken for dense", "head * call.query_head_stride", "head * call.head_dim"),
        ("weights of tokens are taken for dense", "token * call.weights_stride + head", "token * call.heads + head"),
        ("ties go to the higher position", "  std::stable_sort(", "  std::reverse(positions.begin(), positions.end());\n  std::stable_sort("),
        ("NaN is the lowest", "std::isnan(a) ? !std::isnan(b) : a > b", "std::isnan(b) ? !std::isnan(a) : a > b"),
        ("minus infinity is selected", "if (widen(scores[i]) != nothing)", "if (true)"),
        ("indices are in the order of scores", "  std::sort(positions.begin(), positions.end());\n", ""),
        ("a second tile of keys repeats the first", "rows[0] + tile_side * depth + i", "rows[0] + i", "matrix.cpp", TILES),
        ("a second tile of heads repeats the first", "query + i * heads_of_group + tile_side", "query + i * heads_of_group", "matrix.cpp", TILES),
        ("padding has the scores of nobody", "call.scores + first_padding(call) * positions, call.scores + call.tokens * positions, nothing", "call.scores + call.tokens * positions, call.scores + call.tokens * positions, nothing"),
    ]),
    *_mutants("attention", [
        ("a token does not see itself", "position < visible", "position < visible - 1"),
        ("every token sees what the last sees", "const int64_t count = visible_keys(call, place_of(call.batch, token));", "const int64_t count = token < last ? keys : 0;"),
        ("the smallest score weighs most", "std::exp(scores[u] - largest)", "std::exp(largest - scores[u])"),
        ("weights are not divided by their sum", "total == 0 ? 1 : total", "1"),
        ("fp8 codes have the scale of the next group", "number_in<e4m3>(row.latent, c) * scale_of(row, c / quantised_group)", "number_in<e4m3>(row.latent, c) * scale_of(row, (c / quantised_group + 1) % quantised_groups)"),
        ("codes of int8 rows are taken for numbers", "number_in<int8_t>(row.latent, c) * scale_of(row, c / quantised_group)", "number_in<int8_t>(row.latent, c)"),
        ("the rope part does not score", "row + cache.latent_width, cache.rope_width)", "row + cache.latent_width, 0)"),
        ("index -1 is the first key", "= call.indices[token * call.index_stride + i];", "= larger(0, call.indices[token * call.index_stride + i]);"),
        ("indices are taken for dense", "call.indices[token * call.index_stride + i]", "call.indices[token * call.index_count + i]"),
        ("every head expands by the first head's weights", "(head * width + n) * latent_width + c", "n * latent_width + c"),
        ("heads of an output take the first head's weights", "head * call.weight_head_stride + n", "n"),
        ("rows of an output are taken for dense", "n * call.weight_row_stride + k", "n * call.width_in + k"),
        ("padding is left as it was", "for (int64_t i = placed * row;", "for (int64_t i = call.tokens * row;"),
        ("a token belongs to the sequence before", "return {first, batch.lengths[first] -", "return {first ? first - 1 : 0, batch.lengths[first] -", "attention.h"),
    ]),
    *_mutants("matmul", [
        ("codes begin at 7", "& 15) - 8;", "& 15) - 7;"),
        ("nibbles are exchanged", "(4 * (place % 2))", "(4 - 4 * (place % 2))"),
        ("a row has the scale of the next", "+ row % panel_rows]", "+ (row + 1) % panel_rows]"),
        ("weights are not rounded to bfloat16", "widen(round_to_bf16(static_cast<float>(code_of(weight, row, input)) * scale_of(weight, row, input)))", "static_cast<float>(code_of(weight, row, input)) * scale_of(weight, row, input)"),
        ("the last input is left out", "input < weight.width; ++input) sum += widen", "input < weight.width - 1; ++input) sum += widen"),
        ("gate and up are exchanged", "silu_times(product(x, gate, i), product(x, up, i))", "silu_times(product(x, up, i), product(x, gate, i))"),
        ("the sigmoid falls", "std::exp(-gate)", "std::exp(gate)"),
        ("route weights are forgotten", "down, output) * route_weight;\n    }", "down, output);\n    }"),
        ("an id that is out of range is the first expert", "expert = call.ids[choice];", "expert = call.ids[choice] < 0 || call.ids[choice] >= call.experts ? 0 : call.ids[choice];"),
        ("rows of experts are taken for dense", "token * call.stride, expert", "token * call.gate.width, expert"),
        ("8-bit codes end at 128", "scale / 127", "scale / 128"),
        ("8-bit codes are cut off", "std::nearbyint(widen(x[i]) / scale)", "widen(x[i]) / scale"),
        ("NaN is not noticed in 8 bits", "!(size <= scale)", "size > scale"),
        ("all groups have the first scale", "scale_of(weight, row, start)", "scale_of(weight, row, 0)"),
        ("rows of 8-bit weights have no scale", "(x.scales[0] * weight.scales[row])", "x.scales[0]"),
        ("groups of 8-bit activations have the first scale", "x.scales[start / weight.group]", "x.scales[0]"),
        ("INT4 codes of tiles have no sign", "_mm512_set1_epi8(8)", "_mm512_set1_epi8(0)", "int4_tiles.h", TILES),
        ("the last of an odd number of units is left out of tiles", "if (i < units) {", "if (i + 1 < units) {", "int4_tiles.h", TILES),
        ("a second tile of rows repeats the first", "at(tile + some - 1, 0)", "at(tile, 0)", "int4_tiles.h", TILES),
        ("pieces of tiles have the first scale of their rows", "panel_rows), steps + piece);", "panel_rows), steps);", "int4_tiles.h", TILES),
        ("sums of INT8 tiles begin anew with every chunk", "if (begin) {", "if (true) {", "int8_tiles.h", TILES),
        ("a quarter of the outputs of INT8 tiles repeats another", "_mm512_shuffle_i64x2(low01, low23, 0xDD)", "_mm512_shuffle_i64x2(low01, low23, 0x88)", "int8_tiles.h", TILES),
    ]),
    *_mutants("cache", [
        ("NaN is not large", "magnitude > amax || magnitude != magnitude", "magnitude > amax"),
        ("the last of a group is not looked at for its size", "i < first + count; ++i", "i < first + count - 1; ++i"),
        ("every group has the numbers of the first", "call.latent, token, first, latent_group, scale", "call.latent, token, 0, latent_group, scale"),
        ("fp8 has the largest code of int8", "(call.is_fp8 ? largest_e4m3 : largest_int8)", "largest_int8"),
        ("half is rounded up", "+ 0x7FFFF + (bits >> 20 & 1)", "+ 0x80000"),
        ("subnormal codes are cut off", "std::nearbyint(magnitude * 0x1p9f)", "magnitude * 0x1p9f"),
        ("int8 codes are rounded away from zero", "std::nearbyint(x)", "std::round(x)"),
        ("NaN has a code of int8", "if (x != x) return 0;", "if (x != x) return 1;"),
        ("int8 codes are of the scale before its rounding", "    scale = widen(rounded);\n", "    scale = amax / largest_int8;\n"),
        ("rows are taken for dense", "token * rows.stride + i", "token * rows.width + i"),
        ("the first row of the cache is padding", "slots.slots[token] >= 0", "slots.slots[token] > 0"),
        ("the last byte is left out", "call.rows + token * call.stride, call.bytes);", "call.rows + token * call.stride, call.bytes ? call.bytes - 1 : 0);"),
    ]),
    *_mutants("small", [
        ("the mean is not subtracted", "(values[i] - static_cast<float>(mean)) * scale", "values[i] * scale"),
        ("the mean is of one more", "mean /= static_cast<double>(call.width)", "mean /= static_cast<double>(call.width + 1)"),
        ("the residual is not normalised", "      values[i] = widen(sum[i]);\n", ""),
        ("the bias is forgotten", "call.bias ? normal + call.bias[i] : normal", "normal"),
        ("the rotation is mirrored", "a * cosine - b * sine", "a * cosine + b * sine"),
        ("neighbours are always a pair", "(call.interleaved ? 1 : call.pairs)", "1"),
        ("the part before the pairs is rotated", "first = call.start + (", "first = ("),
        ("the sigmoid falls", "std::exp(-logit)", "std::exp(logit)"),
        ("the correction is forgotten", "order_of(scores[e] + call_.correction_bias[e])", "order_of(scores[e])", "small.h"),
        ("weights are not renormalised", "call_.renormalise ? scores", "false ? scores", "small.h"),
        ("ties go to the higher expert", "orders[best[place - 1]] < orders[i]", "orders[best[place - 1]] <= orders[i]", "small.h"),
    ]),
]  # fmt: skip
"""The families of native/, each with mistakes that its tests (native/tests) must notice."""
