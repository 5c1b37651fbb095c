"""Small random checkpoints written by Hugging Face transformers (extra `transformers`): the outside truth of tests and demo.

Weights are spread so that every part matters: projections of unit gain, norms and the router's bias away from their neutral
initial values, because a model whose biases are zero would hide half of the mistakes one can make.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from glm5_port.errors import InputError

LOGIT_GAIN = 0.5
"""Spread of the logits: small enough that float32 rounding stays below 1e-5, large enough to prove something."""


def write_checkpoint(directory: str | PathLike[str], fields: dict[str, Any], *, seed: int = 0) -> Any:
    """Writes a random float32 `GlmMoeDsaForCausalLM` and returns the transformers model that was saved.

    Args:
        directory: where to write; made if missing.
        fields: config.json fields.
        seed: of the weights.

    Raises:
        InputError: transformers is not installed, or too old for this architecture.
    """
    try:
        from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
    except ImportError as error:
        raise InputError(
            f"Hugging Face transformers 5.23 or newer is needed to write a checkpoint with it: {error}\n"
            "  Install it: pip install 'glm5_port[transformers]'"
        ) from error
    torch.manual_seed(seed)
    config = GlmMoeDsaConfig(
        **{key: value for key, value in fields.items() if key not in ("architectures", "model_type", "dtype")}
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = GlmMoeDsaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
            else:
                gain = LOGIT_GAIN if name == "lm_head.weight" else 1.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    return model
