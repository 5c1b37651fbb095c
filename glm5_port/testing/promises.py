"""The checks behind `glm5_port.registry.PROMISES`: an implementation that makes a promise is held to it, on every case.

A promise whose check cannot run for an operator counts as broken: nobody may rely on what nobody can test.
`tie_rule` needs no check of its own, since the suites then compare ties exactly; it needs cases that have them (`TIES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glm5_port.registry import Implementation
from glm5_port.testing.calls import flat, run_outputs, same_bits, to_device, written
from glm5_port.testing.cases import TIES, Suite

ROWS_TRIED = 4
"""So many tokens of a case are computed alone, spread over the batch (all of them where the operator writes a cache)."""


def check_promises(
    suite: Suite,
    implementation: Implementation,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    device: str,
    outputs: Sequence[Tensor],
) -> list[str]:
    """What `implementation` promises and does not keep on this case. `arguments` and `outputs` are on the CPU."""
    problems: list[str] = []
    again = to_device(arguments, device)
    if "deterministic" in implementation.promises:
        problems += _differences(
            "promises to be deterministic, and two runs differ", outputs, run_outputs(suite.operator, function, again)
        )
    if "thread_invariant" in implementation.promises:
        problems += _check_threads(suite, function, again, outputs)
    if "batch_invariant" in implementation.promises:
        problems += _check_batch(suite, function, arguments, device, outputs)
    return problems


def check_tie_cases(suite: Suite, implementation: Implementation, tried: Mapping[str, str]) -> list[str]:
    """An implementation that promises `tie_rule` needs a case with exact ties that it did not decline.

    Args:
        tried: case name -> status, of the cases that were run.
    """
    if "tie_rule" not in implementation.promises:
        return []
    names = [case.name for case in suite.cases if case.tags & TIES]
    if not names:
        return [f"promises tie_rule, and the suite of {suite.operator.name} has no case tagged TIES to hold it to"]
    statuses = [tried[name] for name in names if name in tried]
    if statuses and all(status == "declined" for status in statuses):
        return ["promises tie_rule, and declines every case with exact ties"]
    return []


def alone(suite: Suite, arguments: Mapping[str, Any], row: int) -> dict[str, Any] | None:
    """The call that computes token `row` by itself, with everything it may look at; None for padding.

    Per-token arguments are cut to one row. Of the packed sequences only the token's own remains, as long as it was when
    the token was its last one."""
    mine = dict(arguments)
    for name in (*suite.rows, "slots"):
        if name in arguments:
            value = arguments[name]
            mine[name] = [v[row : row + 1] for v in value] if isinstance(value, list) else value[row : row + 1]
    if "query_starts" not in arguments:
        return mine
    starts, lengths = arguments["query_starts"].tolist(), arguments["lengths"].tolist()
    sequence = next((b for b in range(len(lengths)) if starts[b] <= row < starts[b + 1]), None)
    if sequence is None:
        return None
    seen = lengths[sequence] - (starts[sequence + 1] - starts[sequence]) + (row - starts[sequence]) + 1
    mine["query_starts"] = torch.tensor([0, 1], dtype=arguments["query_starts"].dtype)
    mine["lengths"] = torch.tensor([seen], dtype=arguments["lengths"].dtype)
    if "block_table" in arguments:
        mine["block_table"] = arguments["block_table"][sequence : sequence + 1]
    return mine


def _check_threads(
    suite: Suite, function: Callable[..., Any], arguments: Mapping[str, Any], outputs: Sequence[Tensor]
) -> list[str]:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            what = f"promises the same bits for any number of threads, and {threads} give others than {before}"
            if problems := _differences(what, outputs, run_outputs(suite.operator, function, arguments)):
                return problems
    finally:
        torch.set_num_threads(before)
    return []


def _check_batch(
    suite: Suite, function: Callable[..., Any], arguments: Mapping[str, Any], device: str, outputs: Sequence[Tensor]
) -> list[str]:
    operator = suite.operator
    if not suite.rows:
        return [f"promises batch_invariant, and the suite of {operator.name} names no rows to check it with"]
    count = next(flat(arguments[suite.rows[0]])).shape[0]
    state = {name: arguments[name] for name in operator.mutates}
    returned = len(outputs) - len(written(operator, arguments))
    rows = (
        range(count)
        if state
        else sorted({round(place * (count - 1) / (ROWS_TRIED - 1)) for place in range(ROWS_TRIED)} if count else ())
    )
    for row in rows:
        mine = alone(suite, {**arguments, **state}, row)
        if mine is None:
            continue
        results = run_outputs(operator, function, to_device(mine, device))
        expected = [output[row : row + 1] for output in outputs[:returned]]
        if problems := _differences(f"promises batch_invariant, and token {row} alone differs", expected, results[:returned]):
            return problems
        rest = iter(results[returned:])
        state = {name: [next(rest) for _ in value] if isinstance(value, list) else next(rest) for name, value in state.items()}
    return _differences("promises batch_invariant, and writing token by token differs", outputs[returned:], list(flat(state)))


def _differences(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[str]:
    wrong = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not same_bits(a, b)]
    return [f"{what} (output {', '.join(map(str, wrong))})"] if wrong else []
