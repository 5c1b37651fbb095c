"""The vendor's documented rules: every one is there, refuses what breaks it by name, and nothing else refuses that instead.

Taking any rule, chip, version or required argument out of the backend's tables fails a test here: `npu_documented` and `BREAKING`
say what must be there, and each rule is broken alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_port import plugins
from glm5_port.backends.npu import machine as vendor
from glm5_port.backends.npu.contracts import VENDOR_OPERATORS
from glm5_port.backends.npu.rules import NEEDS, VendorOperator
from glm5_port.cli.explain import assumed_facts
from glm5_port.errors import InputError
from glm5_port.operators.rope import rotary_angles
from glm5_port.registry import OPERATORS
from glm5_port.testing.calls import prepared_arguments
from glm5_port.testing.cases import WIDTH, load_suites
from tests.backends.npu_documented import DOCUMENTED
from tests.backends.npu_host import HostTorchNpu, host_npu
from tests.backends.npu_schemas import VERSIONS, frozen

plugins.load_plugins()
A2 = vendor.Machine("A2", (9, 1, 0))


# -- rules on facts ------------------------------------------------------------------------------------------------------

DTYPE = {"dtype": torch.float64}
_HEAD_16 = {"whole 16s": {"latent_dim": 500}, "row of all heads": {"heads": 4096}, "output width": {"latent_dim": 65536}}
_PAGED = {
    "latent width": {"latent_dim": 256},
    "rope width": {"rope_dim": 32},
    "heads": {"heads": 48},
    "page size": {"page_size": 24},
}
_PROLOG = {
    "dtype": {"dtype": torch.float16},
    "hidden width": {"width": 6000},
    "query latent": {"query_latent_dim": 1024},
    "nope width": {"nope_dim": 64},
    "latent width": {"latent_dim": 256},
    "rope width": {"rope_dim": 32},
    "heads": {"heads": 48},
    "rotation": {"rope_interleaved": False},
}
_FP8 = {"cache format": {"cache_format": "fp8"}}
_EXPERTS = {"groups": {"experts": 1}, "widths": {"width": 65536}}
_PACKED = {**_EXPERTS, "packed widths": {"width": 6140}}
BREAKING: dict[str, dict[str, dict[str, Any]]] = {
    "rms_norm/aclnn": {"dtype": DTYPE},
    "add_rms_norm/aclnn": {"dtype": DTYPE},
    "linear/aclnn": {"dtype": DTYPE},
    "gated_mlp/aclnn": {"dtype": DTYPE},
    "linear_per_head/aclnn": {
        "dtype": DTYPE,
        "whole 16s": {"width_in": 500},
        "row of all heads": {"heads": 4096},
        "output width": {"width_out": 65536},
    },
    "rotate/aclnn": {"dtype": DTYPE},
    "write_cache/aclnn": {"dtype": DTYPE, **_FP8},
    "sparse_mla_attention/aclnn": {"dtype": {"dtype": torch.float32}, **_PAGED, **_FP8, "top_k": {"top_k": 0}},
    "sparse_mla_attention/aclnn_int8": {"dtype": {"dtype": torch.float16}, **_PAGED, **_FP8, "top_k": {"top_k": 0}},
    "mla_attention_absorbed/aclnn": {"dtype": {"dtype": torch.float32}, **_PAGED, **_FP8},
    "indexer_prologue/aclnn": {"dtype": DTYPE},
    "lightning_indexer/aclnn": {
        "dtype": {"dtype": torch.float32},
        "index heads": {"heads": 65},
        "index head width": {"head_dim": 64},
        "page size": {"page_size": 2048},
        "top_k": {"top_k": 3000},
        **_FP8,
    },
    "lightning_indexer/aclnn_int8": {
        "dtype": {"dtype": torch.float16},
        "index heads": {"heads": 48},
        "index head width": {"head_dim": 64},
        "page size": {"page_size": 2048},
        "top_k": {"top_k": 3072},
        **_FP8,
    },
    "lightning_indexer/ordered": {"dtype": DTYPE},
    "mla_project/aclnn": {"dtype": DTYPE},
    "mla_prologue/aclnn_steps": {"dtype": DTYPE, **_HEAD_16},
    "mla_prologue_into_cache/aclnn_steps": {"dtype": DTYPE, **_HEAD_16, **_FP8},
    "mla_prologue/aclnn": _PROLOG,
    "mla_prologue_into_cache/aclnn": {**_PROLOG, **_FP8},
    "attention_output/aclnn": {
        "dtype": DTYPE,
        "whole 16s": {"value_dim": 100},
        "row of all heads": {"heads": 4096},
        "output width": {"value_dim": 65536},
    },
    "route_experts/aclnn": {
        "dtype": DTYPE,
        "experts": {"experts": 2080, "groups": 1},
        "group size": {"experts": 16, "groups": 8},
        "padded groups": {"experts": 1000, "groups": 200},
        "renormalise": {"renormalise": False},
    },
    "int4_matmul/aclnn": {
        "dtype": {"dtype": torch.float16},
        "widths": {"width_in": 65536},
        "outputs": {"width_out": 6140},
        "group size": {"group_size": 48},
    },
    "int8_matmul/aclnn": {"dtype": {"dtype": torch.float32}, "widths": {"width_out": 65536}},
    "expert_mlp/aclnn": {"dtype": DTYPE, **_EXPERTS},
    "expert_mlp_int4/aclnn": {"dtype": {"dtype": torch.float16}, **_PACKED},
    "expert_mlp_int4_w4a8/aclnn": {
        "dtype": {"dtype": torch.float32},
        **_PACKED,
        "group size": {"group_size": 128},
        "activation groups": {"activation_group_size": 128},
    },
}
GLM5 = {
    "sparse_mla_attention/aclnn_int8": {"cache_format": "int8"},
    "lightning_indexer/aclnn_int8": {"cache_format": "int8"},
    "expert_mlp_int4_w4a8/aclnn": {"group_size": -1},
}
"""Facts of the released model, where an implementation is for another choice than the default one."""


@functools.cache
def released() -> dict[str, dict[str, Any]]:
    return assumed_facts(None)


def facts_of(needs: str) -> dict[str, Any]:
    name, operator = needs, OPERATORS[needs.split("/")[0]]
    given = {**released()[operator.name], **GLM5.get(name, {})}
    return operator.complete_facts({"device_type": "npu", "dtype": torch.bfloat16, **given})


def test_every_rule_on_facts_is_broken_here() -> None:
    assert {needs: {rule.name for rule in NEEDS[needs].rules} for needs in NEEDS} == {n: set(b) for n, b in BREAKING.items()}


@pytest.mark.parametrize("needs", sorted(BREAKING))
def test_released_model_is_taken(needs: str) -> None:
    with vendor.replaced(machine=A2):
        assert NEEDS[needs].reasons(**facts_of(needs)) == []


@pytest.mark.parametrize(("needs", "rule"), [(needs, rule) for needs, rules in sorted(BREAKING.items()) for rule in rules])
def test_rule_on_facts_refuses(needs: str, rule: str) -> None:
    broken = facts_of(needs) | BREAKING[needs][rule]
    mine = NEEDS[needs]
    with vendor.replaced(machine=A2):
        reasons = mine.reasons(**broken)
        sentence = next(r for r in mine.rules if r.name == rule).says.format(**broken)
        assert sentence in reasons
        without = replace(mine, rules=tuple(r for r in mine.rules if r.name != rule))
        assert sentence not in without.reasons(**broken)
    selection = OPERATORS[needs.split("/")[0]].implementations[f"npu/{needs.split('/')[1]}"].not_supported
    with vendor.replaced(machine=A2):
        assert selection(**broken) == reasons


# -- chips, versions, kernels --------------------------------------------------------------------------------------------


def test_every_operator_is_documented() -> None:
    assert {
        name: (" | ".join(o.chips), " | ".join(o.explicit), " | ".join(rule.name for rule in o.rules))
        for name, o in VENDOR_OPERATORS.items()
    } == DOCUMENTED
    assert {name: o.cann for name, o in VENDOR_OPERATORS.items() if o.cann} == {
        "npu_mla_prolog_v3": (9, 0),
        "npu_fused_infer_attention_score": (8, 1),
    }


@pytest.mark.parametrize("name", sorted(VENDOR_OPERATORS))
def test_machine_without_it(name: str) -> None:
    operator = VENDOR_OPERATORS[name]
    assert operator.missing(A2) == []
    for chip in ("A2", "A3", "950PR", "950DT", "Ascend310P3"):
        found = operator.missing(replace(A2, chip=chip))
        assert bool(found) == (chip not in operator.chips)
        assert not found or f"this chip is {chip}" in found[0]
    assert operator.missing(replace(A2, offers=lambda name: False))[0].startswith("torch_npu  has no npu_")
    if operator.kernels:
        assert f"no kernel {operator.kernels[0]}" in operator.missing(replace(A2, has_kernel=lambda name: False))[0]
        assert operator.missing(replace(A2, has_kernel=lambda kernel: kernel == operator.kernels[-1])) == []
    if operator.cann:
        assert f"wants CANN {operator.cann[0]}.{operator.cann[1]} or later" in operator.missing(replace(A2, cann=(8, 0)))[0]
        assert operator.missing(replace(A2, cann=operator.cann)) == []
    assert operator.missing(replace(A2, cann=())) == []


def test_reasons_name_the_machine() -> None:
    with vendor.replaced(machine=vendor.Machine("950PR", (9, 1, 0))):
        assert NEEDS["route_experts/aclnn"].reasons(**facts_of("route_experts/aclnn")) == [
            "npu_moe_gating_top_k is documented for A2, A3, this chip is 950PR"
        ]
        assert NEEDS["sparse_mla_attention/aclnn"].reasons(**facts_of("sparse_mla_attention/aclnn")) == []
        assert NEEDS["sparse_mla_attention/aclnn"].reasons(**facts_of("sparse_mla_attention/aclnn") | {"heads": 48}) == []


# -- rules of calls ------------------------------------------------------------------------------------------------------


def _first_cases(needs: str) -> list[dict[str, Any]]:
    """Arguments of cases that the vendor takes: at GLM-5's widths where only those fit."""
    operator, variant = needs.split("/")
    implementation = OPERATORS[operator].implementations[f"npu/{variant}"]
    for case in sorted(load_suites()[operator].cases, key=lambda case: len(case.tags & WIDTH)):
        arguments = case.arguments(OPERATORS[operator], torch.bfloat16)
        facts = OPERATORS[operator].facts_of(arguments) | {"device_type": "npu"}
        rows = [t for t in arguments.values() if isinstance(t, Tensor) and t.dim()]
        if not implementation.not_supported(**facts) and all(t.numel() for t in rows):
            return [prepared_arguments(implementation, facts, arguments)]
    return []


@functools.cache
def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One call of every vendor operator, as the implementations make them."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with host_npu() as package, torch.no_grad():
        for needs, mine in NEEDS.items():
            if all(operator.name in found for operator in mine.uses):
                continue
            operator, variant = needs.split("/")
            for arguments in _first_cases(needs):
                OPERATORS[operator].implementations[f"npu/{variant}"].function(**arguments)
            found |= {name: (args, kwargs) for name, args, kwargs in package.calls if name not in found}
    return found


def named(name: str) -> dict[str, Any]:
    args, kwargs = calls()[name]
    return dict(zip(VENDOR_OPERATORS[name].parameters, args, strict=True)) | kwargs


def test_every_vendor_operator_is_called() -> None:
    assert set(calls()) == set(VENDOR_OPERATORS)


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_fit_the_schemas(version: str) -> None:
    """Names, types and required arguments, as torch itself checks them, in every supported torch_npu."""
    assert set(frozen(version)) == set(VENDOR_OPERATORS)
    package = HostTorchNpu(version)
    for name, (args, kwargs) in calls().items():
        getattr(package, name)(*args, **kwargs)


def test_call_that_fits_no_schema() -> None:
    args, kwargs = calls()["npu_sparse_flash_attention"]
    package = HostTorchNpu("2.12")
    with pytest.raises(RuntimeError, match="expected at most 18 argument"):
        package.npu_sparse_flash_attention(*args, **kwargs, sinks=None)  # 2.13 and later have it


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return [change(t) for t in value] if isinstance(value, list) else change(value)


def _wide(t: Tensor) -> Tensor:
    return t.new_empty((*t.shape[:-1], 1)).expand(*t.shape[:-1], 65537)


def _gaps(t: Tensor) -> Tensor:
    return torch.stack((t, t), dim=-1)[..., 0]


def _shape(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(1, dtype=dtype).expand(shape)


SPECIAL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "npu_rms_norm gamma dtype": lambda a: {"gamma": a["gamma"].half()},
    "npu_rotary_mul even width": lambda a: {"self": a["self"][..., :7]},
    "npu_swiglu two halves": lambda a: {"self": a["self"][..., :7]},
    "npu_transpose_batchmatmul perm_x1": lambda a: {"perm_x1": [2, 0, 1]},
    "npu_transpose_batchmatmul perm_x2": lambda a: {"perm_x2": [0, 2, 1]},
    "npu_transpose_batchmatmul perm_y": lambda a: {"perm_y": [0, 1, 2]},
    "npu_transpose_batchmatmul row of all heads": lambda a: {"input": _shape(2, 4096, 16), "weight": _shape(4096, 16, 16)},
    "npu_transpose_batchmatmul whole 16s": lambda a: {"weight": _shape(8, 16, 24)},
    "npu_scatter_nd_update_ indices dims": lambda a: {"indices": a["indices"][:, 0]},
    "npu_scatter_nd_update_ indices width": lambda a: {"indices": a["indices"][:, :1].expand(-1, 4)},
    "npu_scatter_nd_update_ updates shape": lambda a: {"updates": a["updates"][:, :1]},
    "npu_mla_prolog_v3 rope shape": lambda a: {"rope_cos": a["rope_cos"][:, :32]},
    "npu_lightning_indexer weights dtype": lambda a: {"weights": a["weights"].double()},
    "npu_lightning_indexer query heads": lambda a: {"query": _shape(2, 65, 128)},
    "npu_lightning_indexer head width": lambda a: {"query": a["query"][..., :64]},
    "npu_quant_lightning_indexer query heads": lambda a: {"query": _shape(2, 48, 128)},
    "npu_quant_lightning_indexer head width": lambda a: {"query": a["query"][..., :64]},
    "npu_quant_lightning_indexer sparse_count": lambda a: {"sparse_count": 2049},
    "npu_lightning_indexer sparse_count": lambda a: {"sparse_count": 2049},
    "npu_fused_infer_attention_score heads": lambda a: {"num_heads": 48},
    "npu_fused_infer_attention_score atten_mask": lambda a: {"atten_mask": a["atten_mask"][:64]},
    "npu_fused_infer_attention_score block_size": lambda a: {"block_size": 16},
    "npu_fused_infer_attention_score block_table shape": lambda a: {"block_table": a["block_table"][:, :1]},
    "npu_fused_infer_attention_score lengths": lambda a: {"actual_seq_lengths": [*a["actual_seq_lengths"], 0]},
    "npu_moe_gating_top_k k_group": lambda a: {"k_group": 99},
    "npu_moe_gating_top_k k": lambda a: {"k": 9999},
    "npu_moe_gating_top_k group size": lambda a: {"group_count": a["x"].shape[1] // 2},
    "npu_moe_gating_top_k padded groups": lambda a: {"x": _shape(1, 1000), "group_count": 200},
    "npu_moe_init_routing_v2 expert_num": lambda a: {"expert_num": 10241},
    "npu_moe_init_routing_v2 active_expert_range": lambda a: {"active_expert_range": [0, a["expert_num"] + 1]},
    "npu_moe_finalize_routing skip2": lambda a: {"skip2": a["scales"]},
    "npu_grouped_matmul dtypes": lambda a: {"x": [a["x"][0].double()]},
    "npu_grouped_matmul groups": lambda a: {"group_list": a["group_list"][:1]},
    "npu_grouped_matmul antiquant_offset": lambda a: {"antiquant_scale": [_shape(2, 2, 8)]},
    "npu_grouped_matmul groups of inputs": lambda a: {"antiquant_scale": [_shape(2, a["x"][0].shape[1] - 1, 8)]},
    "npu_grouped_matmul assist bias": lambda a: {
        "x": [_shape(2, 8, dtype=torch.int8)], "weight": [_shape(2, 8, 1, dtype=torch.int32)]
    },
    "npu_convert_weight_to_int4pack weight unit": lambda a: {"weight": a["weight"][:, :7].contiguous()},
    "npu_weight_quant_batchmatmul antiquant_offset shape": lambda a: {"antiquant_offset": a["antiquant_offset"][:, :1]},
    "npu_weight_quant_batchmatmul outputs": lambda a: {"antiquant_scale": _wide(a["antiquant_scale"])},
    "npu_weight_quant_batchmatmul group size": lambda a: {"antiquant_group_size": 48},
    "npu_dynamic_quant input dims": lambda a: {"input": a["input"][0]},
}  # fmt: skip
"""Operator and rule -> what to change in a call that holds every rule, so that this one does not."""

_KINDS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    (" dtype", lambda v: _each(v, lambda t: t.to(torch.float64 if t.is_floating_point() else torch.int16))),
    (" dims", lambda v: _each(v, lambda t: t[None, None, None])),
    (" contiguous", lambda v: _each(v, _gaps)),
    (" filled", lambda v: _each(v, lambda t: t[:0])),
    (" width", lambda v: _each(v, _wide)),
)


def breaking(name: str, rule: str) -> dict[str, Any]:
    """A call of the vendor operator that breaks the rule."""
    arguments = named(name)
    if f"{name} {rule}" in SPECIAL:
        return arguments | SPECIAL[f"{name} {rule}"](arguments)
    if rule in ("key heads", "latent width", "rope width", "key width", "query width"):
        argument = {"rope width": "key_rope", "query width": "query"}.get(rule, "key")
        value = arguments[argument]
        return arguments | {argument: value.expand(-1, -1, 2, -1) if rule == "key heads" else value[..., :32]}
    if rule == "page size":
        return arguments | {"key": _shape(1, 24, 24, 512)}
    for ending, change in _KINDS:
        if rule.endswith(ending) and rule.removesuffix(ending).split(", ")[0] in arguments:
            argument = rule.removesuffix(ending).split(", ")[-1]
            return arguments | {argument: change(arguments[argument])}
    wrong = {str: "BSND", bool: None, int: -7, torch.dtype: torch.float64}
    return arguments | {rule: wrong[type(arguments[rule])]}


RULES = [(name, rule) for name, (_, _, rules) in DOCUMENTED.items() for rule in rules.split(" | ")]


@pytest.mark.parametrize("name", sorted(VENDOR_OPERATORS))
def test_call_as_it_is_made_holds_every_rule(name: str) -> None:
    VENDOR_OPERATORS[name].check(named(name))


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_rule_of_a_call_refuses(name: str, rule: str) -> None:
    operator, arguments = VENDOR_OPERATORS[name], breaking(name, rule)
    broken = [r.name for r in operator.rules if not _holds(operator, r.name, arguments)]
    assert rule in broken
    alone = replace(operator, rules=tuple(r for r in operator.rules if r.name == rule))
    with pytest.raises(InputError, match=f"{name}: rule '{rule}' of its documents does not hold"):
        alone.check(arguments)


def _holds(operator: VendorOperator, rule: str, arguments: Mapping[str, Any]) -> bool:
    return next(r for r in operator.rules if r.name == rule).holds(**arguments)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, arg) for name, (_, explicit, _) in DOCUMENTED.items() for arg in explicit.split(" | ") if arg]
)
def test_default_is_never_relied_on(name: str, argument: str) -> None:
    arguments = {key: value for key, value in named(name).items() if key != argument}
    with pytest.raises(InputError, match=f"{name}: called without {argument}"):
        VENDOR_OPERATORS[name].check(arguments)


def test_error_shows_what_arrived() -> None:
    cos, sin = rotary_angles(torch.arange(2), 1e6, 4)
    arguments = {"self": torch.zeros(2, 3, 1, 4), "r1": cos, "r2": sin, "rotary_mode": "quarter"}
    with pytest.raises(InputError, match=r"self=\(2, 3, 1, 4\) float32") as caught:
        VENDOR_OPERATORS["npu_rotary_mul"].check(arguments)
    assert "supported: r1 of 3 or 4 dimensions" in str(caught.value)
