"""A rank reads its part of each tensor, and of the file no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tests.model.checkpoint_files as files
from glm5_port.model.checkpoint import Checkpoint

WIDE = {"hidden_size": 160, "kv_lora_rank": 136, "q_lora_rank": 144, "quantization_config": files.FP8}
CUTS = [(0, 0, 5), (0, 3, 9), (0, 120, 20), (1, 0, 16), (1, 100, 40)]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, kind: str) -> None:
    from glm5_port.config import Glm5Config

    changes = WIDE if kind == "fp8" else {"hidden_size": 160, "kv_lora_rank": 136, "q_lora_rank": 144}
    config = Glm5Config.from_dict({**files.SMALL, **changes})
    tensors = files.random_tensors(config)
    directory = files.write(tmp_path / "model", files.quantized(tensors, config) if kind == "fp8" else tensors, **changes)
    checked = 0
    with Checkpoint.open(directory) as checkpoint:
        for name in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"):
            name = f"model.layers.1.self_attn.{name}.weight"
            whole = checkpoint.tensor(name, torch.float32)
            for cut in CUTS:
                if cut[1] + cut[2] <= whole.shape[cut[0]]:
                    assert torch.equal(checkpoint.tensor(name, torch.float32, cut), whole.narrow(*cut))
                    checked += 1
    assert checked >= 12


@pytest.mark.parametrize(
    ("name", "shape", "group_size", "cut"),
    [
        ("model.layers.3.self_attn.o_proj.weight_packed", (64, 8), 32, (1, 4, 4)),
        ("model.layers.3.self_attn.o_proj.weight_scale", (64, 2), 32, (1, 1, 1)),
        ("model.layers.3.self_attn.o_proj.weight_scale", (64, 1), -1, None),
        ("model.layers.3.self_attn.q_b_proj.weight_packed", (64, 8), 32, (0, 32, 32)),
        (
            "model.layers.3.self_attn.o_proj.weight_packed",
            (64, 4),
            32,
            "1 INT4 groups along dimension 1 cannot be divided into 2",
        ),
        ("model.layers.3.self_attn.o_proj.weight_scale", (64, 1), 32, "1 INT4 groups along dimension 1 cannot be divided into 2"),
        ("model.layers.3.self_attn.q_b_proj.weight", (63, 8), 32, "63 elements along dimension 0 cannot be divided into 2"),
        ("model.layers.3.input_layernorm.weight", (64,), 32, None),
    ],
)
def test_cuts_fall_between_groups_of_codes(name: str, shape: tuple[int, ...], group_size: int, cut: object) -> None:
    from types import SimpleNamespace

    from glm5_port.errors import PlanError
    from glm5_port.parallel.execute import PlanRanks
    from glm5_port.parallel.plan import Layout

    config = SimpleNamespace(int4=SimpleNamespace(group_size=group_size))
    rank = SimpleNamespace(layout=Layout(tensor=2, expert=2), at={"tensor": 1}, config=config)
    if isinstance(cut, str):
        with pytest.raises(PlanError, match=cut):
            PlanRanks.cut(rank, name, "attention", shape)
    else:
        assert PlanRanks.cut(rank, name, "attention", shape) == cut
