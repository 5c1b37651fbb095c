"""How many parameters, tensors and bytes a GLM-5 model has: on disk, in memory, and in its cache. From the configuration alone.

Parameters are counted as everybody does: correction biases are buffers, not parameters. Bytes count every stored tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from glm5_port.config import Glm5Config
from glm5_port.model.block_fp8 import scale_shape
from glm5_port.model.checkpoint_check import kept_in_float
from glm5_port.model.tensors import (
    FLOAT32,
    INT4_CODES,
    INT4_SCALES,
    INT4_SHAPE,
    INT8_CODES,
    INT8_SCALES,
    PROJECTION,
    TensorSpec,
    expected_tensors,
    layer_prefix,
    mtp_tensors,
)
from glm5_port.operators.cache import INDEX, LATENT, cache_layout

CORRECTION_BIASES = "correction biases"
_DECODED = r"re:.*\.kv_b_proj$"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of a model.

    Attributes:
        components: parameters of each part of the trunk ("attention", "routed experts", ...).
        mtp: parameters of the MTP layer; 0 if there is none. It shares embedding and head with the trunk.
        correction_biases: entries of the routers' float32 biases, the MTP layer's excluded. Buffers, not parameters.
    """

    components: dict[str, int]
    mtp: int
    correction_biases: int

    @property
    def trunk(self) -> int:
        """Parameters without the MTP layer: 743,911,199,232 for GLM-5."""
        return sum(self.components.values())

    @property
    def total(self) -> int:
        """Parameters with the MTP layer."""
        return self.trunk + self.mtp


def count_parameters(config: Glm5Config) -> Parameters:
    """Parameters by component: of the model, whatever its checkpoint packs them into."""
    config = dataclasses.replace(config, int4=None, int8=None)
    components: dict[str, int] = {}
    for spec in expected_tensors(config, mtp=False).values():
        components[spec.component] = components.get(spec.component, 0) + math.prod(spec.shape)
    biases = components.pop(CORRECTION_BIASES, 0)
    mtp = sum(math.prod(spec.shape) for spec in _mtp_only(config) if spec.component != CORRECTION_BIASES)
    return Parameters(components, mtp, biases)


def count_int4(config: Glm5Config) -> dict[str, int]:
    """Parameters that are stored in INT4, by the components of `count_parameters`; those of the MTP layer as "MTP layer"."""
    counts: dict[str, int] = {}
    mtp = None if config.mtp_layer is None else layer_prefix(config.mtp_layer)
    for name, spec in expected_tensors(dataclasses.replace(config, int4=None, int8=None), mtp=mtp is not None).items():
        if spec.kind == PROJECTION and config.is_int4(name.removesuffix(".weight")):
            component = "MTP layer" if mtp is not None and name.startswith(mtp) else spec.component
            counts[component] = counts.get(component, 0) + math.prod(spec.shape)
    return counts


def active_parameters(config: Glm5Config) -> int:
    """Parameters that one token uses, without the MTP layer: of the routed experts only those it is sent to, the correction
    biases, and the LM head but not the embedding (a row of it is looked up, nothing is multiplied)."""
    counted = count_parameters(config)
    active = dict(counted.components)
    del active["embedding"]
    if "routed experts" in active:
        active["routed experts"] = active["routed experts"] // config.n_routed_experts * config.num_experts_per_tok
    return sum(active.values()) + counted.correction_biases


@dataclass(frozen=True, slots=True)
class Storage:
    """What a checkpoint takes: its number of tensors (multipliers included) and their bytes."""

    tensors: int
    bytes: int


def checkpoint_storage(config: Glm5Config) -> Storage:
    """The checkpoint that the configuration describes, MTP layer included: 16-bit floats (32-bit if `dtype` says so), or
    block-FP8 if it is quantised."""
    specs = expected_tensors(config, mtp=config.mtp_layer is not None)
    width = getattr(torch, config.dtype or "bfloat16").itemsize
    tensors = total = 0
    for name, spec in specs.items():
        tensors += 1
        quantization = config.quantization
        if quantization is not None and spec.kind == PROJECTION and not kept_in_float(name, quantization):
            tensors += 1
            total += math.prod(spec.shape) + 4 * math.prod(scale_shape(spec.shape, quantization.block))
        else:
            total += _float_bytes(spec, width)
    return Storage(tensors, total)


@lru_cache  # a walk over 60,000 names, asked for again with every context and batch
def weight_bytes(config: Glm5Config, dtype: torch.dtype, mtp: bool = False) -> int:
    """Bytes of the loaded weights in a working dtype. Block-FP8 checkpoints are dequantised while loading, and so is kv_b_proj
    where it is INT4 or INT8."""
    for name in ("int4", "int8"):
        if (codes := getattr(config, name)) is not None:
            config = dataclasses.replace(config, **{name: dataclasses.replace(codes, ignore=(*codes.ignore, _DECODED))})
    return sum(_float_bytes(spec, dtype.itemsize) for spec in expected_tensors(config, mtp).values())


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes that the cache takes for one token, over all layers.

    Attributes:
        latent: of the latents and rope keys, which every layer caches.
        index: of the index keys, which only layers with an indexer cache.
    """

    latent: int
    index: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.latent + self.index


def cache_bytes_per_token(
    config: Glm5Config,
    dtype: torch.dtype,
    latent_format: str = "plain",
    index_format: str | None = None,
    mtp: bool = False,
) -> CacheBytes:
    """Bytes of cache that one token takes.

    Args:
        config: the model.
        dtype: the model's dtype, in which a plain cache stores.
        latent_format: "plain", "fp8" or "int8".
        index_format: the same for the index keys; None means as `latent_format`.
        mtp: whether the MTP layer has a cache too.

    Raises:
        InputError: for an unknown format, or one whose row does not fit this model's widths.
    """
    latent = cache_layout(LATENT, latent_format)
    index = cache_layout(INDEX, index_format or latent_format)
    extra = 1 if mtp and config.mtp_layer is not None else 0
    return CacheBytes(
        latent=(config.num_hidden_layers + extra) * latent.bytes_per_token((config.kv_lora_rank, config.qk_rope_head_dim), dtype),
        index=(len(config.full_layers) + extra) * index.bytes_per_token((config.index_head_dim,), dtype),
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model holds: weights and cache. Activations come on top: bounded by the portable implementations' stated
    workspace, and by the vendor's own rules for vendor kernels."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.weights + self.cache


def memory_need(
    config: Glm5Config,
    context: int,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_format: str = "plain",
    block_size: int = 64,
    mtp: bool = False,
) -> Memory:
    """Memory for `batch` sequences of `context` tokens each.

    Args:
        config: the model.
        context: tokens of a sequence; pages are whole, so it is rounded up to a multiple of `block_size`.
        batch: sequences at the same time.
        dtype: working dtype.
        cache_format: "plain", "fp8" or "int8", of latents and index keys.
        block_size: tokens of a cache page.
        mtp: whether the MTP layer is loaded.
    """
    per_token = cache_bytes_per_token(config, dtype, cache_format, mtp=mtp).total
    tokens = batch * -(-context // block_size) * block_size
    return Memory(weights=weight_bytes(config, dtype, mtp), cache=tokens * per_token)


_WIDTHS = {FLOAT32: 4, INT4_CODES: 4, INT4_SCALES: 2, INT4_SHAPE: 4, INT8_CODES: 1, INT8_SCALES: 4}
"""Bytes of an element where the kind decides; everything else is as wide as the dtype."""


def _float_bytes(spec: TensorSpec, width: int) -> int:
    return math.prod(spec.shape) * _WIDTHS.get(spec.kind, width)


def _mtp_only(config: Glm5Config) -> Iterable[TensorSpec]:
    return [] if config.mtp_layer is None else mtp_tensors(config, config.mtp_layer).values()
