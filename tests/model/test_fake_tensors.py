"""The model at its true widths on devices that are not here: no host sync and no device literal hides in it.

`.item()` raises on a fake tensor, and so does an operation on tensors of two devices. `trace_through` makes the bodies of the
portable implementations visible, which would be opaque ops otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from glm5_port.config import Glm5Config
from glm5_port.dispatch import trace_through
from glm5_port.model.build import build, stored_dtype
from glm5_port.model.cache import Batch, PagedCache, Span
from glm5_port.model.decoder import Glm5Model
from glm5_port.model.tensors import expected_tensors
from glm5_port.testing.tiny import tiny_config

TRUE_WIDTHS: dict[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
}
RELEASES: dict[str, dict[str, Any]] = {
    "glm5": {
        "index_topk_freq": 1,
        "index_skip_topk_offset": 2,
        "index_share_for_mtp_iteration": False,
        "max_position_embeddings": 202752,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "glm52": {"max_position_embeddings": 1048576},
}
# With an index: `.to("cuda")` would ask the missing driver which device is the current one.
DEVICES = ["cuda:0", "xpu:0"]
_TYPES = {"cuda": 1, "xpu": 12}  # places in c10's table of device guards
_DEVICE_TYPES = 21


@contextlib.contextmanager
def device_guards() -> Iterator[None]:
    """A PyTorch that was built without a device refuses to switch to it, even for fake tensors. Within the context the
    CPU's guard stands in, which does nothing."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    if not libraries:
        pytest.skip("PyTorch's libc10 is not where it is looked for")
    table = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(ctypes.CDLL(str(libraries[0])), "_ZN3c104impl26device_guard_impl_registryE")
    before = list(table)
    for place in _TYPES.values():
        table[place] = table[place] or table[0]
    try:
        yield
    finally:
        for place in _TYPES.values():
            table[place] = before[place]


@contextlib.contextmanager
def fake_model(release: str, device: str, layers: int, **options: Any) -> Iterator[Glm5Model]:
    dense = min(3, layers - 1)
    config: Glm5Config = tiny_config(**TRUE_WIDTHS, num_hidden_layers=layers, first_k_dense_replace=dense, **RELEASES[release])
    shapes = {name: spec.shape for name, spec in expected_tensors(config, mtp=True).items()}

    def read(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=stored_dtype(name, torch.bfloat16), device=device)

    with device_guards(), FakeTensorMode(), trace_through(), torch.no_grad():
        yield build(config, read, device=device, **options)


def run(model: Glm5Model, cache: PagedCache, spans: list[Span]) -> tuple[Batch, Tensor, Tensor]:
    """One step: (batch, hidden states, logits of the last positions)."""
    batch = cache.batch(spans)
    tokens = torch.zeros(sum(span.count for span in spans), dtype=torch.int64, device=model.device)
    hidden = model.step(tokens, batch, cache)
    return batch, hidden, model.logits(hidden[batch.last_rows_B])


def check(model: Glm5Model, *, prefill: int, length: int) -> None:
    """Prefill, a step that mixes two sequences, and decode; each also through the MTP layer."""
    cache = model.new_cache([length, length])
    first, second = cache.open(), cache.open()
    for spans in (
        [Span(first, 0, prefill)],
        [Span(first, prefill, 5), Span(second, 0, 7)],
        [Span(first, length - 1, 1), Span(second, 7, 1)],
    ):
        batch, hidden, logits = run(model, cache, spans)
        tokens = sum(span.count for span in spans)
        assert isinstance(hidden, FakeTensor)
        assert (hidden.shape, hidden.dtype, hidden.device) == ((tokens, 6144), torch.bfloat16, model.device)
        assert (logits.shape, logits.device) == ((len(spans), 154880), model.device)
        if model.mtp is not None:
            embedded = model.embed(torch.zeros(tokens, dtype=torch.int64, device=model.device))
            out, indices = model.mtp(hidden, embedded, model.locate(batch), cache.layers[-1], None)
            assert (out.shape, out.device) == (hidden.shape, model.device)
            if model.dense_attention:
                assert indices is None
            else:
                assert (indices.shape, indices.dtype, indices.device) == ((tokens, 2048), torch.int32, model.device)


@pytest.mark.parametrize("device", DEVICES)
def test_true_widths_need_no_host_and_no_other_device(device: str) -> None:
    """GLM-5.2 in four layers: dense and experts, with an indexer and sharing one."""
    with fake_model("glm52", device, 4) as model:
        assert [model.config.owns_indexer(layer) for layer in range(4)] == [True, True, True, False]
        assert [model.config.is_moe(layer) for layer in range(4)] == [False, False, False, True]
        assert {selection.facts["device_type"] for selection in model.decisions()} == {torch.device(device).type}
        check(model, prefill=40, length=6000)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("release", list(RELEASES))
def test_whole_models(release: str, device: str) -> None:
    """All 78 layers and the MTP layer: 744 billion parameters that nobody has to hold."""
    with fake_model(release, device, 78, mtp=True) as model:
        assert len(model.config.full_layers) == {"glm5": 78, "glm52": 21}[release]
        counted = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("correction_bias"))
        assert counted == {"glm5": 753_864_119_552, "glm52": 753_329_921_024}[release]
        check(model, prefill=200, length=6000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"cache_format": "fp8"}, {"cache_format": "int8"}, {"max_context": 2048}, {"block_size": 128}]
)
def test_other_caches_and_dense_attention(options: dict[str, Any]) -> None:
    with fake_model("glm52", "cuda:0", 4, mtp=True, **options) as model:
        check(model, prefill=40, length=min(model.max_context, 6000))


def spoil(model: Glm5Model, operator: str, after: Any) -> None:
    bound = next(bound for bound in model.binder.bindings if bound.selection.operator == operator)
    inner = bound.function
    bound.function = lambda *args, **kwargs: after(inner(*args, **kwargs))


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        (lambda y: y * y.amax().item(), DataDependentOutputException, "_local_scalar_dense"),
        (lambda y: y[torch.nonzero(y[:, 0])[:, 0]], Exception, "nonzero"),
        (lambda y: y + torch.zeros(y.shape, dtype=y.dtype), Exception, "at least two devices"),
    ],
    ids=["host sync", "shape from data", "device literal"],
)
def test_the_check_finds_what_it_is_for(after: Any, error: type[Exception], message: str) -> None:
    with fake_model("glm52", "cuda:0", 2) as model:
        spoil(model, "attention_output", after)
        cache = model.new_cache([64])
        with pytest.raises(error, match=message):
            run(model, cache, [Span(cache.open(), 0, 9)])
