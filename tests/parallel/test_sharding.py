"""Bytes of a rank: equal to what accounting counts, and to a sum over every single tensor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from glm5_port.config_quantization import PackedInt4
from glm5_port.model import accounting
from glm5_port.model.tensors import expected_tensors
from glm5_port.parallel.cost.memory import BLOCK_SIZE, device_memory
from glm5_port.parallel.plan import Layout
from glm5_port.parallel.sharding import how_divided, rank_cache_bytes_per_token, rank_weights
from glm5_port.parallel.topology import find_hardware
from tests.parallel.questions import GLM_5, GLM_5_2

INT4_EXPERTS = PackedInt4(32, (r"re:^(?!.*\.mlp\.experts\.).*",))


@pytest.mark.parametrize("config", [GLM_5, GLM_5_2])
@pytest.mark.parametrize("drafts", [0, 3])
def test_one_rank_holds_what_accounting_counts(config, drafts: int) -> None:
    def held(weights: str) -> int:
        return rank_weights(config, weights, Layout(drafts=drafts), 0).total

    assert held("bf16") == accounting.weight_bytes(config, torch.bfloat16, mtp=bool(drafts))
    int4 = dataclasses.replace(config, int4=INT4_EXPERTS)
    assert held("int4") == accounting.weight_bytes(int4, torch.bfloat16, mtp=bool(drafts))
    assert rank_weights(int4, "int4", Layout(drafts=drafts), 0).total == held("int4")


def test_block_fp8_is_the_published_checkpoint() -> None:
    """756,162,687,872 bytes: the index file of GLM-5-FP8 (tests/model/test_accounting.py)."""
    assert rank_weights(GLM_5, "fp8", Layout(drafts=1), 0).total == 756_162_687_872


TEN_LAYERS = dataclasses.replace(
    GLM_5,
    num_hidden_layers=10,
    mlp_layer_types=GLM_5.mlp_layer_types[:10],
    indexer_types=GLM_5_2.indexer_types[:10],
    n_routed_experts=64,
)
"""True widths, mixed kinds of layers, fewer names to walk."""
LAYOUTS = [
    Layout(tensor=8, expert=8),
    Layout(tensor=8, expert_tensor=8),
    Layout(data=8, expert=8),
    Layout(data=16, expert=16, redundant_experts=16),
    Layout(tensor=8, data=2, expert=16, pipeline=4),
    Layout(tensor=4, expert=4, pipeline=5, drafts=1),
    Layout(tensor=2, context=4, expert=8),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_holds_the_sum_of_its_parts_of_every_tensor(layout: Layout) -> None:
    """Counted again tensor by tensor, with each expert of its own, for every stage."""
    local_experts = (64 + layout.redundant_experts) // layout.expert
    specs = expected_tensors(TEN_LAYERS, mtp=bool(layout.drafts))
    for stage, layers in enumerate(layout.stage_layers(10)):
        expected = 0
        for name, spec in specs.items():
            parts = name.split(".")
            layer = int(parts[2]) if parts[1] == "layers" else None
            last = stage == layout.pipeline - 1
            if layer is None:
                here = last and (bool(layout.drafts) or "embed_tokens" not in name)
                here = here or (stage == 0 and "embed_tokens" in name)
            else:
                here = layer in layers or (layer == 10 and last)
            if not here:
                continue
            if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= min(local_experts, 64):
                continue
            over, axis = how_divided(name, spec.component)
            ways = {"everywhere": 1, "tensor": layout.tensor, "expert_tensor": layout.expert_tensor}[over]
            assert spec.shape[axis] % ways == 0
            expected += math.prod(spec.shape) // ways * (4 if spec.kind == "float32" else 2)
        assert rank_weights(TEN_LAYERS, "bf16", layout, stage).total == expected


def test_memory_of_the_published_layouts_in_gb() -> None:
    """GB a device of GLM-5 FP8 as others count them, within 1 %."""
    for layout, published in (
        (Layout(tensor=8, expert=8), 95.0),
        (Layout(data=8, expert=8), 111.5),
        (Layout(data=16, expert=16), 66.2),
        (Layout(tensor=16, expert=16), 48.5),
        (Layout(data=32, expert=32), 43.6),
    ):
        assert rank_weights(GLM_5, "fp8", layout, 0).total / 1e9 == pytest.approx(published, rel=0.01)


def test_stages_split_the_model_and_nothing_is_lost() -> None:
    whole = rank_weights(GLM_5, "fp8", Layout(), 0).total
    stages = [rank_weights(GLM_5, "fp8", Layout(pipeline=6), stage).total for stage in range(6)]
    assert sum(stages) == whole
    assert rank_weights(GLM_5, "fp8", Layout(pipeline=6), 5).by_component["LM head"] == 154_880 * 6144 * 2


def test_the_cache_is_divided_by_stages_and_decode_context_not_by_tensor() -> None:
    def row(layout: Layout, kv_format: str = "fp8", stage: int = 0) -> int:
        return rank_cache_bytes_per_token(GLM_5, kv_format, layout, stage)

    for kv_format in ("plain", "fp8", "int8"):
        total = accounting.cache_bytes_per_token(GLM_5, torch.bfloat16, kv_format).total
        assert row(Layout(), kv_format) == row(Layout(tensor=8, expert=8), kv_format) == total
    assert sum(row(Layout(pipeline=4), stage=stage) for stage in range(4)) == row(Layout())
    assert row(Layout(tensor=8, decode_context=8)) == 78 * 656 // 8 + 78 * 132
    with_mtp = accounting.cache_bytes_per_token(GLM_5_2, torch.bfloat16, "fp8", mtp=True).total
    assert rank_cache_bytes_per_token(GLM_5_2, "fp8", Layout(drafts=3), 0) == with_mtp


def test_what_is_left_for_the_cache() -> None:
    layout = Layout(data=8, expert=8, exchange="all_gather")
    memory = device_memory(GLM_5, find_hardware("hgx-h200"), layout, "fp8", "fp8", "mixed", 8192)
    assert memory.pool == memory.capacity - memory.weights - memory.buffers - memory.runtime
    assert memory.tokens() % BLOCK_SIZE == 0
    assert memory.tokens() * memory.cache_per_token <= memory.pool < (memory.tokens() + BLOCK_SIZE) * memory.cache_per_token
    assert memory.sequences(65) == memory.tokens() // 128  # whole pages


def test_w4a8_on_one_a2_node_leaves_next_to_nothing() -> None:
    """vllm-ascend's own documents disagree whether it fits: 403 GB of 8 x 61.5, at most 100 K tokens of bf16 cache."""
    layout = Layout(tensor=8, expert=8, drafts=3)
    memory = device_memory(GLM_5, find_hardware("atlas-800-a2"), layout, "w4a8", "plain", "mixed", 4096)
    assert 0 < memory.tokens() < 100_000
