"""One decoder layer at GLM-5.2's true shape with 32 experts: INT4 experts here, bfloat16 in Hugging Face transformers.

Both compute one token at 4K cached tokens and a prefill of 512. transformers multiplies the latent cache out for all heads in
every step and attends densely; its experts are bfloat16 (`grouped_mm`), since it decompresses INT4 at load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.contest import Contest
from glm5_port.backends.cpu.extension import widest_isa
from glm5_port.config import Glm5Config, released
from glm5_port.model.build import build, random_weights
from glm5_port.model.cache import Span
from glm5_port.quant.formats.compressed_tensors import CompressedTensors
from glm5_port.quant.int4 import AMAX7, quantize_packed

EXPERTS, CONTEXT, PREFILL, VOCABULARY = 32, 4096, 512, 1024


def _fields() -> dict[str, Any]:
    config = dataclasses.replace(
        released("GLM-5.2"),
        num_hidden_layers=1,
        mlp_layer_types=("sparse",),
        indexer_types=("full",),
        n_routed_experts=EXPERTS,
        vocab_size=VOCABULARY,
        eos_token_id=(),
        pad_token_id=None,
        num_nextn_predict_layers=0,
    )
    return config.as_dict()


def _ours(tokens: int, context: int) -> Callable[[int], Tensor]:
    fields = _fields()
    experts = [f"model.layers.0.mlp.experts.{number}.{part}_proj" for number in range(EXPERTS) for part in ("gate", "up", "down")]
    block = CompressedTensors().config(AMAX7, experts, ["lm_head"], None)
    config = Glm5Config.from_dict({**fields, "quantization_config": block})
    floats = random_weights(Glm5Config.from_dict(fields), dtype=torch.bfloat16)

    def read(name: str) -> Tensor:
        for ending, part in ((".weight_packed", 0), (".weight_scale", 1)):
            if name.endswith(ending):
                return quantize_packed(floats(name.removesuffix(ending) + ".weight"))[part]
        return floats(name)

    model = build(config, read, backend="cpu", dtype=torch.bfloat16, max_context=context + tokens)
    cache = model.new_cache([context + tokens])
    for field in [*cache.layers[0].latent, *(cache.layers[0].index or [])]:
        field.normal_(0.0, 0.5)
    batch = cache.batch([Span(cache.open(), context, tokens)])
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))

    def run(copy: int) -> Tensor:
        with torch.inference_mode():
            return model.logits(model.step(ids, batch, cache)[-1:])

    return run


def _hugging_face(tokens: int, context: int) -> Callable[[int], Tensor]:
    from transformers import DynamicCache, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    fields = {key: value for key, value in _fields().items() if key not in ("architectures", "model_type", "dtype")}
    config = GlmMoeDsaConfig(**fields)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = GlmMoeDsaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        for first in range(0, context, 512):
            count = min(512, context - first)
            model(torch.zeros((1, count), dtype=torch.int64), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run(copy: int) -> Tensor:
        with torch.inference_mode():
            result = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            cache.crop(-tokens)  # the next call finds what this one found
            return result

    return run


def layers() -> Iterator[Contest]:
    """Decode and prefill."""
    config = Glm5Config.from_dict(_fields())
    attention = 2 * config.hidden_size * (config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim)
    attention += 2 * config.q_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    attention += 2 * config.num_attention_heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    attention += 2 * config.num_attention_heads * config.v_head_dim * config.hidden_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    for tokens, context, name in ((1, CONTEXT, f"decode at {CONTEXT}"), (PREFILL, 0, f"prefill {PREFILL}")):
        touched = min(EXPERTS, tokens * config.num_experts_per_tok)
        yield Contest(
            operator="decoder layer",
            work=f"{name}, {EXPERTS} experts",
            bytes=attention + touched * expert * 0.5625 + 2 * expert,
            operations=tokens * (attention + 2 * (config.num_experts_per_tok + 1) * expert),
            kind="bf16",
            contenders={
                f"cpu/{widest_isa()}, INT4 experts": _ours(tokens, context),
                "transformers bf16, sdpa, grouped_mm": _hugging_face(tokens, context),
            },
            floor_note="without the attention core, the indexer, the embedding and the head",
        )
