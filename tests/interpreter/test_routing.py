"""What the parity cases of route_experts do not hold."""

from __future__ import annotations

import torch

from glm5_port.backends.cuda.routing import route_experts_triton
from glm5_port.operators.moe import route_experts


def test_experts_that_do_not_exist_are_not_chosen_when_all_scores_are_negative() -> None:
    """21 experts in a block of 32: the rest of the block would score 1/2."""
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "hidden": torch.randn(9, 40, generator=generator),
        "gate": torch.randn(21, 40, generator=generator),
        "correction_bias": torch.full((21,), -3.0),
        "top_k": 5,
        "groups": 1,
        "groups_kept": 1,
        "renormalise": True,
        "scale": 2.5,
    }
    weights, ids = route_experts_triton(**arguments)
    expected_weights, expected_ids = route_experts.reference(**arguments)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)
