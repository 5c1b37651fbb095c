"""The contest of one decoder layer in bfloat16: this library on cuda's kernels, and Hugging Face transformers (sdpa, grouped_mm)
with weights of the same sizes on the same device. One token at 4K cached tokens, and a prefill of 512."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.contest import Contest
from benchmarks.cuda.products import GLM5, Bench
from glm5_port.config import Glm5Config, released
from glm5_port.model.build import build, random_weights
from glm5_port.model.cache import Span
from glm5_port.testing.tiny import tiny_config

EXPERTS, VOCABULARY = 32, 1024


def _fields(bench: Bench) -> dict[str, Any]:
    full = bench.sizes is GLM5
    config = dataclasses.replace(
        released("GLM-5.2") if full else tiny_config(),
        num_hidden_layers=1,
        mlp_layer_types=("sparse",),
        indexer_types=("full",),
        n_routed_experts=EXPERTS if full else 16,
        vocab_size=VOCABULARY if full else 320,
        eos_token_id=(),
        pad_token_id=None,
        num_nextn_predict_layers=0,
    )
    return config.as_dict()


def _ours(bench: Bench, tokens: int, context: int) -> Callable[[int], Tensor]:
    device = bench.device
    config = Glm5Config.from_dict(_fields(bench))
    weights = random_weights(config, dtype=bench.dtype)
    model = build(config, lambda name: weights(name).to(device), device=device, dtype=bench.dtype, max_context=None)
    cache = model.new_cache([context + tokens])
    for field in [*cache.layers[0].latent, *(cache.layers[0].index or [])]:
        field.normal_(0.0, 0.5)
    batch = cache.batch([Span(cache.open(), context, tokens)])
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    return lambda copy: model.logits(model.step(ids, batch, cache)[-1:])


def _hugging_face(bench: Bench, tokens: int, context: int) -> Callable[[int], Tensor]:
    from transformers import DynamicCache, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    fields = {key: value for key, value in _fields(bench).items() if key not in ("architectures", "model_type", "dtype")}
    config = GlmMoeDsaConfig(**fields)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            model = GlmMoeDsaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    ids = torch.zeros((1, tokens), dtype=torch.int64, device=bench.device)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for first in range(0, context, 512):
            count = min(512, context - first)
            model(ids.new_zeros((1, count)), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run(copy: int) -> Tensor:
        result: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.crop(-tokens)  # the next call finds what this one found
        return result

    return run


def _or_refusal(make: Callable[[], Callable[[int], Tensor]]) -> Callable[[int], Tensor]:
    """A contender; one that cannot be made is a row that says why."""
    try:
        return make()
    except (ImportError, RuntimeError, ValueError) as error:
        message = f"{type(error).__name__}: {error}"

        def refuse(copy: int) -> Tensor:
            raise ValueError(message)

        return refuse


def layer(bench: Bench) -> Iterator[Contest]:
    """Decode and prefill."""
    config = Glm5Config.from_dict(_fields(bench))
    attention = config.hidden_size * (config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim)
    attention += config.q_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    attention += config.num_attention_heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    attention += config.num_attention_heads * config.v_head_dim * config.hidden_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    full = bench.sizes is GLM5
    for tokens, context, name in ((1, 4096 if full else 32, "decode"), (512 if full else 8, 0, "prefill")):
        touched = min(config.n_routed_experts, tokens * config.num_experts_per_tok) + 1
        yield Contest(
            "decoder layer, bfloat16",
            f"{name} {tokens} at {context}, {config.n_routed_experts} experts",
            2.0 * (attention + touched * expert),
            2.0 * tokens * (attention + (config.num_experts_per_tok + 1) * expert),
            {
                "glm5_port": _or_refusal(lambda tokens=tokens, context=context: _ours(bench, tokens, context)),
                "transformers, sdpa, grouped_mm": _or_refusal(
                    lambda tokens=tokens, context=context: _hugging_face(bench, tokens, context)
                ),
            },
            1,
        )
