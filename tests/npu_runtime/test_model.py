"""Whole models on `npu:0` of the stand-in runtime: fused operators run by the vendor's kernels, the answers are the CPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glm5_port
from glm5_port.config import Glm5Config
from glm5_port.model.build import build, random_weights
from glm5_port.model.decoder import Glm5Model
from glm5_port.testing.tiny import TINY, tiny_config
from tests.model.int4_checkpoints import int4_export
from tests.model.int8_checkpoints import int8_checkpoint
from tests.model.models import watch
from tests.npu_runtime import machine
from tests.npu_runtime.contracts import BLOCK, CONTRACTS, TOKENS

FUSED = {
    "add_rms_norm": "aclnnAddRmsNorm",
    "indexer_prologue": "aclnnRotaryPositionEmbedding",
    "mla_prologue_into_cache": "aclnnMlaPrologV3WeightNz",
    "lightning_indexer": "aclnnLightningIndexer",
    "sparse_mla_attention": "aclnnSparseFlashAttention",
    "attention_output": "aclnnTransposeBatchMatMul",
    "route_experts": "aclnnMoeGatingTopK",
    "expert_mlp": "aclnnGroupedMatmul",
    "gated_mlp": "aclnnSwiGlu",
    "write_cache": "aclnnScatterNdUpdate",
}
"""Operator -> how the name of the kernel begins that must be seen when it runs."""
TINY_CODE = Path(__file__).resolve().parents[2] / "models" / "glm5-tiny-code"


def made(backend: str, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Glm5Model:
    config: Glm5Config = tiny_config(**CONTRACTS)
    weights = random_weights(config, dtype=torch.bfloat16, device=backend)
    return build(config, lambda name: widened(weights(name), dtype), backend=backend, dtype=dtype, block_size=BLOCK, **options)


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of bfloat16 in a wider dtype, so that two models have the same ones."""
    return weight.to(dtype) if weight.dtype == torch.bfloat16 else weight


def choices(model: Glm5Model, run: Callable[[], Any]) -> dict[str, list[Any]]:
    """What the indexer and the router chose, in the order of the calls."""
    found: dict[str, list[Any]] = {"lightning_indexer": [], "route_experts": []}

    def note(operator: str, _: Any, result: Any) -> None:
        if operator in found:
            found[operator].append(result)

    with watch(model, note):
        run()
    return found


@contextlib.contextmanager
def forced(model: Glm5Model, chosen: dict[str, list[Any]]) -> Iterator[None]:
    """Within the context the model's own indexer and router run, and what another model chose goes on: one near-tie that rounding
    decides differently would change everything after it."""
    remaining = {name: iter(values) for name, values in chosen.items()}
    bindings = [bound for bound in model.binder.bindings if bound.selection.operator in remaining]
    originals = [bound.function for bound in bindings]

    def teacher(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mine, theirs = inner(*args, **kwargs), next(remaining[name])
            if isinstance(mine, tuple):
                return tuple(b.to(a.device, a.dtype) for a, b in zip(mine, theirs, strict=True))
            return theirs.to(mine.device, mine.dtype)

        return call

    for bound, inner in zip(bindings, originals, strict=True):
        bound.function = teacher(bound.selection.operator, inner)
    try:
        yield
    finally:
        for bound, inner in zip(bindings, originals, strict=True):
            bound.function = inner


def error(logits: Tensor, gold: Tensor) -> float:
    return float((logits.cpu().double() - gold.double()).square().mean().sqrt() / gold.double().square().mean().sqrt())


def agree_where_decided(logits: Tensor, gold: Tensor) -> int:
    """Tokens must be equal where the gold's margin exceeds what rounding moves; how many are that clear."""
    values = gold.double().topk(2, dim=-1).values
    moved = (logits.cpu().double() - gold.double()).abs().max()
    clear = values[..., 0] - values[..., 1] > 2 * moved
    assert torch.equal(logits.cpu().argmax(-1)[clear], gold.argmax(-1)[clear])
    return int(clear.sum())


@pytest.fixture(scope="module")
def npu() -> Glm5Model:
    return made("npu")


def kernels_of(model: Glm5Model) -> dict[str, set[str]]:
    """Operator -> the kernels that ran for it in one prefill."""
    seen: dict[str, set[str]] = {}

    def note(operator: str, *_: Any) -> None:
        seen.setdefault(operator, set()).update(call.kernel for call in machine.taken())

    machine.taken()
    with watch(model, note):
        model(TOKENS)
    return seen


def test_every_fused_operator_is_the_vendors(npu: Glm5Model) -> None:
    decisions = {(selection.operator, selection.chosen.id) for selection in npu.decisions()}
    assert {operator for operator, _ in decisions} == {*FUSED, "linear"}
    assert all(chosen == "npu/aclnn" for _, chosen in decisions), decisions
    seen = kernels_of(npu)
    for operator, kernel in FUSED.items():
        assert any(name.startswith(kernel) for name in seen[operator]), f"{operator}: {sorted(seen[operator])}"


def test_large_weights_lie_in_fractal_format(npu: Glm5Model) -> None:
    with machine.recorded() as calls:
        npu(TOKENS[:, :4])
    prolog = next(call for call in calls if call.kernel.startswith("aclnnMlaProlog"))
    weights = [tensor for tensor in prolog.tensors if tensor.format == 29]
    assert {tensor.shape for tensor in weights} == {(1024, 2048), (2048, 4 * 256), (1024, 576)}
    assert all(tensor.storage == (tensor.shape[1] // 16, tensor.shape[0] // 16, 16, 16) for tensor in weights)


def check_logits(suspect: Glm5Model, wide: Glm5Model, narrow: Glm5Model, decided: int = 10) -> None:
    """Against the CPU in float32, its choices forced on all: no worse than twice the CPU in bfloat16, and the same tokens where
    that leaves no doubt, which it must in `decided` places."""
    gold: list[Tensor] = []
    chosen = choices(wide, lambda: gold.append(wide(TOKENS)))
    with forced(narrow, chosen):
        reference = error(narrow(TOKENS), gold[0])
    with forced(suspect, chosen):
        logits = suspect(TOKENS)
    assert 0 < error(logits, gold[0]) <= 2 * reference + torch.finfo(torch.bfloat16).eps
    assert agree_where_decided(logits, gold[0]) >= decided


def test_logits_are_the_cpus_within_rounding(npu: Glm5Model) -> None:
    check_logits(npu, made("cpu", dtype=torch.float32), made("cpu"))


def test_quantised_cache(npu: Glm5Model) -> None:
    """The 656-byte rows, read by the kernel made for them; index keys stay what torch's own operators read."""
    quantised = made("npu", cache_format="int8")
    assert any("aclnnKvQuantSparseFlashAttention" in kernels for kernels in kernels_of(quantised).values())
    check_logits(quantised, *(made("cpu", dtype=dtype, cache_format="int8") for dtype in (torch.float32, torch.bfloat16)))


@pytest.mark.parametrize(
    ("activations", "group_size", "scale"), [("wide", 128, "bfloat16"), ("wide", 32, "bfloat16"), ("int8", -1, "int64")]
)
def test_int4_experts(tmp_path: Path, activations: str, group_size: int, scale: str) -> None:
    """W4A16 by groups and W4A8 by output: an export of this library, packed by the vendor's own host code while it loads."""
    files = int4_export(tmp_path, (r"experts\.\d+\.",), group_size, **{**TINY, **CONTRACTS})
    options: dict[str, Any] = {"block_size": BLOCK, "int4_activations": activations}
    model = glm5_port.load(files, backend="npu", **options)
    with machine.recorded() as calls:
        model(TOKENS)
    products = [call for call in calls if call.kernel.startswith("aclnnGroupedMatmul")]
    assert products, "no grouped product ran"
    packed = {(tensor.dtype, len(tensor.shape)) for call in products for tensor in call.tensors}
    assert ("int4", 3) in packed or ("int32", 3) in packed
    assert any(tensor.dtype == scale for call in products for tensor in call.tensors)
    check_logits(model, *(glm5_port.load(files, backend="cpu", dtype=dtype, **options) for dtype in ("float32", "bfloat16")))


def test_int8_projections(tmp_path: Path) -> None:
    """W8A8: every projection of attention, indexer, dense MLP and shared expert by the vendor's 8-bit product, on weights in
    FRACTAL_NZ that never were floating point here."""
    files = int8_checkpoint(tmp_path, **{**TINY, **CONTRACTS})
    model = glm5_port.load(files, backend="npu", block_size=BLOCK)
    chosen = {(selection.operator, selection.chosen.id) for selection in model.decisions()}
    assert ("int8_matmul", "npu/aclnn") in chosen
    assert all(name.startswith("npu/") for _, name in chosen), chosen
    seen = kernels_of(model)["int8_matmul"]
    assert {"aclnnQuantMatmulWeightNz"} <= seen and any(name.startswith("aclnnDynamicQuant") for name in seen), seen
    wide, narrow = (glm5_port.load(files, backend="cpu", dtype=dtype, block_size=BLOCK) for dtype in ("float32", "bfloat16"))
    check_logits(model, wide, narrow, decided=5)  # 8-bit activations move logits more


def test_generation_is_the_cpus_where_nothing_is_close() -> None:
    """The trained model: its margins are wide, so that greedy text is equal token for token."""
    text = list(b"def add(a, b):\n    return ")
    models = [glm5_port.load(TINY_CODE, backend=backend, block_size=BLOCK) for backend in ("cpu", "npu")]
    expected, found = (model.generate([text], max_new_tokens=24)[0] for model in models)
    assert list(found) == list(expected)
