"""Kernels of route_experts.

    partial_logits   hidden gate^T in pieces of the hidden size, [pieces, T, E] float32
    choose_experts   the pieces summed in order, sigmoid, groups, choices

Both take the same number of tokens a program whatever the batch: a token's experts do not depend on who else is there.

Scores become whole numbers of the same order, with NaN above all; below them in 64 bits stands the id, lower ids higher. One
maximum then finds the best score with the lowest id, and no two numbers are equal.

Floor: (T * D + E * D) * bytes of a number / memory bandwidth: the gate of GLM-5 (256 by 6144, bfloat16) is 3 MB. The pieces let a
single token use 96 programs.
"""

import triton
import triton.language as tl

from glm5_port.backends.cuda.kernels.numbers import dot_add

NOTHING = tl.constexpr(-(2**63))
"""Below the number of every score."""


@triton.jit(do_not_specialize=["tokens"])
def partial_logits(
    hidden, gate, partial, tokens, hidden_stride, gate_stride,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs: (blocks of experts, pieces, blocks of tokens)."""
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    piece = tl.program_id(1)
    rows = tl.program_id(2).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, PIECE, BLOCK_K):
        k = piece * PIECE + start + tl.arange(0, BLOCK_K)
        x = tl.load(hidden + rows[:, None] * hidden_stride + k[None, :], mask=(rows < tokens)[:, None] & (k < WIDTH), other=0.0)
        weight = tl.load(
            gate + experts[None, :] * gate_stride + k[:, None], mask=(experts < EXPERTS) & (k < WIDTH)[:, None], other=0.0
        )
        logits = dot_add(x, weight, logits)
    places = (piece * tokens + rows[:, None]) * EXPERTS + experts[None, :]
    tl.store(partial + places, logits, mask=(rows < tokens)[:, None] & (experts < EXPERTS)[None, :])


@triton.jit
def order_of(x):
    """float32 as int32 of the same order; NaN is the largest. -0 does not occur."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def value_of(order):
    """The float32 of `order_of`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(x, ids, BLOCK: tl.constexpr):
    """One number for a score and its id: higher scores are larger, and of equal ones the lower id."""
    return (order_of(x).to(tl.int64) << 32) | (BLOCK - 1 - ids)


@triton.jit
def id_of(rank, BLOCK: tl.constexpr):
    """The id of `ranked`."""
    return (BLOCK - 1 - (rank & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def without_weak_groups(
    biased, ids, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """`biased` with -infinity outside of the best groups; a group's score is the sum of its two best."""
    group_of = ids // (EXPERTS // GROUPS)
    ranks = tl.where(ids < EXPERTS, ranked(biased, ids, BLOCK), NOTHING)
    groups = tl.arange(0, BLOCK_G)[None, :]
    group_ranks = tl.full((TOKENS, BLOCK_G), NOTHING, tl.int64)
    for group in range(GROUPS):
        members = tl.where(group_of == group, ranks, NOTHING)
        first = tl.max(members, axis=1)[:, None]
        second = tl.max(tl.where(members == first, NOTHING, members), axis=1)[:, None]
        score = value_of((first >> 32).to(tl.int32)) + value_of((second >> 32).to(tl.int32))
        group_ranks = tl.where(groups == group, ranked(score, group, BLOCK_G), group_ranks)
    kept = tl.zeros((TOKENS, BLOCK), tl.int1)
    for _ in range(GROUPS_KEPT):
        best = tl.max(group_ranks, axis=1)[:, None]
        kept = kept | (group_of == id_of(best, BLOCK_G))
        group_ranks = tl.where(group_ranks == best, NOTHING, group_ranks)
    return tl.where(kept, biased, float("-inf"))


@triton.jit(do_not_specialize=["tokens"])
def choose_experts(
    partial, correction_bias, weights, chosen, tokens, scale,
    EXPERTS: tl.constexpr, PIECES: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr,
    RENORMALISE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_CHOICES: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of tokens."""
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    ids = tl.arange(0, BLOCK)[None, :]
    inside = (rows < tokens) & (ids < EXPERTS)
    logits = tl.zeros((TOKENS, BLOCK), tl.float32)
    for piece in range(PIECES):
        logits += tl.load(partial + (piece * tokens + rows) * EXPERTS + ids, mask=inside, other=0.0)
    scores = tl.div_rn(1.0, 1.0 + tl.exp(-logits))
    biased = scores + tl.load(correction_bias + ids, mask=ids < EXPERTS, other=0.0)
    if GROUPS_KEPT < GROUPS:
        biased = without_weak_groups(biased, ids, TOKENS, EXPERTS, GROUPS, GROUPS_KEPT, BLOCK, BLOCK_G)
    ranks = tl.where(ids < EXPERTS, ranked(biased, ids, BLOCK), NOTHING)

    choices = tl.arange(0, BLOCK_CHOICES)[None, :]
    best_ids = tl.zeros((TOKENS, BLOCK_CHOICES), tl.int32)
    best_scores = tl.zeros((TOKENS, BLOCK_CHOICES), tl.float32)
    for choice in range(TOP_K):
        best = tl.max(ranks, axis=1)[:, None]
        mine = ranks == best
        best_ids = tl.where(choices == choice, id_of(best, BLOCK), best_ids)
        best_scores = tl.where(choices == choice, tl.sum(tl.where(mine, scores, 0.0), axis=1)[:, None], best_scores)
        ranks = tl.where(mine, NOTHING, ranks)
    if RENORMALISE:
        best_scores = tl.div_rn(best_scores, tl.sum(best_scores, axis=1)[:, None] + 1e-20)
    places = rows * TOP_K + choices
    written = (rows < tokens) & (choices < TOP_K)
    tl.store(weights + places, best_scores * scale, mask=written)
    tl.store(chosen + places, best_ids, mask=written)
