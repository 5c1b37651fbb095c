"""The released model's widths through the vendor's own shape functions: shapes and dtypes of every call, and no memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from glm5_port.config import Glm5Config
from glm5_port.dispatch import trace_through
from glm5_port.model.build import build, stored_dtype
from glm5_port.model.cache import Span
from glm5_port.model.tensors import expected_tensors
from glm5_port.testing.tiny import tiny_config
from tests.model.test_fake_tensors import RELEASES, TRUE_WIDTHS, run

DEVICE = "npu:0"


@pytest.fixture(scope="module", autouse=True)
def shape_functions() -> Iterator[None]:
    """The two operators that the vendor gives no shape function for: both keep the shape, packing divides the last dimension."""
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_format_cast", lambda x, acl_format, **_: torch.empty_like(x), "Meta")
    library.impl(
        "npu_convert_weight_to_int4pack", lambda w, inner_k_tiles=0: w.new_empty((*w.shape[:-1], w.shape[-1] // 8)), "Meta"
    )
    yield
    library._destroy()


@pytest.mark.parametrize("release", list(RELEASES))
def test_true_widths(release: str) -> None:
    """Four layers: dense and experts, with an indexer and sharing one; prefill, a mixed step, and decode at 6000 tokens."""
    config: Glm5Config = tiny_config(**TRUE_WIDTHS, num_hidden_layers=4, first_k_dense_replace=3, **RELEASES[release])
    shapes = {name: spec.shape for name, spec in expected_tensors(config, mtp=False).items()}

    def read(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=stored_dtype(name, torch.bfloat16), device=DEVICE)

    with FakeTensorMode(), trace_through(), torch.no_grad():
        model = build(config, read, backend="npu", device=DEVICE, block_size=128)
        chosen = {selection.operator: selection.chosen.id for selection in model.decisions()}
        assert all(chosen[name] == "npu/aclnn" for name in ("mla_prologue_into_cache", "lightning_indexer", "expert_mlp")), chosen
        cache = model.new_cache([6000, 6000])
        first, second = cache.open(), cache.open()
        for spans in (
            [Span(first, 0, 40)],
            [Span(first, 40, 5), Span(second, 0, 7)],
            [Span(first, 5999, 1), Span(second, 7, 1)],
        ):
            _, hidden, logits = run(model, cache, spans)
            tokens = sum(span.count for span in spans)
            assert isinstance(hidden, FakeTensor)
            assert (hidden.shape, hidden.dtype, hidden.device) == ((tokens, 6144), torch.bfloat16, model.device)
            assert (logits.shape, logits.device) == ((len(spans), 154880), model.device)
