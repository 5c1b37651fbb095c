"""sparse_mla_attention by the decoding kernel of FlashMLA, where its package is installed: `cuda/flash_mla`.

Its cache is the 656-byte fp8 row, byte for byte, so that nothing is converted; what is selected are slots instead of positions.
It runs only where it is asked for (`GLM5_PORT_OP_SPARSE_MLA_ATTENTION=flash_mla`), for two reasons: how it shares keys among
programs depends on the number of multiprocessors, and so do its bits; and no card has shown yet that it is faster here.

Written after the library's public source (version 1.0.0: `flash_mla_interface.py`, `csrc/api/sparse_decode.h`). Never run: tests
call a stand-in that has its signature and refuses what it refuses.

Shape legend: T tokens; H heads; C latent; R rope; K indices a token.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from glm5_port.backends.cuda.triton_support import BACKEND, capability
from glm5_port.errors import InputError
from glm5_port.operators.cache import LATENT, cache_layout, locate_tokens, slots_at
from glm5_port.operators.sparse_attention import check_attention, check_indices, sparse_mla_attention

PACKAGE = "flash_mla"
GENERATIONS = (9, 10)
"""Major compute capabilities that the library has kernels for: H100, H200; B200."""
HEADS, LATENT_DIM, ROPE_DIM = (64, 128), 512, 64
TOGETHER = 64
"""Indices that its kernels take at a time."""


def _not_supported(
    *, dtype: torch.dtype, cache_format: str, heads: int, latent_dim: int, rope_dim: int, top_k: int, **_: Any
) -> list[str]:
    found = []
    if importlib.util.find_spec(PACKAGE) is None:
        found.append(f"{PACKAGE} is not installed: build it from DeepSeek's FlashMLA, for Hopper and Blackwell's B200")
    if (card := capability()) is not None and card[0] not in GENERATIONS:
        found.append(f"FlashMLA has kernels for compute capability 9.0 and 10.x, this card has {card[0]}.{card[1]}")
    if dtype != torch.bfloat16:
        found.append(f"takes bfloat16, not {str(dtype).removeprefix('torch.')}")
    if cache_format != "fp8":
        found.append(f"reads caches of format fp8, not {cache_format}")
    if heads not in HEADS or (latent_dim, rope_dim) != (LATENT_DIM, ROPE_DIM):
        found.append(
            f"takes 64 or 128 heads, a latent of {LATENT_DIM} and a rope key of {ROPE_DIM}, "
            f"not {heads}, {latent_dim} and {rope_dim}"
        )
    if top_k == 0 or top_k % TOGETHER:
        found.append(f"takes a multiple of {TOGETHER} indices a token, not {top_k}")
    return found


@sparse_mla_attention.implement(BACKEND, variant="flash_mla", rank=30, not_supported=_not_supported)
def sparse_mla_attention_flash_mla(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: list[Tensor],
    indices: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    cache_format: str,
) -> Tensor:
    """Every token is a sequence of its own to the library, with the slots of its visible keys and -1."""
    check_attention(query_latent, query_rope, latent_cache, block_table, query_starts, lengths)
    check_indices(query_latent, indices)
    cache_layout(LATENT, cache_format).check_widths((query_latent.shape[2], query_rope.shape[2]))
    if query_latent.shape[0] == 0:
        return torch.empty_like(query_latent)
    rows = latent_cache[0].contiguous()
    pages, page_size = rows.shape[:2]
    if pages * page_size >= 2**31:
        raise InputError(
            f"sparse_mla_attention by FlashMLA: {pages} pages of {page_size}; slots are 32 bits: at most 2^31 - 1 rows"
        )
    library = importlib.import_module(PACKAGE)
    sequences, positions = locate_tokens(query_starts, lengths, query_latent.shape[0])
    slots = slots_at(block_table, sequences, indices, page_size)
    visible = (indices >= 0) & (indices <= positions[:, None]) & (indices < block_table.shape[1] * page_size)
    visible &= (slots >= 0) & (slots < pages * page_size)
    out, _ = library.flash_mla_with_kvcache(
        torch.cat((query_latent, query_rope), dim=-1).unsqueeze(1),
        rows.unsqueeze(2),
        None,
        None,
        LATENT_DIM,
        library.get_mla_metadata()[0],
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=slots.masked_fill(~visible, -1).to(torch.int32).unsqueeze(1),
    )
    result: Tensor = out.squeeze(1)
    return result
