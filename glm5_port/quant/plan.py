"""What an export will write, worked out from file headers (or from a config.json alone) before a weight is read.

Every output tensor gets its file and place here, so that workers can fill files in any order and the bytes come out the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from glm5_port.config import Glm5Config
from glm5_port.config_quantization import BlockFp8
from glm5_port.errors import CheckpointError, InputError
from glm5_port.model.block_fp8 import SCALE_SUFFIX, scale_name, scale_shape
from glm5_port.model.checkpoint import Checkpoint
from glm5_port.model.checkpoint_check import differences, kept_in_float
from glm5_port.model.stored_tensors import FLOATS, FP8, StoredTensor, StoredTensors
from glm5_port.model.tensors import FLOAT32, PROJECTION, TensorSpec, expected_tensors, layer_prefix
from glm5_port.quant.config_text import KEY, with_quantization, without_quantization
from glm5_port.quant.formats import Format, find_format, int8_tensors
from glm5_port.quant.int4 import Int4Rule
from glm5_port.quant.output_files import Facts, Kept, OutputTensor, PlannedTensor, Shard

INT4, REPACK, INT8, BF16, CONVERT, CARRY = "int4", "repack", "int8", "bf16", "convert", "carry"
"""What becomes of a stored tensor: quantised; its INT4 codes and scales written in another layout; quantised to INT8 with a
scale for each row; multiplied out from block-FP8; every value kept in a wider type or another order; or copied byte for byte."""
ROUTED_EXPERTS = "routed experts"
UNKNOWN = "not known here"
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of an export.

    Attributes:
        format: name of the output format.
        rule: how weights are quantised.
        mtp: "int4" quantises the experts of the MTP layer as all others, "bf16" carries that layer as it is.
        include: regular expressions; matrices whose name one of them finds are quantised beside the routed experts.
        exclude: regular expressions; matrices whose name one of them finds are not quantised.
        max_shard_bytes: a shard is closed before it would grow beyond this; a larger tensor has a shard of its own.
    """

    format: str = "compressed-tensors"
    rule: Int4Rule = field(default_factory=Int4Rule)
    mtp: str = INT4
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_shard_bytes: int = DEFAULT_SHARD_BYTES

    def __post_init__(self) -> None:
        find_format(self.format)
        if self.mtp not in (INT4, BF16):
            raise InputError(f"mtp = {self.mtp!r} is not known; known are {INT4} and {BF16}")
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole export.

    Attributes:
        source: directory (or config.json) it was planned from.
        config: of the source.
        options: what was asked.
        tensors: every stored tensor that something is written for, in the order of the layers.
        shards: the files of weights.
        config_text: the config.json that will be written.
        block: rows and columns of a block of the source's block-FP8, if it is quantised.
        has_weights: False when it was planned from a config.json alone and can only be looked at.
        notes: what is worth knowing, one sentence each.
        source_format: the INT4 format of the source; None if it is not INT4.
        rule_known: False for an INT4 source that does not say by which rule it was quantised.
        scales: gives the bfloat16 scales of a weight by name, where the rule is "learned": no weight tells them.
    """

    source: Path
    config: Glm5Config
    options: Options
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    config_text: str
    block: tuple[int, int] | None
    has_weights: bool
    notes: tuple[str, ...]
    source_format: Format | None = None
    rule_known: bool = True
    scales: Callable[[str], Tensor] | None = None

    @property
    def format(self) -> Format:
        """The output format."""
        return find_format(self.options.format)

    @property
    def facts(self) -> Facts:
        """What files depend on beside their tensors."""
        return facts_of(self.config, self.options, self.source if self.has_weights else None)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        """That will be read."""
        return sum(t.source.bytes + (t.multipliers.bytes if t.multipliers else 0) for t in self.tensors)

    @property
    def source_files(self) -> set[str]:
        """The files of the source that hold weights."""
        return set().union(*(tensor.files for tensor in self.tensors))

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are quantised to INT4."""
        return tuple(tensor for tensor in self.tensors if tensor.action == INT4)

    def files(self) -> dict[str, str]:
        """Files of the format beside weights and config.json: name -> text."""
        actions = {output.name: tensor.action for tensor in self.tensors for output in tensor.outputs}
        return self.format.files(json.loads(self.config_text).get(KEY), actions)

    def experts(self) -> dict[str, int]:
        """Expert matrices that are written in INT4: {"trunk": 57600, "mtp": 768} for GLM-5."""
        written = (tensor for tensor in self.tensors if tensor.action in (INT4, REPACK))
        counts = Counter("mtp" if tensor.mtp else "trunk" for tensor in written if tensor.component == ROUTED_EXPERTS)
        return {"trunk": counts["trunk"], "mtp": counts["mtp"]}


def plan_export(source: str | PathLike[str], options: Options) -> Plan:
    """Plans an export from the headers of a checkpoint; from its config.json where there are no weights.

    Args:
        source: directory of a bf16, fp16, fp32 or block-FP8 checkpoint; or a config.json, or a directory with nothing else.
        options: what is asked.

    Raises:
        ConfigError, CheckpointError: not a checkpoint of this model, or an incomplete one.
        InputError: a weight that the rule or the format cannot take, or a pattern that finds nothing.
    """
    path = Path(source)
    notes: list[str] = []
    options = fitting_options(options, notes)
    if path.is_file() or (path.is_dir() and not any(path.glob("*.safetensors*"))):
        config = Glm5Config.from_json(path)
        stored, has_weights = _described(config), False
        notes.append("planned from config.json alone: there are no weights here")
    else:
        with Checkpoint.open(path) as checkpoint:
            config, stored, has_weights = checkpoint.config, checkpoint.stored.tensors, True
            _check_source(checkpoint, notes)
    if config.int8 is not None:
        raise InputError(
            f"{path} holds INT8 weights, and what was rounded to 8 bits is not quantised again\n"
            "  expected: a bf16, fp16, fp32 or block-FP8 checkpoint"
        )
    if config.int4 is not None:
        raise InputError(
            f"{path} is INT4 already: there is nothing to quantise (glm5-port transcode writes it in another format)\n"
            "  expected: a bf16, fp16, fp32 or block-FP8 checkpoint"
        )
    config_file = path if path.is_file() else path / "config.json"
    tensors = tuple(_planned(config, stored, options))
    _check_patterns(tensors, options)
    block = config.quantization.block if config.quantization is not None else None
    container, facts = find_format(options.format).container, facts_of(config, options, path if has_weights else None)
    return Plan(
        source=path,
        config=config,
        options=options,
        tensors=tensors,
        shards=container.lay_out(tensors, facts),
        config_text=config_with(config_file.read_text(encoding="utf-8"), config_block(config, tensors, options)),
        block=block,
        has_weights=has_weights,
        notes=(*notes, *container.notes(facts)),
    )


# --- the source ------------------------------------------------------------------------------------------------------------


def _check_source(checkpoint: Checkpoint, notes: list[str]) -> None:
    """Refuses a checkpoint that lacks anything. Tensors that are not known are no reason: they are carried."""
    config, stored = checkpoint.config, checkpoint.stored
    if config.mtp_layer is not None and not checkpoint.has_mtp:
        notes.append(f"config.json announces an MTP layer ({config.mtp_layer}), but none is stored: there is nothing to carry")
    expected = expected_tensors(config, mtp=checkpoint.has_mtp)
    known = {name: tensor for name, tensor in stored.tensors.items() if name.removesuffix(SCALE_SUFFIX) in expected}
    if found := differences(expected, StoredTensors(known, stored.files, stored.unreadable, stored.faults), config):
        raise CheckpointError("\n  ".join([f"{checkpoint.path} is not whole, so nothing is exported", *found]))
    if unknown := [name for name in stored.tensors if name not in known]:
        notes.append(f"{len(unknown):,} tensors are not known here and are carried unchanged, for example {unknown[0]}")


def _described(config: Glm5Config) -> dict[str, StoredTensor]:
    """The tensors that a config.json describes, as they would be stored."""
    wide = {"float32": "F32", "float16": "F16"}.get(config.dtype or "bfloat16", "BF16")
    stored: dict[str, StoredTensor] = {}
    for name, spec in expected_tensors(config, mtp=config.mtp_layer is not None).items():
        is_fp8 = config.quantization is not None and _is_fp8(name, spec, config.quantization)
        dtype = FP8 if is_fp8 else "F32" if spec.kind == FLOAT32 else wide
        stored[name] = _entry(dtype, spec.shape)
        if is_fp8 and config.quantization is not None:
            stored[scale_name(name)] = _entry("F32", scale_shape(spec.shape, config.quantization.block))
    return stored


def _is_fp8(name: str, spec: TensorSpec, quantization: BlockFp8) -> bool:
    return spec.kind == PROJECTION and not kept_in_float(name, quantization)


def _entry(dtype: str, shape: Sequence[int]) -> StoredTensor:
    output = OutputTensor.of("", dtype, shape)
    return StoredTensor(output.shape, dtype, "", output.bytes, 0)


# --- what becomes of each tensor -------------------------------------------------------------------------------------------


def _planned(config: Glm5Config, stored: Mapping[str, StoredTensor], options: Options) -> Iterator[PlannedTensor]:
    """Every stored tensor in the order of the layers, unknown ones last. Multipliers go with their weight."""
    expected = expected_tensors(config, mtp=config.mtp_layer is not None)
    mtp = None if config.mtp_layer is None else layer_prefix(config.mtp_layer)
    names = [name for name in expected if name in stored]
    multipliers = {scale_name(name) for name in names if stored[name].dtype == FP8}
    names += [name for name in stored if name not in expected and name not in multipliers]
    output_format = find_format(options.format)
    for name in names:
        tensor, spec, kept = stored[name], expected.get(name), None
        in_mtp = mtp is not None and name.startswith(mtp)
        action = _action(name, tensor, spec, in_mtp, options)
        if action == INT4:
            output_format.check(name, tensor.shape, options.rule)
            outputs = output_format.tensors(name, tensor.shape, options.rule)
        elif action == INT8:
            outputs = int8_tensors(name, tensor.shape)
        else:
            action, kept = keep(name, tensor, action, config, options)
            outputs = kept.outputs
        yield PlannedTensor(
            name=name,
            action=action,
            component=UNKNOWN if spec is None else spec.component,
            mtp=in_mtp,
            source=tensor,
            multipliers=stored[scale_name(name)] if scale_name(name) in multipliers else None,
            outputs=outputs,
            kept=kept,
        )


def _action(name: str, tensor: StoredTensor, spec: TensorSpec | None, in_mtp: bool, options: Options) -> str:
    """Routed experts and what `include` finds, without what `exclude` finds and without an MTP layer that is carried as it is.
    Only projections can be quantised: routers, norms and the indexer's head weights decide between nearly equal values."""
    chosen = False
    if spec is not None and spec.kind == PROJECTION and not (in_mtp and options.mtp == BF16):
        chosen = spec.component == ROUTED_EXPERTS or any(re.search(pattern, name) for pattern in options.include)
    excluded = any(re.search(pattern, name) for pattern in options.exclude)
    if chosen and not excluded:
        return INT4
    if is_int8(name, spec, in_mtp, options) and not excluded:
        return INT8
    return BF16 if spec is not None and tensor.dtype == FP8 else CARRY


def keep(name: str, tensor: StoredTensor, action: str, config: Glm5Config, options: Options) -> tuple[str, Kept]:
    """(action, how its pieces come about) of a tensor that is not quantised and would be carried, or multiplied out."""
    arrives = tensor
    if action == BF16:
        arrives = replace(tensor, dtype="BF16", bytes=OutputTensor.of(name, "BF16", tensor.shape).bytes)
    kept = find_format(options.format).container.kept(name, arrives, config)
    return (CONVERT if action == CARRY and kept.convert is not None else action), kept


def _check_patterns(tensors: Iterable[PlannedTensor], options: Options) -> None:
    names = [tensor.name for tensor in tensors]
    quantized = [tensor.name for tensor in tensors if tensor.action == INT4]
    for pattern in options.include:
        if not any(re.search(pattern, name) for name in quantized):
            raise InputError(f"include = {pattern!r} finds no projection that can be quantised\n  names look like {names[1]}")
    for pattern in options.exclude:
        if not any(re.search(pattern, name) for name in names):
            raise InputError(f"exclude = {pattern!r} finds no tensor\n  names look like {names[1]}")
    if not quantized:
        raise InputError("nothing would be quantised: this model has no routed experts, or all of them are excluded")


def fitting_options(options: Options, notes: list[str]) -> Options:
    """The options, with the MTP layer in bf16 where the format has it no other way."""
    output_format = find_format(options.format)
    if output_format.mtp or options.mtp == BF16:
        return options
    notes.append(f"the MTP layer is carried as it is: {output_format.name} never has it quantised")
    return replace(options, mtp=BF16)


def is_int8(name: str, spec: TensorSpec | None, in_mtp: bool, options: Options) -> bool:
    """Whether a tensor that is not quantised to INT4 is quantised to INT8."""
    return spec is not None and spec.kind == PROJECTION and not in_mtp and find_format(options.format).is_int8(name)


def facts_of(config: Glm5Config, options: Options, source: Path | None) -> Facts:
    """What files depend on beside their tensors; `source` is None where there are no weights."""
    return Facts(config, options.rule, options.max_shard_bytes, source)


def config_with(text: str, block: Mapping[str, object] | None) -> str:
    """The text of config.json with the quantization_config of the output, or without any."""
    return without_quantization(text) if block is None else with_quantization(text, block)


def config_block(config: Glm5Config, tensors: Sequence[PlannedTensor], options: Options) -> dict[str, object] | None:
    """The quantization_config of the output; None if it has none."""
    modules: dict[str, list[str]] = {INT4: [], CARRY: []}
    for tensor in tensors:
        is_module = tensor.name.endswith(".weight") and len(tensor.source.shape) == 2 and tensor.component != "embedding"
        if is_module and (tensor.action == REPACK or tensor.source.dtype in (*FLOATS, FP8)):
            modules[INT4 if tensor.action in (INT4, REPACK) else CARRY].append(tensor.name.removesuffix(".weight"))
    return find_format(options.format).config(options.rule, modules[INT4], modules[CARRY], config.mtp_layer)
