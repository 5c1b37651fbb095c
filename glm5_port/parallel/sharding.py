"""Which rank holds which part of a tensor, and the bytes of each rank: exactly, from the list of tensors.

    q_b_proj, kv_b_proj               rows over `tensor` (heads)
    o_proj                            columns over `tensor`
    gate_proj, up_proj | down_proj    rows | columns over `tensor`; of a routed expert over `expert_tensor`; the shared expert is
                                      whole where ranks carry different tokens (any exchange but all_reduce)
    routed experts                    whole experts over `expert`
    embedding, LM head                rows over `tensor`, on the first and the last stage
    everything else                   on every rank of a stage: latent projections, indexer, norms, router

The latent cache is not divided by `tensor` (there is one key-value head), but by stages and by `decode_context`; index keys
lie on every rank of a stage.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import BlockFp8, PackedInt4
from glm5_port.model.accounting import cache_bytes_per_token
from glm5_port.model.block_fp8 import scale_shape
from glm5_port.model.checkpoint_check import kept_in_float
from glm5_port.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    FLOAT32,
    INT4_CODES,
    INT4_SHAPE,
    LM_HEAD,
    PROJECTION,
    TensorSpec,
    expected_tensors,
    layer_prefix,
)
from glm5_port.parallel.plan import ALL_REDUCE, Layout
from glm5_port.quant.formats import find_format, int8_tensors
from glm5_port.quant.int4 import PER_CHANNEL, Int4Rule

ROUTED_EXPERTS, SHARED_EXPERTS = "routed experts", "shared experts"
EVERYWHERE, TENSOR, EXPERT_TENSOR = "everywhere", "tensor", "expert_tensor"
_ROWS = (".q_b_proj.", ".kv_b_proj.", ".gate_proj.", ".up_proj.", "embed_tokens.", "lm_head.")
_COLUMNS = (".o_proj.", ".down_proj.")
_BLOCK_FP8 = BlockFp8((128, 128), ("lm_head", "self_attn.indexer.weights_proj"))
"""As the published FP8 checkpoints."""
_INT4 = PackedInt4(32, (r"re:^(?!.*\.mlp\.experts\.).*",))
"""As the canonical export: routed experts, groups of 32."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor, and how it is divided.

    Attributes:
        shape: of the whole.
        width: bytes of an element.
        over: "everywhere", "tensor" or "expert_tensor".
        axis: the dimension that is divided.
    """

    shape: tuple[int, ...]
    width: int
    over: str
    axis: int

    def bytes(self, ways: int) -> int:
        """Of the largest part. A dimension of one (the scale of a whole row) is not divided."""
        size = self.shape[self.axis]
        kept = size if size == 1 else -(-size // ways)
        return math.prod(self.shape) // size * kept * self.width


@dataclass(frozen=True, slots=True)
class Holding:
    """Bytes of weights on one rank of a stage.

    Attributes:
        by_component: component of the model -> bytes.
    """

    by_component: dict[str, int]

    @property
    def total(self) -> int:
        """Of all components."""
        return sum(self.by_component.values())


def how_divided(name: str, component: str) -> tuple[str, int]:
    """(over, axis) of a tensor."""
    over = EXPERT_TENSOR if component == ROUTED_EXPERTS else TENSOR
    if any(part in name for part in _ROWS):
        return over, 0
    if any(part in name for part in _COLUMNS):
        return over, 1
    return EVERYWHERE, 0


def divided(name: str, component: str, shape: Sequence[int], layout: Layout) -> tuple[str | None, int]:
    """(over, axis) of a stored tensor in a layout; over is None for one that lies whole on every rank: vectors, and the
    shared expert where ranks carry different rows."""
    over, axis = how_divided(name, component)
    whole = component == SHARED_EXPERTS and layout.exchange != ALL_REDUCE
    return (None if over == EVERYWHERE or whole or len(shape) < 2 else over), axis


def rank_weights(config: Glm5Config, weights: str, layout: Layout, stage: int) -> Holding:
    """The weights of one rank of a stage, to the byte as they are stored. All ranks of a stage hold equally many.

    Args:
        config: the model.
        weights: "bf16", "fp8", "int4" or "w4a8".
        layout: of a replica; it must fit the model (`plan.problems`).
        stage: of the pipeline.
    """
    kinds, kind_of = _pieces(config, weights)
    layers = [str(layer) for layer in layout.stage_layers(config.num_hidden_layers)[stage]]
    owners = [*layers, *([EMBEDDING] if stage == 0 else [])]
    if stage == layout.pipeline - 1:
        owners += [FINAL_NORM, LM_HEAD]
        if layout.drafts:
            owners += [str(config.mtp_layer)]
            # The MTP layer embeds the tokens that it drafts.
            owners += [] if EMBEDDING in owners else [EMBEDDING]
    local = (config.n_routed_experts + layout.redundant_experts) // layout.expert
    held: Counter[str] = Counter()
    for kind, times in Counter(kind_of[owner] for owner in owners).items():
        for component, size in _kind_bytes(kinds[kind], layout):
            held[component] += times * size * (local if component == ROUTED_EXPERTS else 1)
    return Holding(dict(held))


_Kind = tuple[tuple[str, Piece, int], ...]
"""(component, piece, how often) of a layer, or of a tensor outside the layers."""


def _kind_bytes(kind: _Kind, layout: Layout) -> list[tuple[str, int]]:
    """(component, bytes on one rank), for a layer; of the routed experts for one."""
    ways = {EVERYWHERE: 1, TENSOR: layout.tensor, EXPERT_TENSOR: layout.expert_tensor}
    shared = layout.tensor if layout.exchange == ALL_REDUCE else 1
    return [
        (component, count * piece.bytes(shared if component == SHARED_EXPERTS else ways[piece.over]))
        for component, piece, count in kind
    ]


@lru_cache(maxsize=16)  # a walk over 60,000 names
def _pieces(config: Glm5Config, weights: str) -> tuple[tuple[_Kind, ...], dict[str, int]]:
    """(kinds of layers, layer or tensor outside the layers -> place of its kind); of the routed experts those of expert 0."""
    int4 = (config.int4 or _INT4) if weights == "int4" else None
    config = dataclasses.replace(config, quantization=None, int4=int4, int8=None)
    owners = {layer_prefix(layer): str(layer) for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers)}
    counted: dict[str, Counter[tuple[str, Piece]]] = {}
    for name, spec in expected_tensors(config, mtp=config.mtp_layer is not None).items():
        if ".experts." in name and ".experts.0." not in name:
            continue
        owner = owners.get(".".join(name.split(".")[:3]) + ".", name)
        over, axis = how_divided(name, spec.component)
        for shape, width in _stored(config, name, spec, weights, owner == str(config.mtp_layer)):
            piece = Piece(shape, width, over if len(shape) > 1 else EVERYWHERE, axis if len(shape) > 1 else 0)
            counted.setdefault(owner, Counter())[spec.component, piece] += 1
    by_owner = {owner: tuple((*key, count) for key, count in found.items()) for owner, found in counted.items()}
    kinds = tuple(dict.fromkeys(by_owner.values()))
    places = {kind: place for place, kind in enumerate(kinds)}
    return kinds, {owner: places[kind] for owner, kind in by_owner.items()}


def _stored(config: Glm5Config, name: str, spec: TensorSpec, weights: str, in_mtp: bool) -> Iterator[tuple[tuple[int, ...], int]]:
    """(shape, bytes of an element) of each tensor that stands for one of the model."""
    if spec.kind == PROJECTION and weights == "fp8" and not kept_in_float(name, _BLOCK_FP8):
        yield spec.shape, 1
        yield scale_shape(spec.shape, _BLOCK_FP8.block), 4
    elif spec.kind == PROJECTION and weights == "w4a8" and not in_mtp and spec.component == ROUTED_EXPERTS:
        for tensor in find_format("modelslim").tensors(name, spec.shape, Int4Rule(group_size=PER_CHANNEL)):
            yield tensor.shape, tensor.bytes // math.prod(tensor.shape)
    elif spec.kind == PROJECTION and weights == "w4a8" and not in_mtp and find_format("modelslim").is_int8(name):
        for tensor in int8_tensors(name, spec.shape):
            yield tensor.shape, tensor.bytes // math.prod(tensor.shape)
    else:
        yield spec.shape, {FLOAT32: 4, INT4_CODES: 4, INT4_SHAPE: 4}.get(spec.kind, 2)


@lru_cache(maxsize=64)
def _cache_rows(config: Glm5Config, kv_format: str) -> tuple[int, int]:
    """Bytes of a token in one layer: (latent, index key)."""
    total = cache_bytes_per_token(config, torch.bfloat16, kv_format)
    return total.latent // config.num_hidden_layers, total.index // max(len(config.full_layers), 1)


def rank_cache_bytes_per_token(config: Glm5Config, kv_format: str, layout: Layout, stage: int) -> int:
    """Bytes of cache that a token of an attention group takes on one rank of a stage."""
    latent, index = _cache_rows(config, kv_format)
    layers = layout.stage_layers(config.num_hidden_layers)[stage]
    extra = 1 if layout.drafts and stage == layout.pipeline - 1 else 0
    owners = sum(config.owns_indexer(layer) for layer in layers) + extra
    return -(-(len(layers) + extra) * latent // layout.decode_context) + owners * index
