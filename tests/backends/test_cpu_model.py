"""A tiny model says the same with native and with portable kernels in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import glm5_port
from glm5_port.backends.cpu import extension
from glm5_port.model.decoder import Glm5Model
from tests.model.int4_checkpoints import int4_export
from tests.model.models import prompt, quick_config, quick_model
from tests.portable import without_native_kernels

pytestmark = pytest.mark.skipif(bool(extension.isa_missing("avx2")), reason=f"NOT TESTED: {extension.isa_missing('avx2')}")
PROMPTS = [prompt(length) for length in (3, 17, 40)]


def _backends(model: Glm5Model) -> set[str]:
    return {bound.implementation.backend for bound in model.binder.bindings}


def _tokens(model: Glm5Model) -> list[list[int]]:
    return model.generate(PROMPTS, max_new_tokens=12, stop_ids=())


@pytest.mark.parametrize("cache_format", ["plain", "int8"])
def test_floating_point_weights(cache_format: str) -> None:
    widths = {} if cache_format == "plain" else {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}

    def made() -> Glm5Model:
        return quick_model(quick_config(**widths), dtype=torch.float32, cache_format=cache_format)

    native = made()
    with without_native_kernels():
        portable = made()
        expected = _tokens(portable)
    assert (_backends(native), _backends(portable)) == ({"cpu"}, {"torch"})
    assert _tokens(native) == expected
    assert len({tuple(tokens[-12:]) for tokens in expected}) > 1


def test_int4_experts(tmp_path: Path) -> None:
    directory = int4_export(tmp_path)
    native = glm5_port.load(directory, backend="cpu", dtype="float32")
    with without_native_kernels():
        portable = glm5_port.load(directory, backend="cpu", dtype="float32")
        expected = _tokens(portable)
    assert (_backends(native), _backends(portable)) == ({"cpu"}, {"torch"})
    assert _tokens(native) == expected
