"""Building a model from a config and a function that gives tensors: what `glm5_port.load` shares with tests and tools."""

from __future__ import annotations

import dataclasses
import math
import zlib

import torch
from torch import Tensor, nn

from glm5_port.config import Glm5Config
from glm5_port.errors import ConfigError, InputError, did_you_mean
from glm5_port.model.decoder import DEFAULT_BLOCK_SIZE, Glm5Model
from glm5_port.model.layers import INT8, INT8_GROUPS, WIDE
from glm5_port.model.ranks import Ranks
from glm5_port.model.tensors import INT8_CODES, INT8_SCALES, expected_tensors
from glm5_port.model.weights import Read, fill, load_decoder_layer, load_norm
from glm5_port.operators.cache import INDEX, LATENT, cache_layout
from glm5_port.requests import resolve_backend

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
CORRECTION_BIAS = "e_score_correction_bias"
INT8_PARTS = {INT8_CODES: torch.int8, INT8_SCALES: torch.float32}
INT4_PARTS = {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64}


def build(
    config: Glm5Config,
    read: Read,
    *,
    backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    latent_norm_eps: float | None = None,
    cache_format: str | None = None,
    block_size: int | None = None,
    max_context: int | None = None,
    mtp: bool = False,
    int4_activations: str | None = None,
    trainable: bool = False,
    implementation: str | None = None,
    ranks: Ranks | None = None,
) -> Glm5Model:
    """As `load`, from a function that gives tensors by checkpoint name, in the working dtype and on the model's device.

    Args:
        config: the architecture.
        read: gives one tensor; each name is asked for once.
        device: overrides the backend's device, for fake tensors; operators are then chosen for that device.
        ranks: how the model is shared by ranks; `read` then gives this rank's part of each tensor that it asks for.
        implementation: pins every operator ("reference"), for comparisons.

    Raises:
        As `load`, all of it before `read` is called.
    """
    placed = resolve_backend(backend)
    _check_limits(config, latent_norm_eps, block_size, max_context)
    if mtp and config.mtp_layer is None:
        raise ConfigError("mtp=True was asked for, but this model has no MTP layer: num_nextn_predict_layers = 0")
    if trainable and (config.int4 is not None or config.int8 is not None):
        raise InputError(
            f"trainable=True was asked for a checkpoint with {'INT8' if config.int4 is None else 'INT4'} weights, whose codes "
            "have no gradient\n"
            "  Train the floating-point checkpoint with glm5_port.quant.qat and export it."
        )
    int4_activations = _int4_activations(int4_activations, config)
    cache_format = cache_format or "plain"
    cache_layout(LATENT, cache_format).check_widths((config.kv_lora_rank, config.qk_rope_head_dim))
    cache_layout(INDEX, cache_format).check_widths((config.index_head_dim,))
    model = Glm5Model(
        dataclasses.replace(config, latent_norm_eps=latent_norm_eps or config.rms_norm_eps),
        backend=placed.name,
        requested=backend,
        device=torch.device(device or placed.device_type),
        dtype=working_dtype(dtype, config),
        cache_format=cache_format,
        block_size=block_size or DEFAULT_BLOCK_SIZE,
        max_context=max_context,
        mtp=mtp,
        int4_activations=int4_activations,
        trainable=trainable,
        implementation=implementation,
        ranks=ranks,
    )
    model.ranks.check_choices(model.decisions())  # before any weight is read: every choice is made by now
    _fill(model, read)
    return model


def random_weights(config: Glm5Config, *, dtype: torch.dtype, seed: int = 0, device: str = "cpu", mtp: bool = False) -> Read:
    """Weights for `build` without a checkpoint: normal with a spread that keeps activations of order one, norms near one.
    A tensor depends on the seed and its name only, so that builds which read different sets of tensors agree on the rest."""
    shapes = {name: spec.shape for name, spec in expected_tensors(config, mtp=mtp).items()}

    def read(name: str) -> Tensor:
        shape = shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if name.endswith("norm.weight"):
            tensor = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            tensor = torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        return tensor.to(device, stored_dtype(name, dtype))

    return read


def working_dtype(dtype: torch.dtype | str | None, config: Glm5Config) -> torch.dtype:
    """The dtype a model computes in: the argument, else the config's, else bfloat16."""
    asked = dtype or config.dtype or "bfloat16"
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype={name}: no such working dtype{did_you_mean(name, DTYPES)}\n  supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def stored_dtype(name: str, working: torch.dtype, kind: str = "") -> torch.dtype:
    """What a tensor of a kind (of `TensorSpec`) is read as: the working dtype, but for the router's correction bias (float32 or
    wider: its spread is a few bfloat16 steps around an offset) and the parts of INT4 and INT8 weights, which keep their bits."""
    if kind in INT8_PARTS:
        return INT8_PARTS[kind]
    if name.endswith(CORRECTION_BIAS):
        return torch.promote_types(working, torch.float32)
    return INT4_PARTS.get(name.rpartition(".")[2], working)


def _check_limits(config: Glm5Config, latent_norm_eps: float | None, block_size: int | None, max_context: int | None) -> None:
    if latent_norm_eps is not None and not (math.isfinite(latent_norm_eps) and latent_norm_eps > 0):
        raise InputError(f"latent_norm_eps must be a positive number, got {latent_norm_eps}; None takes rms_norm_eps")
    if block_size is not None and block_size < 1:
        raise InputError(f"block_size must be at least 1, got {block_size}")
    if max_context is not None and not 1 <= max_context <= config.max_position_embeddings:
        raise InputError(
            f"max_context={max_context} is outside 1..{config.max_position_embeddings} (max_position_embeddings of this config)"
        )


def _int4_activations(asked: str | None, config: Glm5Config) -> str:
    if asked not in (None, WIDE, INT8, INT8_GROUPS):
        near = did_you_mean(asked, (WIDE, INT8, INT8_GROUPS))
        raise InputError(
            f"int4_activations={asked}: no such activations{near}\n"
            f"  supported: {WIDE} (W4A16), {INT8} (W4A8, a scale for each token), {INT8_GROUPS} (W4A8, one for each group)"
        )
    if asked in (INT8, INT8_GROUPS) and not any(config.has_int4_experts(layer) for layer in config.moe_layers):
        raise InputError(
            f"int4_activations={asked} was asked for a checkpoint without INT4 experts, whose activations stay as they are\n"
            "  Export it with glm5-port export first, or leave the option out."
        )
    return asked or WIDE


def _fill(model: Glm5Model, read: Read) -> None:
    config, trainable = model.part.config, model.trainable
    if model.part.has_embedding:
        model.embedding = nn.Parameter(read("model.embed_tokens.weight"), requires_grad=trainable)
    for number, layer in zip(model.part.layers, model.layers, strict=True):
        load_decoder_layer(layer, read, f"model.layers.{number}.", config, trainable=trainable)  # type: ignore[arg-type]
    if model.norm is not None and model.head is not None:
        load_norm(model.norm, read, "model.norm", trainable=trainable)
        fill(model.head, {"weight": read("lm_head.weight")}, trainable=trainable)
    if model.mtp is not None:
        prefix = f"model.layers.{config.num_hidden_layers}."
        fill(model.mtp.embedding_norm, {"weight": read(prefix + "enorm.weight")}, trainable=trainable)
        fill(model.mtp.hidden_norm, {"weight": read(prefix + "hnorm.weight")}, trainable=trainable)
        fill(model.mtp.join, {"weight": read(prefix + "eh_proj.weight")}, trainable=trainable)
        load_decoder_layer(model.mtp.layer, read, prefix, config, trainable=trainable)
        load_norm(model.mtp.norm, read, prefix + "shared_head.norm", trainable=trainable)
