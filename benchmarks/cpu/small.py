"""What stands between the products of a layer, the projections of attention and indexer, and selection from given scores.

Shape legend: T tokens; D hidden size; H heads; Q query latent; C latent; R rope; N nope; E experts; J index heads; X their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.contest import Contest, copies_for
from glm5_port.backends.cpu.extension import widest_isa
from glm5_port.dispatch import Operator
from glm5_port.operators import add_rms_norm, indexer_prologue, mla_prologue, rms_norm, rotate, route_experts, select_top_k
from glm5_port.operators.rope import rotary_angles

HIDDEN, HEADS, QUERY_LATENT, LATENT, ROPE, NOPE, EXPERTS = 6144, 64, 2048, 512, 64, 192, 256
INDEX_HEADS, INDEX_WIDTH, SELECTED = 32, 128, 2048


def _normal(*shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape).mul_(std).bfloat16()


def _first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _contest(
    operator: Operator,
    work: str,
    calls: list[dict[str, Any]],
    nbytes: float,
    operations: float = 0.0,
    peers: dict[str, Callable[[dict[str, Any]], Any]] | None = None,
) -> Contest:
    """One operator on copies of a call: this project's kernel, its portable implementation and what else there is."""
    a = calls[0]
    ours, portable = operator.bind(backend="cpu", **operator.facts_of(a)), operator.implementations["torch/eager"].function
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in a.items()}
    return Contest(
        operator=operator.name,
        work=work,
        bytes=nbytes,
        operations=operations,
        kind="bf16",
        contenders={
            f"cpu/{widest_isa()}": lambda copy: _first(ours(**calls[copy])),
            **{name: lambda copy, peer=peer: _first(peer(calls[copy])) for name, peer in (peers or {}).items()},
            "torch/eager (portable)": lambda copy: _first(portable(**calls[copy])),
        },
        gold=None if operator is select_top_k else lambda: _first(operator.reference(**wide)),
        copies=len(calls),
    )


def between() -> Iterator[Contest]:
    """Norms, rotation and routing, one token and many. One token's row lies in the cache: the limit is not the memory's, and what
    is seen is the cost of a call."""
    for tokens in (1, 512):
        x, weight = _normal(tokens, HIDDEN), _normal(HIDDEN)
        yield _contest(
            rms_norm, f"{tokens} x {HIDDEN}", [{"x": x, "weight": weight, "eps": 1e-5}], 4.0 * x.numel(),
            peers={"torch rms_norm": lambda a: torch.nn.functional.rms_norm(a["x"], (HIDDEN,), a["weight"], a["eps"])},
        )  # fmt: skip
        call = {"x": x, "residual": _normal(tokens, HIDDEN), "weight": weight, "eps": 1e-5}
        yield _contest(add_rms_norm, f"{tokens} x {HIDDEN}", [call], 8.0 * x.numel())
        cos, sin = rotary_angles(torch.arange(tokens), 1e6, ROPE)
        query = _normal(tokens, HEADS, NOPE + ROPE)[..., NOPE:]
        call = {"x": query, "cos": cos, "sin": sin, "interleaved": True, "start": 0}
        yield _contest(rotate, f"{tokens} x {HEADS} x {ROPE}", [call], 4.0 * query.numel())


def routing() -> Iterator[Contest]:
    """256 experts, top 8; the gates of as many layers as do not fit the cache."""
    for tokens in (1, 512):
        gates = copies_for(EXPERTS * HIDDEN * 2)
        calls = [
            {
                "hidden": _normal(tokens, HIDDEN), "gate": _normal(EXPERTS, HIDDEN, std=HIDDEN**-0.5),
                "correction_bias": torch.randn(EXPERTS) * 0.1 + 8,
                "top_k": 8, "groups": 1, "groups_kept": 1, "renormalise": True, "scale": 2.5,
            }
            for _ in range(gates)
        ]  # fmt: skip
        operations = 2.0 * tokens * EXPERTS * HIDDEN
        yield _contest(route_experts, f"{tokens} tokens", calls, 2.0 * (EXPERTS + tokens) * HIDDEN, operations)


def selection() -> Iterator[Contest]:
    """2048 of a row of given scores."""
    for rows, columns in ((1, 32768), (1, 131072), (64, 8192)):
        calls = [{"scores": torch.randn(rows, columns), "top_k": SELECTED} for _ in range(4)]
        yield _contest(
            select_top_k, f"{SELECTED} of {columns}, {rows} row{'s' * (rows > 1)}", calls, 4.0 * rows * columns,
            peers={"torch.topk": lambda a: a["scores"].topk(SELECTED, dim=1).indices},
        )  # fmt: skip


def prologues() -> Iterator[Contest]:
    """Projections of one layer; copies stand for the layers of a model."""
    heads = HEADS * (NOPE + ROPE)
    for tokens in (1, 512):
        cos, sin = rotary_angles(torch.arange(tokens), 1e6, ROPE)
        rows = {"hidden": _normal(tokens, HIDDEN), "cos": cos, "sin": sin, "rope_interleaved": True}
        weights = QUERY_LATENT * HIDDEN + heads * QUERY_LATENT + (LATENT + ROPE) * HIDDEN + HEADS * NOPE * LATENT
        calls = [
            rows | {
                "q_a": _normal(QUERY_LATENT, HIDDEN, std=HIDDEN**-0.5), "q_a_norm": _normal(QUERY_LATENT),
                "q_b": _normal(heads, QUERY_LATENT, std=QUERY_LATENT**-0.5),
                "kv_a": _normal(LATENT + ROPE, HIDDEN, std=HIDDEN**-0.5), "kv_a_norm": _normal(LATENT),
                "w_uk": _normal(HEADS, NOPE, LATENT, std=NOPE**-0.5), "latent_norm_eps": 1e-5,
            }
            for _ in range(copies_for(2 * weights))
        ]  # fmt: skip
        yield _contest(mla_prologue, f"{tokens} tokens", calls, 2.0 * weights, 2.0 * tokens * weights)
        weights = INDEX_HEADS * INDEX_WIDTH * QUERY_LATENT + INDEX_WIDTH * HIDDEN + INDEX_HEADS * HIDDEN
        calls = [
            rows | {
                "query_residual": _normal(tokens, QUERY_LATENT),
                "wq_b": _normal(INDEX_HEADS * INDEX_WIDTH, QUERY_LATENT, std=QUERY_LATENT**-0.5),
                "wk": _normal(INDEX_WIDTH, HIDDEN, std=HIDDEN**-0.5), "k_norm_weight": _normal(INDEX_WIDTH),
                "k_norm_bias": _normal(INDEX_WIDTH), "weights_proj": _normal(INDEX_HEADS, HIDDEN, std=HIDDEN**-0.5),
                "k_norm_eps": 1e-6,
            }
            for _ in range(copies_for(2 * weights))
        ]  # fmt: skip
        yield _contest(indexer_prologue, f"{tokens} tokens", calls, 2.0 * weights, 2.0 * tokens * weights)
