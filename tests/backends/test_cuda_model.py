"""GLM-5.2 at its true widths bound to the kernels of cuda, on fake tensors of a card that is not here: kernels start nothing,
and everything around them shows whether it waits for the card."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_fake_tensors import check, fake_model

OWN = {
    "add_rms_norm",
    "mla_prologue_into_cache",
    "indexer_prologue",
    "write_cache",
    "lightning_indexer",
    "sparse_mla_attention",
    "route_experts",
}


@pytest.mark.usefixtures("card")
def test_a_step_of_own_kernels_needs_no_host() -> None:
    with fake_model("glm52", "cuda:0", 4) as model:
        chosen = {bound.selection.operator: bound.implementation.id for bound in model.binder.bindings}
        assert {operator for operator, name in chosen.items() if name.startswith("cuda/")} >= OWN
        phases = {
            bound.selection.facts["phase"]: bound.implementation.variant
            for bound in model.binder.bindings
            if bound.selection.operator == "sparse_mla_attention"
        }
        assert phases == {"prefill": "triton", "decode": "triton_split"}
        check(model, prefill=40, length=6000)
    assert not torch.cuda.is_initialized()
