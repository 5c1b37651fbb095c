"""From the weights that are quantised back to the options that choose them: manifest and `verify` know a choice by these."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from glm5_port.model.tensors import PROJECTION, TensorSpec
from glm5_port.quant.plan import BF16, INT4, ROUTED_EXPERTS


@dataclass(frozen=True, slots=True)
class Choice:
    """Options of an export, as `Options` has them: what experts of the MTP layer become, and regular expressions of what else is
    quantised, and of what is not."""

    mtp: str = BF16
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def choice_of(specs: Mapping[str, TensorSpec], quantized: Set[str], mtp_prefix: str | None) -> Choice:
    """The options with which an export chooses these weights and no other.

    Args:
        specs: every tensor of the checkpoint.
        quantized: the weights that are quantised; names that are no projection do not count.
        mtp_prefix: what names of the MTP layer begin with; None where there is none.
    """
    names = [name for name, spec in specs.items() if spec.kind == PROJECTION]
    wanted = quantized & set(names)
    in_mtp = {name for name in names if mtp_prefix is not None and name.startswith(mtp_prefix)}
    mtp = INT4 if wanted & in_mtp else BF16
    chosen = {name for name in names if specs[name].component == ROUTED_EXPERTS and (mtp == INT4 or name not in in_mtp)}
    return Choice(mtp, _patterns(wanted - chosen, names), _patterns(chosen - wanted, names))


def _patterns(wanted: Set[str], names: Sequence[str]) -> tuple[str, ...]:
    """Regular expressions that find the wanted names and no other: with the numbers of layers and experts left open where that is
    right, the shortest list that this gives."""
    fits: dict[str, bool] = {}

    def finds_only_wanted(pattern: str) -> bool:
        if pattern not in fits:
            fits[pattern] = all(name in wanted for name in names if re.search(pattern, name))
        return fits[pattern]

    found: dict[str, None] = {}
    for name in (name for name in names if name in wanted):
        exact = f"^{re.escape(name)}$"
        of_all_experts = re.sub(r"experts\\\.\d+", r"experts\\.\\d+", exact)
        of_all_layers = re.sub(r"layers\\\.\d+", r"layers\\.\\d+", of_all_experts)
        found[next(pattern for pattern in (of_all_layers, of_all_experts, exact) if finds_only_wanted(pattern))] = None
    return tuple(found)
