"""Kernels of route_experts.

    partial_logits   hidden gate^T in pieces of the hidden size, [pieces, T, E] float32
    choose_experts   one program a token: the pieces summed in order, sigmoid, groups, choices

Both take 16 tokens or one at a time, whatever the batch: a token's experts do not depend on who else is there.

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


@triton.jit
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
def without_weak_groups(
    biased, ids, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr
):
    """`biased` with -infinity outside of the best groups; a group's score is the sum of its two best."""
    group_of = ids // (EXPERTS // GROUPS)
    ranks = tl.where(ids < EXPERTS, ranked(biased, ids, BLOCK), NOTHING)
    groups = tl.arange(0, BLOCK_G)
    group_ranks = tl.full((BLOCK_G,), NOTHING, tl.int64)
    for group in range(GROUPS):
        members = tl.where(group_of == group, ranks, NOTHING)
        first = tl.max(members, axis=0)
        second = tl.max(tl.where(members == first, NOTHING, members), axis=0)
        score = value_of((first >> 32).to(tl.int32)) + value_of((second >> 32).to(tl.int32))
        group_ranks = tl.where(groups == group, ranked(score, group, BLOCK_G), group_ranks)
    kept = ids < 0
    for _ in range(GROUPS_KEPT):
        best = tl.max(group_ranks, axis=0)
        kept = kept | (group_of == BLOCK_G - 1 - (best & 0xFFFFFFFF))
        group_ranks = tl.where(group_ranks == best, NOTHING, group_ranks)
    return tl.where(kept, biased, float("-inf"))


@triton.jit
def choose_experts(
    partial, correction_bias, weights, chosen, tokens, scale,
    EXPERTS: tl.constexpr, PIECES: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, GROUPS_KEPT: tl.constexpr,
    RENORMALISE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_CHOICES: tl.constexpr,
):  # fmt: skip
    """Programs: tokens."""
    token = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    logits = tl.zeros((BLOCK,), tl.float32)
    for piece in range(PIECES):
        logits += tl.load(partial + (piece * tokens + token) * EXPERTS + ids, mask=ids < EXPERTS, other=0.0)
    scores = tl.div_rn(1.0, 1.0 + tl.exp(-logits))
    biased = scores + tl.load(correction_bias + ids, mask=ids < EXPERTS, other=0.0)
    if GROUPS_KEPT < GROUPS:
        biased = without_weak_groups(biased, ids, EXPERTS, GROUPS, GROUPS_KEPT, BLOCK, BLOCK_G)
    ranks = tl.where(ids < EXPERTS, ranked(biased, ids, BLOCK), NOTHING)

    choices = tl.arange(0, BLOCK_CHOICES)
    best_ids = tl.zeros((BLOCK_CHOICES,), tl.int32)
    best_scores = tl.zeros((BLOCK_CHOICES,), tl.float32)
    for choice in range(TOP_K):
        best = tl.max(ranks, axis=0)
        mine = ranks == best
        best_ids = tl.where(choices == choice, (BLOCK - 1 - (best & 0xFFFFFFFF)).to(tl.int32), best_ids)
        best_scores = tl.where(choices == choice, tl.sum(tl.where(mine, scores, 0.0), axis=0), best_scores)
        ranks = tl.where(mine, NOTHING, ranks)
    if RENORMALISE:
        best_scores = tl.div_rn(best_scores, tl.sum(best_scores, axis=0) + 1e-20)
    places = token * TOP_K + choices
    tl.store(weights + places, best_scores * scale, mask=choices < TOP_K)
    tl.store(chosen + places, best_ids, mask=choices < TOP_K)
