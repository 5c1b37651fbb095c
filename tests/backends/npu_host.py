"""A torch_npu for tests on the CPU: the frozen schemas of one version, each with a body of host maths written from the documents.

Calls go through `torch.library` operators defined with the vendor's own schema, so that names, types and required arguments are
checked by torch itself. What the vendor leaves undefined (rows that nobody counts, outputs that a mode does not fill) is NaN, or
a number that no caller can mistake for a result. Nothing here says anything about the numbers of real kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_port.backends.npu import machine as vendor
from tests.backends.npu_schemas import frozen

BODIES: dict[str, Callable[..., Any]] = {}


def body(function: Callable[..., Any]) -> Callable[..., Any]:
    BODIES[function.__name__] = function
    return function


@functools.cache
def _defined(version: str) -> tuple[torch.library.Library, Any]:
    """The operators of a version, and the library that keeps them alive."""
    namespace = f"npu_frozen_{version.replace('.', '_')}"
    library = torch.library.Library(namespace, "DEF")
    for name, schema in frozen(version).items():
        library.define(schema)
        library.impl(name, _with_defaults(schema, BODIES[name]), "CompositeExplicitAutograd")
    return library, getattr(torch.ops, namespace)


def _with_defaults(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Torch leaves out arguments that equal their default; bodies get all of them."""
    arguments = torch._C.parse_schema(f"npu::{schema}").arguments
    by_place = [a.default_value for a in arguments if not a.kwarg_only]
    by_name = {a.name: a.default_value for a in arguments if a.kwarg_only}
    return lambda *args, **kwargs: function(*args, *by_place[len(args) :], **(by_name | kwargs))


class HostTorchNpu:
    """Stands in for the package `torch_npu`; `calls` records (name, args, kwargs)."""

    def __init__(self, version: str = "2.13") -> None:
        self.__version__ = version
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.npu = SimpleNamespace(config=SimpleNamespace(allow_internal_format=False))
        self._operators = _defined(version)[1]

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._operators, name)

        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return operator(*args, **kwargs)

        return record


@contextlib.contextmanager
def host_npu(version: str = "2.13", *, chip: str = "A2", cann: tuple[int, ...] = (9, 1, 0)) -> Iterator[HostTorchNpu]:
    """The backend's calls go to host maths, its rules ask about this machine."""
    package = HostTorchNpu(version)
    with vendor.replaced(package=package, machine=vendor.Machine(chip, cann, version)):
        yield package


# -- bodies --------------------------------------------------------------------------------------------------------------


@body
def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@body
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return *npu_rms_norm(total, gamma, epsilon), total


@body
def npu_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    if rotary_mode == "interleave":
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return x * r1 + turned * r2


@body
def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.float().chunk(2, dim=dim)
    return (F.silu(first) * second).to(x.dtype)


@body
def npu_transpose_batchmatmul(
    x: Tensor, weight: Tensor, *, perm_x1: list[int], perm_x2: list[int], perm_y: list[int], **_: Any
) -> Tensor:
    product = x.permute(perm_x1).float() @ weight.permute(perm_x2).float()
    return product.to(x.dtype).permute(perm_y).contiguous()


@body
def npu_format_cast(x: Tensor, acl_format: int, **_: Any) -> Tensor:
    return x.clone()


@body
def npu_scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    x[tuple(indices.long().unbind(-1))] = updates
    return x


# -- attention -----------------------------------------------------------------------------------------------------------


def _halves_of_pairs(x: Tensor) -> Tensor:
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


@body
def npu_mla_prolog_v3(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor, weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor, rope_cos: Tensor, kv_cache: Tensor, kr_cache: Tensor,
    *, rmsnorm_epsilon_cq: float, rmsnorm_epsilon_ckv: float, cache_mode: str, query_norm_flag: bool, **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert cache_mode == "TND" and query_norm_flag
    heads, nope, latent = weight_uk.shape
    x, cos, sin = token_x.float(), rope_cos.float(), rope_sin.float()

    def rotated(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return npu_rotary_mul(_halves_of_pairs(pairs), cos, sin)

    query_norm, _ = npu_rms_norm(x @ weight_dq.float(), rmsnorm_gamma_cq, rmsnorm_epsilon_cq)
    query = (query_norm.to(token_x.dtype).float() @ weight_uq_qr.float()).unflatten(-1, (heads, -1))
    query_latent = torch.einsum("thn,hnc->thc", query[..., :nope], weight_uk.float())
    query_rope = rotated(query[..., nope:], cos[:, None], sin[:, None])
    row = x @ weight_dkv_kr.float()
    kv_cache.copy_(npu_rms_norm(row[:, :latent], rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv)[0].unsqueeze(1))
    kr_cache.copy_(rotated(row[:, latent:], cos, sin).unsqueeze(1))
    nothing = token_x.new_empty(0)
    like = [t.to(token_x.dtype) for t in (query_latent, query_rope, query_norm)]
    return like[0], like[1], nothing, like[2], nothing.clone()


def _sequences(ends: Any, lengths: Any) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, first row, one past the last row, cached tokens)."""
    first = 0
    for sequence, (end, length) in enumerate(zip(list(map(int, ends)), list(map(int, lengths)), strict=True)):
        assert first <= end
        yield sequence, first, end, length
        first = end


def _rows(cache: Tensor, table: Tensor, sequence: int, length: int) -> Tensor:
    """The first `length` rows of a sequence; entries of the table beyond them are not looked at."""
    page_size = cache.shape[1]
    pages = table[sequence, : -(-length // page_size)].long()
    return cache[pages].flatten(0, 1)[:length].squeeze(1)


@body
def npu_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, *, actual_seq_lengths_query: Tensor, actual_seq_lengths_key: Tensor,
    block_table: Tensor, layout_query: str, layout_key: str, sparse_count: int, sparse_mode: int, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Descending by score; of equal ones the last position first, which the documents allow and the tie rule forbids."""
    found = torch.full((query.shape[0], 1, sparse_count), -1, dtype=torch.int32)
    for sequence, first, end, length in _sequences(actual_seq_lengths_query, actual_seq_lengths_key):
        keys = _rows(key, block_table, sequence, length).float()
        for row in range(first, end):
            visible = length - (end - first) + (row - first) + 1
            if visible <= 0:
                continue
            scores = (torch.relu(query[row].float() @ keys[:visible].T) * weights[row].float()[:, None]).sum(0)
            order = (scores.shape[0] - 1) - scores.flip(0).sort(descending=True, stable=True).indices[:sparse_count]
            found[row, 0, : order.shape[0]] = order.to(torch.int32)
    return found, query.new_empty(0)


@body
def npu_quant_lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, query_dequant_scale: Tensor, key_dequant_scale: Tensor, query_quant_mode: int,
    key_quant_mode: int, **options: Any,
) -> Tensor:  # fmt: skip
    scaled = (weights.float() * query_dequant_scale.float()).half()
    assert scaled.isfinite().all()
    keys = key.float() * key_dequant_scale.float()[..., None]
    return npu_lightning_indexer(query.float(), keys, scaled, **options)[0]


def _attend(query: Tensor, keys: Tensor, width: int, scale: float) -> Tensor:
    """[H, D] over keys [U, D], whose first `width` channels are the values."""
    weights = torch.softmax(query.float() @ keys.T * scale, dim=-1)
    return (weights @ keys[:, :width]).to(query.dtype)


def _sparse(
    query: Tensor, width: int, rows: Callable[[int, int], Tensor], sparse_indices: Tensor, scale: float, sparse_mode: int,
    ends: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    out = torch.full((*query.shape[:2], width), torch.nan, dtype=query.dtype)
    for sequence, first, end, length in _sequences(ends, lengths):
        keys = rows(sequence, length)
        for row in range(first, end):
            indices = sparse_indices[row, 0]
            count = int((indices >= 0).sum())
            assert (indices[:count] >= 0).all(), "valid indices come first"
            indices = indices[:count].long()
            if sparse_mode == 3:
                indices = indices[indices <= length - (end - first) + (row - first)]
            if len(indices):
                out[row] = _attend(query[row], keys[indices], width, scale)
    return out


@body
def npu_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float, *, block_table: Tensor,
    actual_seq_lengths_query: Tensor, actual_seq_lengths_kv: Tensor, query_rope: Tensor, key_rope: Tensor, sparse_mode: int,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def rows(sequence: int, length: int) -> Tensor:
        return torch.cat([_rows(c, block_table, sequence, length).float() for c in (key, key_rope)], dim=-1)

    both = torch.cat((query, query_rope), dim=-1)
    out = _sparse(
        both, query.shape[-1], rows, sparse_indices, scale_value, sparse_mode, actual_seq_lengths_query, actual_seq_lengths_kv
    )
    return out, query.new_empty(0), query.new_empty(0)


@body
def npu_kv_quant_sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float, key_quant_mode: int,
    value_quant_mode: int, *, block_table: Tensor, actual_seq_lengths_query: Tensor, actual_seq_lengths_kv: Tensor,
    sparse_mode: int, **_: Any,
) -> Tensor:  # fmt: skip
    def rows(sequence: int, length: int) -> Tensor:
        packed = _rows(key, block_table, sequence, length)
        values = packed[:, :512].float().unflatten(-1, (4, 128))
        rope = packed[:, 512:640].contiguous().view(query.dtype).float()
        scales = packed[:, 640:].contiguous().view(torch.float32)
        return torch.cat(((values * scales[..., None]).flatten(1), rope), dim=-1)

    return _sparse(query, 512, rows, sparse_indices, scale_value, sparse_mode, actual_seq_lengths_query, actual_seq_lengths_kv)


@body
def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor, actual_seq_lengths: list[int],
    actual_seq_lengths_kv: list[int], block_table: Tensor, query_rope: Tensor, key_rope: Tensor, scale: float, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert not atten_mask.tril().any() and atten_mask[0, 1:].all()
    out = torch.full_like(query, torch.nan)
    both = torch.cat((query, query_rope), dim=-1)
    for sequence, first, end, length in _sequences(actual_seq_lengths, actual_seq_lengths_kv):
        keys = [_rows(c.transpose(1, 2), block_table, sequence, length).float() for c in (key, key_rope)]
        for row in range(first, end):
            visible = length - (end - first) + (row - first) + 1
            if visible > 0:
                out[row] = _attend(both[row], torch.cat(keys, dim=-1)[:visible], query.shape[-1], scale)
    return out, query.new_empty(0)


# -- experts -------------------------------------------------------------------------------------------------------------


@body
def npu_moe_gating_top_k(
    x: Tensor, k: int, *, bias: Tensor, k_group: int, group_count: int, routed_scaling_factor: float, eps: float, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.sigmoid(x.float())
    grouped = (scores + bias.float()).unflatten(-1, (group_count, -1))
    best = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1).argsort(dim=-1, descending=True, stable=True)
    dropped = torch.ones_like(best, dtype=torch.bool).scatter(1, best[:, :k_group], False)
    biased = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    ids = biased.argsort(dim=-1, descending=True, stable=True)[:, :k]
    chosen = scores.gather(1, ids)
    weights = chosen / (chosen.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return weights.to(x.dtype), ids.to(torch.int32), x.new_empty(0)


@body
def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, expert_num: int, active_expert_range: list[int], **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = expert_idx.flatten().long()
    assert ((flat >= 0) & (flat < expert_num)).all(), "ids of experts that exist"
    first, end = active_expert_range
    active = (flat >= first) & (flat < end)
    order = torch.where(active, flat, expert_num).argsort(stable=True)
    count = int(active.sum())
    rows = torch.full((flat.shape[0], x.shape[1]), torch.nan, dtype=x.dtype)
    rows[:count] = x[order[:count] // expert_idx.shape[1]]
    place = torch.full_like(flat, -1)
    place[order[:count]] = torch.arange(count)
    counts = torch.bincount(flat, minlength=expert_num)[first:end]
    return rows, place.to(torch.int32), counts, torch.full((flat.shape[0],), torch.nan)


@body
def npu_moe_finalize_routing(
    rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None, scales: Tensor, place: Tensor,
    experts: Tensor | None, drop_pad_mode: int = 0, k: int = 1,
) -> Tensor:  # fmt: skip
    assert drop_pad_mode == 3 and skip1 is skip2 is bias is None
    flat, place = rows.flatten(0, 1), place.long().view(scales.shape)
    taken = torch.where((place >= 0)[..., None], flat[place.clamp_min(0)], 0.0)
    return torch.stack([(taken[:, j] * scales[:, j, None]) for j in range(scales.shape[1])]).sum(0)


def _codes(words: Tensor) -> Tensor:
    """[..., n] int32 -> [..., 8 n]: nibble i of a word is column 8 * word + i, in two's complement."""
    nibbles = (words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2)


@body
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    nibbles = (weight & 15).to(torch.int64).unflatten(-1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _float_scale(encoded: Tensor) -> Tensor:
    return (encoded & 0xFFFFFFFF).to(torch.int64).view(torch.int32)[..., ::2].contiguous().view(torch.float32)


def _expert_product(rows: Tensor, weight: Tensor, expert: int, options: dict[str, Any], first: int) -> Tensor:
    if weight.dtype != torch.int32:
        return rows.float() @ weight.float()
    codes = _codes(weight).float()
    if options["antiquant_scale"] is not None:
        scale, offset = (options[name][0][expert].float() for name in ("antiquant_scale", "antiquant_offset"))
        scale, offset = (s.expand(codes.shape[0], -1) if s.dim() == 1 else s.repeat_interleave(
            codes.shape[0] // s.shape[0], 0) for s in (scale, offset))  # fmt: skip
        return rows.float() @ ((codes + offset) * scale).to(rows.dtype).float()
    scale = _float_scale(options["scale"][0][expert])  # [1, N]
    high, low = (rows.int() >> 4).float(), (rows.int() & 15).float() - 8  # as the kernel splits a row's codes
    product = (16 * (high @ codes) + low @ codes) * scale + options["bias"][0][expert]
    return product * options["per_token_scale"][0][first : first + rows.shape[0], None]


@body
def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, output_dtype: int | None, **options: Any
) -> list[Tensor]:
    rows, matrices = x[0], weight[0]
    width = matrices.shape[2] * (8 if matrices.dtype == torch.int32 else 1)
    out = torch.full((rows.shape[0], width), torch.nan)
    first = 0
    for expert, count in enumerate(group_list.tolist()):
        out[first : first + count] = _expert_product(rows[first : first + count], matrices[expert], expert, options, first)
        first += count
    return [out.to(_DTYPES[output_dtype])]


# -- quantised products --------------------------------------------------------------------------------------------------

_DTYPES = {1: torch.int8, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
"""Numbers of torch's scalar types, which the schemas take in place of dtypes."""


@body
def npu_dynamic_quant(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Rows of zeros and rows that are not finite give anything."""
    scale = x.float().abs().amax(-1) / 127
    codes = (x.float() / scale[..., None]).round()
    wild = ~(scale.isfinite() & (scale > 0))
    return torch.where(wild[..., None], 77.0, codes).to(torch.int8), torch.where(wild, 3.0, scale)


@body
def npu_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, output_dtype: int | None, **_: Any
) -> Tensor:
    sums = (x1.double() @ x2.double()).float()
    return (sums * scale.float() * pertoken_scale[:, None]).to(_DTYPES[output_dtype])


@body
def npu_weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor, quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None, bias: Tensor | None = None, antiquant_group_size: int = 0, inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:  # fmt: skip
    codes = _codes(weight).float()
    size = antiquant_group_size or codes.shape[0]
    scale, offset = (t.float().repeat_interleave(size, 0)[: codes.shape[0]] for t in (antiquant_scale, antiquant_offset))
    return (x.float() @ ((codes + offset) * scale).to(x.dtype).float()).to(x.dtype)
