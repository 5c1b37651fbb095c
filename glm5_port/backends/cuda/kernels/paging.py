"""Where tokens and cached rows lie. Shape legend: T tokens; B sequences; N pages a sequence; see `glm5_port.operators.cache`."""

import triton
import triton.language as tl

SEQUENCES = tl.constexpr(128)
"""Sequences that one step of the search looks at."""
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def locate(token, query_starts, lengths, batch):
    """(sequence, position, end) of a packed token; end is the first row behind its sequence. Padding has sequence 0 and
    position -1, and its end lies behind every token."""
    sequence = 0
    for first in range(0, batch, SEQUENCES):
        numbers = first + tl.arange(0, SEQUENCES)
        ends = tl.load(query_starts + 1 + numbers, mask=numbers < batch, other=NOWHERE)
        sequence += tl.sum((ends <= token).to(tl.int32))
    is_padding = sequence >= batch
    sequence = tl.where(is_padding, 0, sequence)
    start = tl.load(query_starts + sequence)
    end = tl.load(query_starts + sequence + 1)
    position = tl.load(lengths + sequence) - (end - start) + token - start
    return sequence, tl.where(is_padding, -1, position), tl.where(is_padding, NOWHERE, end)


@triton.jit
def slots_of(positions, visible, table, table_stride, sequence, pages, PAGE: tl.constexpr):
    """(page [...], row [...], visible [...]) of logical positions of a sequence. A page that does not exist is not visible."""
    page = tl.load(table + sequence * table_stride + positions // PAGE, mask=visible, other=-1)
    return page.to(tl.int64), (positions % PAGE).to(tl.int64), visible & (page >= 0) & (page < pages)
