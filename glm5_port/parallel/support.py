"""What this library's own execution cannot run, as reasons why not: `engines` asks for the planner, `launch` before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from glm5_port.parallel.plan import ALL_REDUCE, MIXED, Layout, Role

WEIGHTS = ("bf16", "int4")
"""Kinds of weights that take the memory that a plan counts: block-FP8 is read too, but multiplied out to 16 bits; ascendV1 (w4a8)
is not read."""


def layout_reasons(layout: Layout) -> list[str]:
    """Why this library cannot run a replica of this layout; empty if it can."""
    found = []
    if layout.decode_context > 1:
        found.append("this library keeps a sequence's whole latent cache on each rank of a tensor group (decode_context = 1)")
    if layout.overlap:
        found.append("this library runs one batch at a time: no two micro-batches")
    forms = {layout.exchange, layout.prefill_exchange or layout.exchange}
    if ALL_REDUCE in forms and len(forms) > 1:
        found.append(
            "this library divides the shared expert for all_reduce and not for other exchanges, so not "
            f"{' and '.join(sorted(forms))} in one plan"
        )
    return found


def plan_reasons(roles: Sequence[Role], weights: str) -> list[str]:
    """Why this library cannot start a whole deployment; one replica of a role may still run."""
    found = [] if weights in WEIGHTS else [f"this library loads {', '.join(WEIGHTS)} at the size that plans count, not {weights}"]
    if tuple(role.name for role in roles) != (MIXED,):
        found.append("this library hands no cache from prefill ranks to decode ranks: it runs one role at a time (--role)")
    return found + [f"{role.name}: {reason}" for role in roles for reason in layout_reasons(role.layout)]
