"""Writes an INT4 checkpoint in another INT4 format: codes and scales move bit for bit, no weight becomes a number in between.

Sources are canonical exports and the checkpoints of others: compressed-tensors `pack-quantized` (such as Kimi-K2's), GPTQ without
activation order, AWQ GEMM; symmetric all. A scale that the output's type does not hold exactly is refused. Streaming, journal,
manifest and resume are those of an export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from glm5_port.config import Glm5Config
from glm5_port.config_file import read_json
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.stored_tensors import FLOATS, StoredTensor, StoredTensors, read_directory
from glm5_port.model.tensors import TensorSpec, expected_tensors, layer_prefix
from glm5_port.quant.config_text import KEY
from glm5_port.quant.export import DEFAULT_MEMORY, Exported, carry_out
from glm5_port.quant.formats import find_format, format_of, formats, int8_tensors, stored_group_size
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.manifest import read_manifest, rule_of
from glm5_port.quant.output_files import PlannedTensor
from glm5_port.quant.plan import (
    CARRY,
    INT4,
    INT8,
    REPACK,
    UNKNOWN,
    Options,
    Plan,
    config_block,
    config_with,
    facts_of,
    fitting_options,
    is_int8,
    keep,
)
from glm5_port.quant.structure import Structure, read_structure
from glm5_port.quant.writing import Progress

SHOWN = 10
"""Problems of a source that an error lists."""
REPACKED = "INT4"
"""Stands for the dtype of a repacked weight, which has one for each of its parts."""


def transcode(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    options: Options | None = None,
    *,
    workers: int = 1,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> Exported:
    """Writes an INT4 checkpoint in another format; the same arguments and errors as `export`, which see.

    Args:
        source: directory of an INT4 checkpoint in compressed-tensors, GPTQ or AWQ.
        destination: a directory that does not exist, is empty, or holds an unfinished run of the same.
        options: format and shard size; the rest follows from the source.
        workers: threads.
        memory: bytes that the process may take in all.
        progress: called now and then.
    """
    plan = plan_transcode(source, options or Options())
    return carry_out(plan, destination, workers=workers, memory=memory, progress=progress)


def is_int4(path: str | PathLike[str]) -> bool:
    """Whether a directory says that it holds INT4 weights in a format that can be read."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        return False
    block = read_json(directory).get(KEY)
    method = block.get("quant_method") if isinstance(block, Mapping) else None
    return any(known.is_source and known.name == method for known in formats().values())


def plan_transcode(source: str | PathLike[str], options: Options) -> Plan:
    """Plans it from headers.

    Args:
        source: directory of an INT4 checkpoint.
        options: format and max_shard_bytes are taken; rule and mtp follow from the source.

    Raises:
        ConfigError, CheckpointError: no INT4 checkpoint of this model, or not a whole one.
        InputError: a weight that the format cannot hold.
    """
    path, notes = Path(source), list[str]()
    if not path.is_dir() or not is_int4(path):
        known = ", ".join(name for name, known_format in formats().items() if known_format.is_source)
        raise CheckpointError(
            f"{path} is no INT4 checkpoint that can be read\n  expected: a directory whose config.json has a quantization_config "
            f"of {known}; a checkpoint in bf16 or block-FP8 is quantised by glm5-port export"
        )
    raw = read_json(path)
    config = Glm5Config.from_dict({key: value for key, value in raw.items() if key != KEY})
    stored, manifest = read_directory(path), read_manifest(path)
    source_format = format_of(raw[KEY], manifest)
    rule = _rule(manifest, stored, notes, stored_group_size(source_format, stored.tensors))
    structure = read_structure(
        config, None, stored, rule, source_format, mtp_absent=bool(manifest and manifest.get("mtp") == "none"), check_config=False
    )
    if problems := [*stored.faults, *structure.problems]:
        more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        raise CheckpointError("\n  ".join([f"{path} is not whole, so nothing is written", *problems[:SHOWN], *more]))
    if not structure.weights:
        raise CheckpointError(f"{path} holds no INT4 weights\n  expected: tensors as {source_format.title} has them")
    if structure.choice.mtp == INT4 and not find_format(options.format).mtp:
        raise InputError(
            f"{path} has its MTP layer in INT4, and format {options.format} has it in bf16 only\n"
            "  Export the original weights with --mtp bf16 first (or directly with this --format)"
        )
    options = replace(options, rule=rule, mtp=structure.choice.mtp, include=(), exclude=())
    options = fitting_options(options, notes)
    tensors = tuple(_planned(config, stored, structure, options))
    container, facts = find_format(options.format).container, facts_of(config, options, path)
    return Plan(
        source=path,
        config=config,
        options=options,
        tensors=tensors,
        shards=container.lay_out(tensors, facts),
        config_text=config_with((path / "config.json").read_text(encoding="utf-8"), config_block(config, tensors, options)),
        block=None,
        has_weights=True,
        notes=(*notes, *container.notes(facts)),
        source_format=source_format,
        rule_known=manifest is not None and bool(manifest.get("rule_known", True)),
    )


def _rule(manifest: Mapping[str, Any] | None, stored: StoredTensors, notes: list[str], size: int) -> Int4Rule:
    """The rule that the source's manifest records. Without one it is unknown, and the widest of the known ones is recorded: codes
    from -8 to 7, scales of either sign."""
    if manifest is not None:
        return rule_of(manifest)
    notes.append("the source has no int4_manifest.json: by which rule it was quantised is not known, and is recorded so")
    return Int4Rule("signed8", size)


def _planned(config: Glm5Config, stored: StoredTensors, structure: Structure, options: Options) -> Iterator[PlannedTensor]:
    """Every weight and every other tensor in the order of the layers, unknown ones last."""
    expected = expected_tensors(config, mtp=config.mtp_layer is not None)
    mtp = None if config.mtp_layer is None else layer_prefix(config.mtp_layer)
    parts = {name for weight in structure.weights.values() for name in weight}
    names = [name for name in expected if name in structure.weights or name in stored.tensors]
    names += [name for name in stored.tensors if name not in expected and name not in parts]
    for name in names:
        in_mtp, spec = mtp is not None and name.startswith(mtp), expected.get(name)
        if name in structure.weights:
            yield _repacked(name, expected[name], in_mtp, structure, options)
            continue
        tensor, action, kept = stored.tensors[name], INT8, None
        if not (is_int8(name, spec, in_mtp, options) and tensor.dtype in FLOATS):
            action, kept = keep(name, tensor, CARRY, config, options)
        yield PlannedTensor(
            name=name,
            action=action,
            component=UNKNOWN if spec is None else spec.component,
            mtp=in_mtp,
            source=tensor,
            multipliers=None,
            outputs=int8_tensors(name, tensor.shape) if kept is None else kept.outputs,
            kept=kept,
        )


def _repacked(name: str, spec: TensorSpec, in_mtp: bool, structure: Structure, options: Options) -> PlannedTensor:
    """A weight whose codes and scales are carried over."""
    output_format, parts = find_format(options.format), structure.weights[name]
    output_format.check(name, spec.shape, options.rule)
    file = next(iter(parts.values())).file
    return PlannedTensor(
        name=name,
        action=REPACK,
        component=spec.component,
        mtp=in_mtp,
        source=StoredTensor(spec.shape, REPACKED, file, sum(part.bytes for part in parts.values()), 0),
        multipliers=None,
        outputs=output_format.tensors(name, spec.shape, options.rule),
        parts=parts,
    )
