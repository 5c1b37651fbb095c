"""Writes a model that was trained aware of INT4 as a canonical compressed-tensors checkpoint: the codes and scales that it
computes with, whether a rule or training made the scales, and everything else in floating point.

The checkpoint is that of an export: the same shards, config.json, report and manifest. With scales made by a rule it has the same
bytes as an export of the masters (`glm5_port.model.save`) in the same dtype. Learned scales follow from no master, so no export
of masters gives them; the manifest records the rule "learned", and `verify --source MASTERS` then makes the codes again from the
masters and the stored scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glm5_port.model.named_weights import NamedWeights
from glm5_port.model.save import Progress, carried, config_text, new_directory, write_shards
from glm5_port.model.stored_tensors import StoredTensor
from glm5_port.model.tensors import TensorSpec, layer_prefix
from glm5_port.quant.choice import choice_of
from glm5_port.quant.files import as_bytes, tensor_digest
from glm5_port.quant.finish import write_last_files
from glm5_port.quant.formats.compressed_tensors import PACKED, SCALE, CompressedTensors
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.output_files import PlannedTensor
from glm5_port.quant.plan import DEFAULT_SHARD_BYTES, INT4, Options, Plan, config_block, config_with, facts_of
from glm5_port.quant.qat import check_current, quantised_state, rule_of_model
from glm5_port.quant.statistics import measure


def export_model(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    source: str | PathLike[str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Plan:
    """Writes what a prepared model computed with in its last forward pass.

    Args:
        model: prepared by `glm5_port.quant.qat.prepare_qat`; this project's, or transformers'.
        directory: must not exist, or be empty. It appears whole or not at all.
        dtype: of what is not INT4; None is what the model's config names (bfloat16 if nothing).
        source: the checkpoint that the model came from, as in `glm5_port.save_checkpoint`, which see.
        max_shard_bytes: a shard is closed before it would grow beyond this.
        progress: called after each weight with (weights written, weights in all).

    Returns:
        What was written.

    Raises:
        InputError: the model is not prepared, a master changed after the last forward pass, or a weight that cannot be written.
        ConfigError, CheckpointError: the source is no whole checkpoint of this model.
        ExportError: the directory holds something, or cannot be written.
    """
    check_current(model)
    weights = NamedWeights(model, source=source, dtype=dtype or getattr(model.config, "dtype", None) or torch.bfloat16)
    state = quantised_state(model)
    plan = _plan(weights, state, rule_of_model(model), max_shard_bytes)
    sources: dict[str, str] = {}
    statistics: dict[str, dict[str, Any]] = {}

    def pieces(tensor: PlannedTensor) -> Iterator[tuple[str, Tensor]]:
        if tensor.name not in state:
            value = weights.tensor(tensor.name)
            sources[tensor.name] = _digest(value)
            yield tensor.name, value
            return
        master, (packed, scales) = weights.masters(tensor.name), (part.cpu() for part in state[tensor.name])
        sources[tensor.name] = _digest(master)
        statistics[tensor.name] = asdict(measure(master.to(torch.bfloat16), packed, scales))
        yield tensor.name + PACKED, packed
        yield tensor.name + SCALE, scales
        yield from plan.format.constants(tensor.name, tensor.source.shape).items()

    with new_directory(directory) as path:
        written = write_shards(path, plan.shards, pieces, progress)
        for record in written.values():
            record["tensors"] = {
                name: {"source": sources[name], "outputs": hashes}
                | ({"statistics": statistics[name]} if name in statistics else {})
                for name, hashes in record["tensors"].items()
            }
        write_last_files(plan, path, {"model": f"{type(model).__name__} in memory"}, written)
    return plan


def _plan(weights: NamedWeights, state: Mapping[str, tuple[Tensor, Tensor]], rule: Int4Rule, max_shard_bytes: int) -> Plan:
    """The plan that an export of the masters would have, but for the source."""
    tensors = tuple(
        _quantized(name, spec, rule, weights) if name in state else carried(name, spec, weights)
        for name, spec in weights.specs.items()
    )
    prefix = None if weights.config.mtp_layer is None else layer_prefix(weights.config.mtp_layer)
    choice = choice_of(weights.specs, {tensor.name for tensor in tensors if tensor.action == INT4}, prefix)
    options = Options(rule=rule, mtp=choice.mtp, include=choice.include, exclude=choice.exclude, max_shard_bytes=max_shard_bytes)
    facts = facts_of(weights.config, options, weights.source)
    return Plan(
        source=weights.source or Path(),
        config=weights.config,
        options=options,
        tensors=tensors,
        shards=CompressedTensors().container.lay_out(tensors, facts),
        config_text=config_with(config_text(weights), config_block(weights.config, tensors, options)),
        block=None,
        has_weights=weights.source is not None,
        notes=(),
        scales=lambda name: state[name][1],
    )


def _quantized(name: str, spec: TensorSpec, rule: Int4Rule, weights: NamedWeights) -> PlannedTensor:
    plain = carried(name, spec, weights)
    source = StoredTensor(plain.source.shape, plain.source.dtype, "", plain.source.bytes, 0)
    outputs = CompressedTensors().tensors(name, spec.shape, rule)
    return PlannedTensor(name, INT4, spec.component, plain.mtp, source, None, outputs)


def _digest(tensor: Tensor) -> str:
    digest = tensor_digest()
    digest.update(as_bytes(tensor))
    return digest.hexdigest()
